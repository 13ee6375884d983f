"""How a run trains: `FitSettings`; and in which precision any recipe runs the forward pass."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from memtier.errors import ConfigError

__all__ = ["FitSettings", "Precision", "autocast", "check_precision"]

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How to train.

    Args:
        steps: updates; the learning rate is planned for so many.
        learning_rate: at its peak: linear up over `warmup_share` of the steps, then a cosine to zero.
        weight_decay: of matrices; vectors (norms, biases, decays of the recurrence) have none.
        piece_tokens: tokens of a piece of truncated back-propagation; None: sequences are read whole.
        precision: of the forward pass: "bfloat16" by autocast, "float32" in the weights' own dtype, "auto" is bfloat16
            on a GPU and float32 elsewhere.
        gradient_checkpointing: keep what passes between layers only, and compute the rest again in the backward pass.
        log_every_steps: steps a row of the log; checkpoints are written at rows.

    Raises:
        ConfigError: a value out of range.
    """

    steps: int = 1000
    learning_rate: float = 2e-3
    warmup_share: float = 0.1
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    piece_tokens: int | None = None
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    log_every_steps: int = 10
    checkpoint_every_seconds: float = 120.0

    def __post_init__(self) -> None:
        for name in ("steps", "log_every_steps", "piece_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1.")
        if not 0.0 <= self.warmup_share < 1.0:
            raise ConfigError(f"warmup_share is {self.warmup_share}; it must be 0 or more, and below 1.")
        check_precision(self.precision)

    def rate(self, step: int) -> float:
        """Learning rate of one step."""
        progress, warm = step / self.steps, self.warmup_share
        if progress < warm:
            return self.learning_rate * min(1.0, (step + 1) / (warm * self.steps))
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (progress - warm) / (1.0 - warm)))

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Around a forward pass on that device."""
        return autocast(self.precision, device)


def check_precision(precision: str) -> None:
    """Raise a ConfigError that names what may be chosen."""
    if precision not in get_args(Precision):
        raise ConfigError(f"precision is {precision!r}; use 'auto', 'float32' or 'bfloat16'.")


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Around a forward pass of that precision on that device."""
    wanted = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else nullcontext()
