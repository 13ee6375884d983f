"""Tiny runs with fixed seeds, whose loss curves are kept: what a change of the training code must not move unnoticed.

    python -m memtier.training.golden FOLDER           writes FOLDER/lm.csv, recall.csv and hylora.csv anew

On one machine a run repeats to the bit. Between machines and releases of torch the order of sums differs: curves agree
to `TOLERANCE`.
"""

from __future__ import annotations

import csv
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from memtier.errors import CorruptMemoryError
from memtier.training.course import SpanDraw
from memtier.training.fit import LOG_NAME
from memtier.training.fit_settings import FitSettings
from memtier.training.hylora import HyLora, train_hylora
from memtier.training.lm import byte_config, train_lm
from memtier.training.recall.grid import Cell
from memtier.training.recall.recipe import train_recall
from memtier.training.text import TextLessons

__all__ = ["RUNS", "TOLERANCE", "Curve", "differences", "golden_text", "read_curve", "run_golden", "write_curve"]

TOLERANCE = 2e-3
"""Largest difference of a loss, in nats, or relative one of a gradient norm or a learning rate."""

KEPT: tuple[str, ...] = (
    "step", "tokens", "learning_rate", "sequence_tokens", "piece_tokens", "span_refresh_tokens", "span_blocks",
    "far_attention", "loss", "innovation_loss", "span_loss", "gradient_norm",
)  # fmt: skip
_LOSSES = ("loss", "innovation_loss", "span_loss")
_RELATIVE = ("gradient_norm", "learning_rate")

Curve = list[dict[str, str]]

_MODEL = {
    "hidden_size": 16, "num_hidden_layers": 3, "layer_types": ["mamba2", "bmojo", "bmojo"], "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24, "window_tokens": 16, "eidetic_tokens": 6,
    "span_block_tokens": 4, "span_refresh_tokens": 4, "span_blocks": 2, "memory_layers": [1, 2], "ssm_state_size": 8,
    "ssm_head_dim": 8, "ssm_chunk_size": 8, "initializer_range": 0.1,
}  # fmt: skip
_SPAN = SpanDraw(refresh_tokens=(2, 4, 8), blocks=(1, 2, 3))


def golden_text(folder: Path) -> Path:
    """A folder of 24,000 bytes of made-up text."""
    rng = random.Random("golden")
    words = ["".join(rng.choices("abcdefghijklmnoprstuvw", k=rng.randint(2, 7))) for _ in range(300)]
    lines, size = [], 0
    while size < 24_000:
        lines.append(" ".join(rng.choices(words, k=rng.randint(4, 12))) + ".\n")
        size += len(lines[-1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("".join(lines))
    return folder


def _lm(folder: Path) -> Path:
    """Whole sequences: dense far attention first, then spans of drawn sizes."""
    settings = FitSettings(steps=12, learning_rate=1e-2, precision="float32", log_every_steps=2)
    lessons = TextLessons(sequence_tokens=80, batch_tokens=320, dense_until=0.5, span=_SPAN)
    train_lm(
        golden_text(folder / "text"), folder / "lm", config=byte_config(**_MODEL), seed=1, device="cpu",
        settings=settings, lessons=lessons, show_progress=False,
    )  # fmt: skip
    return folder / "lm"


def _recall(folder: Path) -> Path:
    """All stages of the recall recipe: few slots, dense far attention, chosen blocks."""
    cell = Cell(
        "bmojo_span", 4, pairs=2, tokens=44, gap=20, vocabulary=20, width=16, steps=20, batch_tokens=256, seed=2,
        learning_rate=1e-2,
    )  # fmt: skip
    settings = FitSettings(precision="float32", weight_decay=0.01, log_every_steps=4)
    train_recall(cell, folder / "recall", device="cpu", settings=settings, show_progress=False)
    return folder / "recall"


def _hylora(folder: Path) -> Path:
    """An adapter in pieces with carried state and gradient checkpointing, on the model of the run `lm`."""
    model = _lm(folder)
    settings = FitSettings(
        steps=6, learning_rate=1e-2, precision="float32", log_every_steps=1, piece_tokens=48,
        gradient_checkpointing=True,
    )  # fmt: skip
    lessons = TextLessons(sequence_tokens=160, batch_tokens=320, span=_SPAN)
    train_hylora(
        model, golden_text(folder / "text"), folder / "hylora", adapter=HyLora(rank=4, norms=True), seed=3,
        device="cpu", settings=settings, lessons=lessons, show_progress=False,
    )  # fmt: skip
    return folder / "hylora"


RUNS: dict[str, Callable[[Path], Path]] = {"lm": _lm, "recall": _recall, "hylora": _hylora}


def run_golden(name: str, folder: Path) -> Curve:
    """Make the run `name` in a folder, and give its loss curve."""
    return read_curve(RUNS[name](folder) / LOG_NAME)


def read_curve(path: Path) -> Curve:
    """The kept columns of a log.

    Raises:
        CorruptMemoryError: it lacks one.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or any(name not in rows[0] for name in KEPT):
        raise CorruptMemoryError(f"{path} is no loss curve: the columns {', '.join(KEPT)} were expected.")
    return [{name: row[name] for name in KEPT} for row in rows]


def write_curve(path: Path, curve: Curve) -> None:
    """A curve as a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, KEPT, lineterminator="\n")
        writer.writeheader()
        writer.writerows(curve)


def differences(curve: Curve, golden: Curve) -> list[str]:
    """Where two curves differ by more than `TOLERANCE`, or by anything that is not measured; empty if nowhere."""
    if len(curve) != len(golden):
        return [f"{len(curve)} rows, {len(golden)} were expected"]
    return [
        f"step {old['step']}: {name} is {new[name]}, {old[name]} was expected"
        for new, old in zip(curve, golden, strict=True)
        for name in KEPT
        if not _agree(name, new[name], old[name])
    ]


def _agree(name: str, new: str, old: str) -> bool:
    if new == old:
        return True
    if name not in _LOSSES + _RELATIVE:
        return False
    allowed = TOLERANCE * (1.0 if name in _LOSSES else abs(float(old)))
    return abs(float(new) - float(old)) <= allowed


def main(arguments: list[str]) -> int:
    """Write the curves anew."""
    if len(arguments) != 1:
        print("usage: python -m memtier.training.golden FOLDER", file=sys.stderr)
        return 2
    target = Path(arguments[0])
    target.mkdir(parents=True, exist_ok=True)
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            write_curve(target / f"{name}.csv", run_golden(name, Path(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
