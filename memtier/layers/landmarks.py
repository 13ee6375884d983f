"""What a block is found by, and what it is looked for with.

Two kinds, by `landmark_keys`:

    0   the landmark of a block is the mean of its keys, the query of a boundary b the mean over the tokens b-r+1 .. b,
        summed per KV head: one inner product a block.
    m   a block keeps m of its own keys as they are, the most salient ones; the query is that of token b, head by head,
        and each head looks for its best landmark. So a block is found by a single token, which a mean would bury.

Salience is the norm of a token's key, times the fourth root of its innovation where the layer has one: what a head can
attend to strongly, and what the fading memory could not foresee. Shape letters: `memtier.blocks`.
"""

from __future__ import annotations

import torch

from memtier.layers.plan import StepPlan
from memtier_kernels import landmarks

__all__ = ["block_landmarks", "boundary_queries", "search_queries"]


def block_landmarks(keys: torch.Tensor, innovation: torch.Tensor | None, count: int) -> torch.Tensor:
    """Landmarks of blocks, in the dtype of the keys (float32 at least).

    Args:
        keys: (B, n, S, G, D), before rotary embedding.
        innovation: (B, n, S), or None.
        count: m; 0 for the mean.

    Returns:
        (B, n, C) for the mean, (B, n, m, G, D) for keys, in the order of their tokens.
    """
    if not count:
        return landmarks(keys)
    salience = keys.detach().flatten(3).norm(dim=-1)
    if innovation is not None:
        salience = salience * innovation.to(salience.dtype).clamp(min=0.0).sqrt().sqrt()
    chosen = salience.topk(count, dim=-1).indices.sort(-1).values
    return keys.gather(2, chosen[..., None, None].expand(-1, -1, -1, *keys.shape[3:]))


def search_queries(q: torch.Tensor, kv_heads: int, count: int) -> torch.Tensor:
    """What every token would look for: (B, T, H, D) for keys; (B, T, C), summed per KV head, for the mean.

    Float32 (float64 stays).

    Args:
        q: (B, T, H, D), before rotary embedding.
    """
    q = q if q.dtype == torch.float64 else q.float()
    return q if count else q.unflatten(2, (kv_heads, -1)).sum(3).flatten(2)


def boundary_queries(plan: StepPlan, queries: torch.Tensor, tail: torch.Tensor | None) -> torch.Tensor:
    """One query a new boundary: (B, R_new, C) or (B, R_new, H, D).

    Args:
        queries: of `search_queries`.
        tail: (B, r - 1, C), those before the step, if the landmark is the mean; None for zeros.
    """
    last = plan.boundary_row[plan.new] - plan.start
    if plan.settings.landmark_keys:
        return queries[:, last]
    stride = plan.settings.span_refresh_tokens
    if tail is None:
        tail = queries.new_zeros(queries.shape[0], stride - 1, queries.shape[2])
    padded = torch.cat([tail, queries], dim=1)
    index = last[:, None] + torch.arange(stride, device=queries.device)
    return padded[:, index].mean(dim=2)
