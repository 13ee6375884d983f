"""A CSV file with a row for each record of one kind: the loss curve of a run."""

from __future__ import annotations

import csv
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

__all__ = ["append_record"]


def append_record(path: Path, record: Any, *, digits: int = 6) -> None:
    """Add a dataclass record as a row; the head is written first. Floats keep `digits` digits."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow([f.name for f in fields(record)])
        writer.writerow([f"{v:.{digits}g}" if isinstance(v, float) else v for v in asdict(record).values()])
