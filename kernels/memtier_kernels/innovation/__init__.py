"""Innovation (how badly the fading memory predicted a token) and the running choice of the most surprising tokens."""

from __future__ import annotations

import torch

from memtier_kernels.dispatch import Impl, choose
from memtier_kernels.innovation import custom_op, reference

__all__ = ["innovation", "keep_surprising"]

# the kernel compares each candidate with each other
_MOST_CANDIDATES = 131_072


def innovation(h: torch.Tensor, predicted: torch.Tensor, *, impl: Impl = "auto") -> torch.Tensor:
    """``e_t = ||h_t - predicted_t||^2 / (||h_t||^2 + eps)``.

    Args:
        h: (B, T, E), what the layer reads.
        predicted: (B, T, E), its prediction from the fading memory before the token.

    Returns:
        (B, T) float32 (float64 stays float64).
    """
    run = choose("innovation", impl, h, reference=reference.innovation, triton=custom_op.innovation)
    return run(h, predicted)


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
    n = innovation.shape[1]
    run = choose(
        "keep_surprising", impl, innovation, reference=reference.keep_surprising, triton=custom_op.keep_surprising,
        limit=f"{n} candidates are over {_MOST_CANDIDATES}" if n > _MOST_CANDIDATES else None,
    )  # fmt: skip
    return run(innovation, positions, before, m)
