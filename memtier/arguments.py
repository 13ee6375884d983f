"""Arguments that calls have in common, checked before anything is done: a wrong one is the caller's, and a ConfigError.

Numbers of any library are taken, and given back as Python's own: numpy's, for one, are no values for the journal.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable
from inspect import iscoroutinefunction
from numbers import Real
from pathlib import Path
from typing import Any, SupportsIndex

from memtier.errors import ConfigError

__all__ = ["check_progress", "file_path", "real_number", "whole_number"]


def whole_number(
    name: str, value: SupportsIndex, fits: Callable[[int], bool] = lambda number: True, wanted: str = "a whole number"
) -> int:
    """`value`, if it is a whole number that fits.

    Raises:
        ConfigError: with `wanted`, what it must be.
    """
    try:
        # True is a number to Python, and to its callers a slip
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not fits(number):
        raise ConfigError(f"{name} is {value!r}; it must be {wanted}.")
    return number


def real_number(name: str, value: float, fits: Callable[[float], bool], wanted: str) -> float:
    """`value`, if it is a finite number that fits.

    Raises:
        ConfigError: with `wanted`, what it must be.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and fits(number)):
        raise ConfigError(f"{name} is {value!r}; it must be {wanted}.")
    return number


def file_path(path: str | Path) -> Path:
    """`path` as one. Raises ConfigError for what no file can be called."""
    if not isinstance(path, (str, os.PathLike)) or not str(path) or "\0" in str(path):
        raise ConfigError(f"the file is {path!r}; it must be the path of a file.")
    return Path(path)


def check_progress(on_progress: Any) -> None:
    """Refuse what cannot be called back after each step.

    Raises:
        ConfigError: no callable, or one that would have to be awaited.
    """
    if on_progress is None:
        return
    if not callable(on_progress):
        raise ConfigError(f"on_progress is {on_progress!r}; it must be a function of (tokens, total), or None.")
    if iscoroutinefunction(on_progress) or iscoroutinefunction(type(on_progress).__call__):
        raise ConfigError(
            f"on_progress is {on_progress!r}, which would have to be awaited; it must be a plain function of (tokens, "
            f"total). Let it set an event, or put what it is told into a stream."
        )
