"""`python -m memtier.training RECIPE`: what `memtier train` does, where only torch and transformers are installed.

Progress bars need rich, and hylora needs peft; `memtier train` needs the whole package.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from memtier.errors import ConfigError, MemtierError
from memtier.training.course import SpanDraw
from memtier.training.fit_settings import FitSettings
from memtier.training.hylora import HyLora, train_hylora
from memtier.training.lm import byte_config, train_lm
from memtier.training.nano import NANO, export_nano, nano_config, train_nano
from memtier.training.prime import Prime, train_prime
from memtier.training.recall.grid import Cell
from memtier.training.recall.recipe import train_recall
from memtier.training.recall.train import Recipe
from memtier.training.surroundings import parse_pairs
from memtier.training.text import TextLessons

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, print the report as JSON; the exit status."""
    given = _parser().parse_args(arguments)
    try:
        report = given.run(given)
    except MemtierError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(asdict(report), default=str))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m memtier.training", description="Train a model.")
    recipes = parser.add_subparsers(required=True, metavar="RECIPE")

    def recipe(name: str, run: Any, about: str, settings: Sequence[type]) -> argparse.ArgumentParser:
        names = ", ".join(f.name for kind in settings for f in fields(kind))
        made = recipes.add_parser(name, help=about, description=about)
        made.set_defaults(run=run)
        made.add_argument("--out", type=Path, required=True, help="folder for log.csv, checkpoints and what is trained")
        made.add_argument("--seed", type=int, default=0)
        made.add_argument("--device", default="auto")
        made.add_argument("--minutes", type=float)
        made.add_argument("--no-resume", dest="resume", action="store_false")
        made.add_argument("--quiet", dest="show_progress", action="store_false", help="no progress bar")
        made.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=f"one of: {names}")
        return made

    nano = recipe("nano", _nano, "Train nano.", (type(NANO),))
    nano.add_argument("corpus", type=Path, help="folder of *.md and *.txt")
    nano.add_argument("--steps", type=int)
    nano.add_argument("--config", action="append", default=[], metavar="NAME=VALUE", help="a field of BMojoConfig")
    nano.add_argument("--export-from", type=Path, help="train nothing; write the model of this run's checkpoint")
    lm = recipe("lm", _lm, "Train a language model.", (FitSettings, TextLessons, SpanDraw))
    lm.add_argument("corpus", type=Path, help="folder of *.md and *.txt")
    lm.add_argument("--model", help="begin with these weights: 'nano', a folder or an id")
    lm.add_argument("--config", action="append", default=[], metavar="NAME=VALUE", help="a field of BMojoConfig")
    recipe("recall", _recall, "Train one model of the recall suite.", (Cell, FitSettings, SpanDraw))
    hylora = recipe("hylora", _hylora, "Adapt a model.", (HyLora, FitSettings, TextLessons, SpanDraw))
    hylora.add_argument("model", help="'nano', a folder or an id")
    hylora.add_argument("corpus", type=Path, help="folder of *.md and *.txt")
    prime = recipe("prime", _prime, "Make a hybrid of an attention model.", (Prime, FitSettings, TextLessons, SpanDraw))
    prime.add_argument("corpus", type=Path, help="folder of *.md and *.txt")
    prime.add_argument("--from", dest="model", required=True, help="a folder or an id")
    prime.add_argument("--memory", action="append", default=[], metavar="NAME=VALUE", help="a size of the memory")
    return parser


def _nano(given: argparse.Namespace) -> Any:
    config = nano_config(**parse_pairs(given.config))
    if given.export_from is not None:
        return export_nano(given.corpus, given.export_from, given.out, device=given.device, config=config)
    budget = {name: v for name in ("minutes", "steps") if (v := getattr(given, name)) is not None}
    changes = parse_pairs(given.set)
    if budget:
        changes |= {"minutes": None, "steps": None} | budget
    return train_nano(
        given.corpus, given.out, seed=given.seed, device=given.device, resume=given.resume,
        settings=replace(NANO, **changes), config=config, show_progress=given.show_progress,
    )  # fmt: skip


def _lm(given: argparse.Namespace) -> Any:
    pairs = parse_pairs(given.set)
    # without any of them, the recipe's own for such a model
    about_text = {f.name for kind in (TextLessons, SpanDraw) for f in fields(kind)} & pairs.keys()
    settings, lessons, span = _filled(pairs, FitSettings(), TextLessons(), SpanDraw())
    return train_lm(
        given.corpus, given.out, model=given.model,
        config=byte_config(**parse_pairs(given.config)) if given.config else None,
        settings=settings, lessons=replace(lessons, span=span) if about_text else None, **_common(given),
    )  # fmt: skip


def _recall(given: argparse.Namespace) -> Any:
    cell, settings, span = _filled(parse_pairs(given.set), Cell("bmojo", 16), Recipe().fit, SpanDraw())
    common = _common(given)
    cell = replace(cell, seed=common.pop("seed"))
    return train_recall(cell, given.out, settings=settings, span=span, **common)


def _hylora(given: argparse.Namespace) -> Any:
    adapter, settings, lessons, span = _filled(
        parse_pairs(given.set), HyLora(), FitSettings(), TextLessons(), SpanDraw()
    )
    return train_hylora(
        given.model, given.corpus, given.out, adapter=adapter, settings=settings, lessons=replace(lessons, span=span),
        **_common(given),
    )  # fmt: skip


def _prime(given: argparse.Namespace) -> Any:
    given_sizes = Prime(sizes=parse_pairs(given.memory))
    recipe, settings, lessons, span = _filled(
        parse_pairs(given.set), given_sizes, FitSettings(steps=500, learning_rate=5e-4), TextLessons(), SpanDraw()
    )
    return train_prime(
        given.corpus, given.out, model=given.model, recipe=recipe, settings=settings,
        lessons=replace(lessons, span=span), **_common(given),
    )  # fmt: skip


def _common(given: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(given, name) for name in ("seed", "device", "minutes", "resume", "show_progress")}


def _filled(pairs: dict[str, Any], *records: Any) -> list[Any]:
    """The records with each pair in the first that has such a field.

    Raises:
        ConfigError: none has.
    """
    left, out = dict(pairs), []
    for record in records:
        names = [f.name for f in fields(record)]
        out.append(replace(record, **{name: left.pop(name) for name in names if name in left}))
    if left:
        known = ", ".join(f.name for record in records for f in fields(record))
        raise ConfigError(f"--set {next(iter(left))} names no setting of this recipe; there are {known}.")
    return out


if __name__ == "__main__":
    sys.exit(main())
