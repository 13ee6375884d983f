"""What a block is found by, and what it is looked for with.

Two kinds, by `landmark_keys`:

    0   the landmark of a block is the mean of its keys, the query of a boundary b the mean over the tokens b-r+1 .. b,
        summed per KV head: one inner product a block.
    m   a block keeps m of its own keys as they are, the most salient ones; the query is that of token b, head by head,
        and each head looks for its best landmark. So a block is found by a single token, which a mean would bury, and
        by a single head, which a sum over heads would drown (`settle`).

Two variations of the first kind, to compare (`landmark_kind`, `query_kind`):

    bounds  the landmark is the largest and the smallest value of each channel, the score the most that any key between
            them could reach (Tang et al. 2024, "Quest"): an inner product with the query's positive and negative parts
    max     a block's score is the best that any single one of the r queries gives it

A span that nothing asks for is better spent on the blocks just behind the window: `extend_window`.

Salience is the norm of a token's key, times the fourth root of its innovation where the layer has one: what a head can
attend to strongly, and what the fading memory could not foresee. Shape letters: `memtier.blocks`.
"""

from __future__ import annotations

import math

import torch

from memtier.blocks import MemorySettings
from memtier.layers.plan import StepPlan
from memtier_kernels import landmarks, select_blocks

__all__ = [
    "best_of_queries",
    "block_landmarks",
    "boundary_queries",
    "candidates",
    "choose_blocks",
    "extend_window",
    "queries_a_boundary",
    "recent_blocks",
    "search_queries",
    "settle",
]


def block_landmarks(
    keys: torch.Tensor, innovation: torch.Tensor | None, count: int, kind: str = "mean"
) -> torch.Tensor:
    """Landmarks of blocks, in the dtype of the keys (float32 at least).

    Args:
        keys: (B, n, S, G, D), before rotary embedding.
        innovation: (B, n, S), or None.
        count: m; 0 for one vector of the whole block.
        kind: of that vector.

    Returns:
        (B, n, C) for the mean, (B, n, 2C) for bounds, (B, n, m, G, D) for keys, in the order of their tokens.
    """
    if not count and kind == "bounds":
        return torch.cat([keys.amax(2).flatten(2), keys.amin(2).flatten(2)], dim=-1)
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
    """The queries of each new boundary: (B, R_new, C) or (B, R_new, H, D); of r queries a boundary, one after another.

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
    picked = padded[:, index]
    picked = picked.mean(dim=2) if queries_a_boundary(plan.settings) == 1 else picked.flatten(1, 2)
    if plan.settings.landmark_kind == "bounds":
        return torch.cat([picked.clamp(min=0.0), picked.clamp(max=0.0)], dim=-1)
    return picked


def queries_a_boundary(settings: MemorySettings) -> int:
    """1, or r where each of the last r tokens asks for itself."""
    return settings.span_refresh_tokens if settings.query_kind == "max" else 1


def choose_blocks(
    queries: torch.Tensor, marks: torch.Tensor, visible: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best blocks of every query, from all landmarks at once; see `candidates` and `settle`."""
    return settle(queries, *candidates(queries, marks, visible, k), k)


def candidates(
    queries: torch.Tensor, marks: torch.Tensor, visible: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What may be among the k best blocks. The best of parts of the landmarks are the best of all of them.

    Args:
        queries: (B, R, C), or (B, R, H, D).
        marks: (B, n, C), or (B, n, m, G, D).
        visible: (R,) int64: query i may choose among blocks [0, visible_i).

    Returns:
        ids and scores as of `select_blocks`: the k best of each query, (B, R, k); with several keys a block the 2k best
        of each head (at most 64, at least k) by its best key, (B, R, H, 2k).
    """
    return select_blocks(queries, marks, visible, k if queries.dim() == 3 else max(k, min(2 * k, 64)))


def settle(queries: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best blocks of `candidates`: ids and scores (B, R, k).

    With several keys a block the heads must be compared. A head that looks for one certain block has one score far
    above its others; one that looks for nothing scores all alike. So a block counts by its share in the softmax of a
    head's candidates, in the head that gives it most; its score is the logarithm of that.
    """
    if queries.dim() == 3:
        return ids, scores
    scores = scores * queries.shape[-1] ** -0.5
    total = scores.logsumexp(-1, keepdim=True)
    shares = torch.where(total == float("-inf"), scores, scores - total)
    return best_of_queries(ids.flatten(1, 2), shares.flatten(1, 2), queries.shape[2], k)


def recent_blocks(visible: torch.Tensor, k: int, oldest: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The k newest blocks a boundary, none before `oldest`: ids and scores (1, R, k), as of `SpanSelector.select`."""
    first = (visible - k).clamp(min=oldest)[:, None]
    ids = first + torch.arange(k, device=visible.device)
    there = ids < visible[:, None]
    scores = torch.where(there, 0.0, float("-inf")).to(torch.float32)
    return torch.where(there, ids, -1)[None], scores[None]


def extend_window(
    ids: torch.Tensor, scores: torch.Tensor, visible: torch.Tensor, share: float, *, oldest: int = 0, rows: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """A choice in which the newest blocks count as if a head gave each of them `share`.

    So they take the places that no head wants with more: among many thousands of blocks some fit a query that looks for
    nothing, and a model reads them at the cost of what stands just behind its window.

    Args:
        ids, scores: (B, R, k) of `settle`, the scores logarithms of shares.
        visible: (R,) int64: query i may choose among blocks [oldest, visible_i).
        share: 0 changes nothing.
        rows: sequences whose blocks are numbered one after another, the own one last; `visible` counts the own blocks.
    """
    if not share:
        return ids, scores
    newest, _ = recent_blocks(visible, ids.shape[-1], oldest)
    newest = torch.where(newest < 0, newest, newest * rows + rows - 1).expand_as(ids)
    floor = torch.where(newest < 0, float("-inf"), math.log(share)).to(scores.dtype)
    both_ids, both_scores = torch.stack([ids, newest], 2), torch.stack([scores, floor], 2)
    return best_of_queries(both_ids.flatten(1, 2), both_scores.flatten(1, 2), 2, ids.shape[-1])


def best_of_queries(ids: torch.Tensor, scores: torch.Tensor, queries: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k blocks of highest score by any query, from the k best of each; ties to the newer block.

    Args:
        ids, scores: (B, R * queries, k), as `select_blocks` returns them.

    Returns:
        ids and scores (B, R, k), likewise.
    """
    if queries == 1:
        return ids, scores
    ids, scores = (x.unflatten(1, (-1, queries)).flatten(2) for x in (ids, scores))
    for key in (ids, None):
        order = (scores if key is None else key).argsort(dim=-1, descending=True, stable=True)
        ids, scores = ids.gather(-1, order), scores.gather(-1, order)
    # of one block chosen by several queries the first, which scores highest, counts
    earlier = torch.ones(ids.shape[-1], ids.shape[-1], dtype=torch.bool, device=ids.device).tril(-1)
    again = ((ids[..., :, None] == ids[..., None, :]) & earlier).any(-1)
    scores = scores.masked_fill(again, float("-inf"))
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    ids, scores = ids.gather(-1, order), scores.gather(-1, order)
    ids = ids.masked_fill(scores == float("-inf"), -1)
    order = torch.where(ids < 0, torch.iinfo(torch.int64).max, ids).argsort(dim=-1)
    return ids.gather(-1, order), scores.gather(-1, order)
