"""What the finished cells of a recall grid say: mean and spread over seeds, as a table, a CSV file and plots."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from statistics import fmean
from typing import Any

from memtier.errors import ConfigError
from memtier.training.recall.grid import Row

__all__ = ["SUMMARY_COLUMNS", "draw_plots", "find_matplotlib", "summarise", "write_summary"]

# what a group of cells has in common: all but the seed
_GROUP: tuple[str, ...] = (
    "variant", "rule", "eidetic_tokens", "task", "fillers", "pairs", "tokens", "vocabulary", "width", "learning_rate",
    "steps",
)  # fmt: skip
_MEANS = ("block_hit", "long_accuracy", "long_block_hit", "seconds")
SUMMARY_COLUMNS: tuple[str, ...] = (
    *_GROUP, "memory_bytes", "seeds", "accuracy", "lowest", "highest", "block_hit", "long_tokens", "long_accuracy",
    "long_block_hit", "seconds",
)  # fmt: skip


def summarise(rows: Sequence[Row]) -> list[Row]:
    """One row a group of cells that differ by the seed: mean, lowest and highest accuracy, means of the rest.

    Of several learning rates of one model the best mean is what counts, so groups are sorted by it within a model.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in _GROUP), []).append(row)
    out: list[Row] = []
    for group, members in groups.items():
        accuracy = [float(row["accuracy"]) for row in members]
        summary = dict(zip(_GROUP, group, strict=True)) | {
            "memory_bytes": members[0]["memory_bytes"],
            "long_tokens": members[0]["long_tokens"],
            "seeds": str(len(members)),
            "accuracy": f"{fmean(accuracy):.3f}",
            "lowest": f"{min(accuracy):.3f}",
            "highest": f"{max(accuracy):.3f}",
        }
        for name in _MEANS:
            values = [v for row in members if not math.isnan(v := float(row[name]))]
            summary[name] = f"{fmean(values):.3f}" if values else ""
        out.append(summary)
    return sorted(out, key=lambda row: (row["task"], row["fillers"], int(row["pairs"]), -float(row["accuracy"])))


def write_summary(summary: Sequence[Row], path: Path) -> None:
    """The table as a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, SUMMARY_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(summary)


def draw_plots(summary: Sequence[Row], folder: Path, grid: str) -> list[Path]:
    """Accuracy of each model, and accuracy over eidetic slots, with bars from the lowest to the highest seed.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    find_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    plain = [row for row in summary if row["task"] == "mqar" and row["fillers"] == "zero"]
    return [
        _draw_models(plain, folder / f"{grid}_models.png"),
        _draw_slots(plain, folder / f"{grid}_slots.png"),
    ]


def find_matplotlib() -> None:
    """Import matplotlib, to draw into files.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        matplotlib: Any = import_module("matplotlib")
    except ImportError as error:
        raise ConfigError('plots need matplotlib; install it with: pip install "memtier[plots]"') from error
    # no screen is needed, nor asked for
    matplotlib.use("Agg")


def _draw_models(rows: Sequence[Row], path: Path) -> Path:
    pyplot: Any = import_module("matplotlib.pyplot")
    figure, axis = pyplot.subplots(figsize=(7.0, 0.35 * len(rows) + 1.2))
    names = [_name(row) for row in rows]
    means = [float(row["accuracy"]) for row in rows]
    axis.barh(range(len(rows)), means, xerr=_spread(rows), color="tab:blue", ecolor="black", capsize=2)
    axis.set_yticks(range(len(rows)), names)
    axis.invert_yaxis()
    axis.set_xlim(0.0, 1.02)
    axis.set_xlabel("recall accuracy (bars: lowest to highest seed)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _name(row: Row) -> str:
    rule = "" if row["rule"] == "innovation" else f", {row['rule']}"
    slots = f", M {row['eidetic_tokens']}{rule}" if row["variant"] in ("bmojo", "bmojo_span") else ""
    return f"{row['variant']} ({int(row['memory_bytes']) / 1000:.0f} kB{slots})"


def _draw_slots(rows: Sequence[Row], path: Path) -> Path:
    pyplot: Any = import_module("matplotlib.pyplot")
    figure, axis = pyplot.subplots(figsize=(5.5, 3.6))
    lines = sorted({(row["rule"], row["pairs"]) for row in rows if row["variant"] == "bmojo"})
    for rule, pairs in lines:
        chosen = [row for row in rows if (row["variant"], row["rule"], row["pairs"]) == ("bmojo", rule, pairs)]
        chosen.sort(key=lambda row: int(row["eidetic_tokens"]))
        slots = [int(row["eidetic_tokens"]) for row in chosen]
        means = [float(row["accuracy"]) for row in chosen]
        axis.errorbar(slots, means, yerr=_spread(chosen), marker="o", capsize=2, label=f"{rule}, {pairs} pairs")
    axis.set_xscale("log", base=2)
    axis.set_ylim(0.0, 1.02)
    axis.set_xlabel("eidetic slots M")
    axis.set_ylabel("recall accuracy")
    if lines:
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _spread(rows: Sequence[Row]) -> list[list[float]]:
    means = [float(row["accuracy"]) for row in rows]
    return [
        [max(0.0, mean - float(row["lowest"])) for row, mean in zip(rows, means, strict=True)],
        [max(0.0, float(row["highest"]) - mean) for row, mean in zip(rows, means, strict=True)],
    ]
