"""Mamba-2's state space duality scan, continuing from a given state."""

from __future__ import annotations

import torch

from memtier.errors import ConfigError
from memtier_kernels.dispatch import Impl, choose
from memtier_kernels.ssd import custom_op, reference

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
    cu_seqlens: torch.Tensor | None = None,
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
        cu_seqlens: (n + 1,) int32 or int64, for n sequences packed one after another: B is 1, and sequence s has the
            tokens cu_seqlens[s] .. cu_seqlens[s + 1] - 1, maybe none; the first entry is 0 and the last is T. Then
            states are (n, H, P, N), one a sequence, and total log decays (n, H).
        chunk_tokens: tokens a chunk, at most (the kernel chooses its own); the result does not depend on it beyond
            rounding.

    Returns:
        y (B, T, H, P) in x's dtype; the state after the last token, (B, H, P, N) in float32 (float64 for float64
        inputs); the total log decay ``sum_t dt_t A``, (B, H), same dtype as the state.

    Raises:
        ConfigError: packed sequences in a batch of more than one.
    """
    if cu_seqlens is not None and x.shape[0] != 1:
        raise ConfigError(
            f"cu_seqlens was given with a batch of {x.shape[0]}; packed sequences lie one after another in a batch of "
            "1. Reshape x, dt, B and C, or leave cu_seqlens out."
        )
    head, size = x.shape[3], B.shape[3]
    limit = None
    if head > 128 or size > 256:
        limit = f"its kernel takes heads of up to 128 and states of up to 256, and got {head} and {size}"
    run = choose("ssd", impl, x, reference=reference.ssd, triton=custom_op.ssd, limit=limit)
    return run(x, dt, A, B, C, D, state, cu_seqlens, chunk_tokens)
