"""Mamba-2's state space duality scan, continuing from a given state."""

from __future__ import annotations

import torch

from memtier_kernels.dispatch import Impl, choose
from memtier_kernels.ssd import reference

__all__ = ["ssd"]


def ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    *,
    D: torch.Tensor | None = None,
    state: torch.Tensor | None = None,
    chunk_tokens: int = 64,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T``, ``y_t = S_t C_t + D x_t`` (Dao and Gu 2024, Mamba-2).

    Args:
        x: (B, T, H, P) inputs; P is the head size of the scan.
        dt: (B, T, H) step sizes, after softplus.
        A: (H,) negative.
        B, C: (B, T, groups, N); groups divides H.
        D: (H,) skip, or None.
        state: (B, H, P, N), float32 (float64 for float64 inputs); None for zeros.
        chunk_tokens: tokens a chunk; the result does not depend on it beyond rounding.

    Returns:
        y (B, T, H, P) in x's dtype; the state after the last token, (B, H, P, N) in float32 (float64 for float64
        inputs); the total log decay ``sum_t dt_t A``, (B, H), same dtype as the state.
    """
    return choose("ssd", impl, x, reference=reference.ssd)(x, dt, A, B, C, D, state, chunk_tokens)
