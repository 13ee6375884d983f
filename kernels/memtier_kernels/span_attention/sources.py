"""The two shapes a memory can have in front of attention, and the merge of partial results.

B batch, T tokens, H query heads, G key/value heads, D head size, S tokens a block, K blocks a table row, R table rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["SOURCES", "Band", "Paged", "merge"]

# in the order in which they are read
SOURCES = ("sinks", "span", "eidetic", "fading", "window")


@dataclass(frozen=True)
class Band:
    """Keys in a row; query t sees those with index in [start_t, end_t).

    k, v: (B, n, G, D).   start, end: int64, both non-decreasing along T: (T,) where all rows of the batch stand at the
    same place, (B, T) where each stands at its own.
    """

    k: torch.Tensor
    v: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor


@dataclass(frozen=True)
class Paged:
    """Keys in a pool of blocks; a group of queries sees the blocks its row of the table names.

    k, v: (B, n, S, G, D); a pool that the rows of the batch share comes as ``pool.expand(B, ...)``.
    table: (B, R, K) int64, -1 for none; with R = 1 the row serves every query.
    mask: (B, R, K, S) bool, False hides one token of a listed block; None hides nothing.
    cos, sin: (K * S, D), a rotary embedding by place in the row, applied after the gather; None for no rotation.
    """

    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    mask: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None


def merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax from partial ones: ``o = sum_s o_s exp(l_s - l)``, ``l = log sum_s exp(l_s)``.

    Args:
        parts: (o_s (..., D), l_s (...)) of each source; l_s = -inf where a row sees nothing there.

    Returns:
        o (..., D), zero where no source sees anything, and l (...), -inf there.
    """
    if len(parts) == 1:
        return parts[0]
    logs = torch.stack([lse for _, lse in parts])
    top = logs.amax(dim=0)
    shift = torch.where(top.isfinite(), top, 0.0)
    weights = (logs - shift).exp()
    total = weights.sum(dim=0)
    empty = total == 0
    shares = weights / torch.where(empty, 1.0, total)
    out = sum(share[..., None].to(o.dtype) * o for (o, _), share in zip(parts, shares.unbind(0), strict=True))
    assert isinstance(out, torch.Tensor)
    lse = shift + torch.where(empty, 1.0, total).log()
    return out, lse.masked_fill(empty, float("-inf"))
