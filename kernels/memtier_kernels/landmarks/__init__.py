"""Landmarks of blocks, and the choice of a span by them."""

from __future__ import annotations

import torch

from memtier_kernels.dispatch import Impl, choose
from memtier_kernels.landmarks import custom_op, reference
from memtier_kernels.landmarks.reference import late_interaction

__all__ = ["landmarks", "late_interaction", "select_blocks"]

# the kernel keeps the best of every row in registers
_MOST_BLOCKS = 64


def landmarks(keys: torch.Tensor, *, impl: Impl = "auto") -> torch.Tensor:
    """One vector a block: the mean of its keys, KV heads concatenated.

    Args:
        keys: (B, n, S, G, D), before rotary embedding.

    Returns:
        (B, n, G * D) float32 (float64 stays float64).
    """
    return choose("landmarks", impl, keys, reference=reference.landmarks, triton=custom_op.landmarks)(keys)


def select_blocks(
    queries: torch.Tensor, landmarks: torch.Tensor, visible: torch.Tensor, k: int, *, impl: Impl = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k blocks of highest score a query, among those it may see; ties go to the newer block.

    With one landmark a block the score is the inner product. With several each head chooses for itself, by
    ``max_j q_h . l_j``, its best landmark of a block (the late interaction of Khattab and Zaharia 2020, head by head).

    Args:
        queries: (B, R, C), or (B, R, H, D).
        landmarks: (B, n, C), or (B, n, m, G, D), where G divides H.
        visible: (R,) int64: query i may choose among blocks [0, visible_i).
        k: blocks a query, at least 1.

    Returns:
        ids (B, R, k), or (B, R, H, k), int64, ascending, -1 at the end where fewer are visible; scores of that shape,
        float32 (float64 stays float64), -inf there. No gradient flows through the choice.
    """
    run = choose(
        "select_blocks", impl, queries, reference=reference.select_blocks, triton=custom_op.select_blocks,
        limit=f"k {k} is over {_MOST_BLOCKS}" if k > _MOST_BLOCKS else None,
    )  # fmt: skip
    return run(queries.detach(), landmarks.detach(), visible, k)
