"""Rotary position embedding (Su et al. 2021) at positions the caller gives, in the half-split layout."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["RotaryTable", "apply_rotary", "rotary_table"]

RotaryTable = Callable[[torch.Tensor, torch.dtype], tuple[torch.Tensor, torch.Tensor]]
"""(positions (...,), dtype) -> cosines and sines, two (..., D)."""


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
    left, right = x.chunk(2, dim=-1)
    turned = torch.cat([-right, left], dim=-1)
    return x * cos[..., None, :].to(x.dtype) + turned * sin[..., None, :].to(x.dtype)
