"""Plain torch: all scores at once, exact top-k with a stated order of ties."""

from __future__ import annotations

import torch

from memtier_kernels.dispatch import compact_indices, compute_dtype

__all__ = ["landmarks", "select_blocks"]


def landmarks(keys: torch.Tensor) -> torch.Tensor:
    """See `memtier_kernels.landmarks`."""
    return keys.to(compute_dtype(keys.dtype)).mean(dim=2).flatten(2)


def select_blocks(
    queries: torch.Tensor, landmarks: torch.Tensor, visible: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `memtier_kernels.select_blocks`."""
    batch, rows, _ = queries.shape
    n = landmarks.shape[1]
    if n == 0:
        none = torch.full((batch, rows, k), -1, dtype=torch.int64, device=queries.device)
        return none, torch.full((batch, rows, k), float("-inf"), dtype=queries.dtype, device=queries.device)
    scores = queries @ landmarks.transpose(1, 2)
    seen = torch.arange(n, device=queries.device) < visible.to(queries.device)[:, None]
    scores = scores.masked_fill(~seen, float("-inf"))
    threshold = scores.topk(min(k, n), dim=-1).values[..., -1:]
    above = scores > threshold
    level = (scores == threshold) & seen
    # of the blocks that tie at the threshold the newest fill what is left
    from_newest = level.flip(-1).to(torch.int64).cumsum(-1).flip(-1)
    chosen = above | (level & (from_newest <= k - above.sum(-1, keepdim=True)))
    ids = compact_indices(chosen, k)
    picked = scores.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, float("-inf"))
    return ids, picked
