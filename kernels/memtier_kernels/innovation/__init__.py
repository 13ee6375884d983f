"""Innovation (how badly the fading memory predicted a token) and the running choice of the most surprising tokens."""

from __future__ import annotations

import torch

from memtier_kernels.dispatch import Impl, choose
from memtier_kernels.innovation import reference

__all__ = ["innovation", "keep_surprising"]


def innovation(h: torch.Tensor, predicted: torch.Tensor, *, impl: Impl = "auto") -> torch.Tensor:
    """``e_t = ||h_t - predicted_t||^2 / (||h_t||^2 + eps)``.

    Args:
        h: (B, T, E), what the layer reads.
        predicted: (B, T, E), its prediction from the fading memory before the token.

    Returns:
        (B, T) float32 (float64 stays float64).
    """
    return choose("innovation", impl, h, reference=reference.innovation)(h, predicted)


def keep_surprising(
    innovation: torch.Tensor, positions: torch.Tensor, before: torch.Tensor, m: int, *, impl: Impl = "auto"
) -> torch.Tensor:
    """For each row, the m candidates of highest innovation among those at a position below ``before``.

    The rule is a static top-m, so choosing among the survivors of an earlier choice and the newcomers gives what
    choosing among all would; ties: the older stays.

    Args:
        innovation: (B, n), finite.
        positions: (B, n) int64, ascending among the valid ones; -1 marks an empty candidate.
        before: (R,) int64.
        m: tokens to keep, at least 1.

    Returns:
        (B, R, m) int64 indices of candidates, ascending, -1 at the end where there are fewer.
    """
    return choose("keep_surprising", impl, innovation, reference=reference.keep_surprising)(
        innovation, positions, before, m
    )
