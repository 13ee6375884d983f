"""`python -m memtier.training CORPUS --out DIR`: train nano where only torch and transformers are installed."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from memtier.errors import MemtierError
from memtier.training.nano import NANO, export_nano, nano_config, train_nano


def main(arguments: list[str] | None = None) -> int:
    """Parse, train, print the report as JSON; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m memtier.training", description="Train nano.")
    parser.add_argument("corpus", type=Path, help="folder of *.md and *.txt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--no-resume", dest="resume", action="store_false")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a field of LoopSettings")
    parser.add_argument("--config", action="append", default=[], metavar="NAME=VALUE", help="a field of BMojoConfig")
    parser.add_argument("--export-from", type=Path, help="train nothing; write the model of this run's checkpoint")
    given = parser.parse_args(arguments)
    try:
        config = nano_config(**_pairs(parser, given.config))
        if given.export_from is not None:
            report = export_nano(given.corpus, given.export_from, given.out, device=given.device, config=config)
        else:
            budget = {name: v for name in ("minutes", "steps") if (v := getattr(given, name)) is not None}
            changes = _pairs(parser, given.set)
            if budget:
                changes |= {"minutes": None, "steps": None} | budget
            report = train_nano(
                given.corpus,
                given.out,
                seed=given.seed,
                device=given.device,
                resume=given.resume,
                settings=replace(NANO, **changes),
                config=config,
                show_progress=not given.quiet,
            )
    except MemtierError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(asdict(report), default=str))
    return 0


def _pairs(parser: argparse.ArgumentParser, texts: list[str]) -> dict[str, Any]:
    """NAME=VALUE with a Python literal as value; anything else is a string."""
    pairs: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            parser.error(f"{text!r} is not NAME=VALUE")
        try:
            pairs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pairs[name] = value
    return pairs


if __name__ == "__main__":
    sys.exit(main())
