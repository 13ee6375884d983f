"""Results that a benchmark keeps: rows of a CSV file, to which a later call adds what is missing."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import memtier_kernels
from memtier.errors import ConfigError

__all__ = ["Row", "holds", "read_rows", "results_folder", "write_rows"]

Row = dict[str, str]


def holds(row: Row, values: Row) -> bool:
    """Whether a row has all of these values."""
    return values.items() <= row.items()


def read_rows(path: Path) -> list[Row]:
    """What was measured so far; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(rows: Iterable[Row], columns: Sequence[str], path: Path) -> None:
    """Write the whole file anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def results_folder() -> Path:
    """docs/results of the checkout that the package is run from.

    Raises:
        ConfigError: it is installed, not checked out.
    """
    folder = Path(memtier_kernels.__file__).parents[2] / "docs" / "results"
    if not folder.exists():
        raise ConfigError("this is not a clone of the project, which keeps its own results; give a path by --out.")
    return folder
