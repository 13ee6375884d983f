"""Rotary position embedding (Su et al. 2021) at positions the caller gives, in the half-split layout."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["RotaryTable", "Turn", "apply_rotary", "rotary_table", "turn", "turn_of"]

RotaryTable = Callable[[torch.Tensor, torch.dtype], tuple[torch.Tensor, torch.Tensor]]
"""(positions (...,), dtype) -> cosines and sines, two (..., D)."""

Turn = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines (..., 1, D) as `turn` multiplies with them: the same for all heads, the first half of the sines
negative."""


def rotary_table(
    positions: torch.Tensor, dtype: torch.dtype, *, size: int, theta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for positions (...,): two (..., size) tensors. Angles are float64: small and few, so always
    exact."""
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size)
    angle = positions.to(torch.float64)[..., None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (..., heads, size) by tables (..., size)."""
    return turn(x, turn_of(cos, sin))


def turn_of(cos: torch.Tensor, sin: torch.Tensor) -> Turn:
    """Tables (..., size), ready for several tensors."""
    first, second = sin.chunk(2, dim=-1)
    return cos[..., None, :], torch.cat([-first, second], dim=-1)[..., None, :]


def turn(x: torch.Tensor, by: Turn) -> torch.Tensor:
    """Rotate x (..., heads, size)."""
    cos, sin = (t.to(x.dtype) for t in by)
    # two tensors of the size of x are made here, and no more
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin)
