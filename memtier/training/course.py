"""What a run is trained on: lessons, each a batch of sequences and how it is read.

A lesson is a function of the course and the step alone, so a resumed run reads what it would have read.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from memtier.blocks import MemorySettings
from memtier.errors import ConfigError

__all__ = ["Course", "Lesson", "SpanDraw"]


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """One step.

    Args:
        tokens: (B, T) int64.
        targets: (B, T) int64: what must follow each token; `objective.NO_TARGET` where nothing is asked.
        memory: the sizes to read under.
        dense: far attention sees every sealed token, and landmarks are taught.
    """

    tokens: np.ndarray
    targets: np.ndarray
    memory: MemorySettings
    dense: bool = False


class Course(Protocol):
    """A sequence of lessons."""

    @property
    def identity(self) -> dict[str, Any]:
        """What this course is, its seed included, as JSON: a run resumes on an equal one only."""
        ...

    def lesson(self, step: int) -> Lesson:
        """The lesson of one step."""
        ...


@dataclass(frozen=True, slots=True)
class SpanDraw:
    """Sizes of the expansion span, drawn anew for each step, so that a model reads under any of them.

    Args:
        refresh_tokens: values of r to draw from; () for the model's own.
        blocks: values of K to draw from; () for the model's own.
    """

    refresh_tokens: tuple[int, ...] = ()
    blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(r < 1 for r in self.refresh_tokens):
            raise ConfigError(f"span_refresh_tokens is drawn from {self.refresh_tokens}; each must be at least 1.")
        if any(k < 0 for k in self.blocks):
            raise ConfigError(f"span_blocks is drawn from {self.blocks}; each must be 0 (no span) or more.")

    def draw(self, memory: MemorySettings, seed: int, step: int) -> MemorySettings:
        """The sizes of one step."""
        rng = random.Random(f"{seed}/{step}/span")
        refresh = rng.choice(self.refresh_tokens) if self.refresh_tokens else memory.span_refresh_tokens
        blocks = rng.choice(self.blocks) if self.blocks else memory.span_blocks
        return replace(memory, span_refresh_tokens=refresh, span_blocks=blocks)
