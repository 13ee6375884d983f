"""What the recipes share around a run: the device, the progress bar, the record of what was done."""

from __future__ import annotations

import ast
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from memtier.errors import ConfigError
from memtier.training.fit import FitRow
from memtier.training.progress import TrainingProgress

__all__ = ["RECORD_NAME", "parse_pairs", "progress_bar", "resolve_device", "write_record"]

RECORD_NAME = "training.json"


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA if present.

    Raises:
        ConfigError: torch knows no such device, or cannot use it here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}; 'auto', 'cpu' or 'cuda' were expected.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r}, and this machine has no CUDA device. Use 'auto' or 'cpu'.")
    return device


def parse_pairs(texts: list[str]) -> dict[str, Any]:
    """NAME=VALUE with a Python literal as value; anything else is a string.

    Raises:
        ConfigError: a text without "=".
    """
    pairs: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r} is not NAME=VALUE, such as hidden_size=256.")
        try:
            pairs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pairs[name] = value
    return pairs


@contextmanager
def progress_bar(shown: bool, steps: int) -> Iterator[Callable[[FitRow], None] | None]:
    """What `fit` calls with each row of the log; None if nothing is to be shown. Needs rich."""
    if not shown:
        yield None
        return
    with TrainingProgress() as bar:

        def tell(row: FitRow) -> None:
            span = f"  span {row.span_blocks} a {row.span_refresh_tokens}" if row.span_blocks else ""
            bar.tell(
                row.step / steps,
                f"step {row.step} of {steps}  loss {row.loss:.3f}{span}  {row.tokens_per_second:,.0f} tokens/s",
            )

        yield tell


def write_record(folder: Path, recipe: str, report: Any, **parts: Any) -> None:
    """Write training.json: the report, the parts, and the versions of what ran.

    Args:
        report: a dataclass record with a field `folder`.
        parts: anything that survives JSON; paths as text.
    """
    record = {
        "recipe": recipe,
        "report": asdict(report) | {"folder": folder.name},
        **parts,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (folder / RECORD_NAME).write_text(json.dumps(record, indent=2, default=str) + "\n")
