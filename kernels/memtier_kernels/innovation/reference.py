"""Plain torch: one stable sort serves every row."""

from __future__ import annotations

import torch

from memtier_kernels.dispatch import compact_indices, compute_dtype

__all__ = ["EPSILON", "innovation", "keep_surprising"]

EPSILON = 1e-6


def innovation(h: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """See `memtier_kernels.innovation`."""
    full = compute_dtype(h.dtype)
    h, predicted = h.to(full), predicted.to(full)
    return (h - predicted).square().sum(-1) / (h.square().sum(-1) + EPSILON)


def keep_surprising(innovation: torch.Tensor, positions: torch.Tensor, before: torch.Tensor, m: int) -> torch.Tensor:
    """See `memtier_kernels.keep_surprising`."""
    order = innovation.sort(dim=-1, descending=True, stable=True).indices
    sorted_positions = positions.gather(-1, order)[:, None]
    eligible = (sorted_positions >= 0) & (sorted_positions < before.to(positions.device)[:, None])
    kept = eligible & (eligible.to(torch.int64).cumsum(-1) <= m)
    # back to the order of the candidates, which is by age
    in_place = torch.zeros_like(kept).scatter_(-1, order[:, None].expand_as(kept), kept)
    return compact_indices(in_place, m)
