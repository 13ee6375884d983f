"""Plain torch: all scores at once, exact top-k with a stated order of ties."""

from __future__ import annotations

import functools

import torch

from memtier_kernels.dispatch import compact_indices, compute_dtype

__all__ = ["best_blocks", "landmarks", "late_interaction", "select_blocks"]

_PIECE_BLOCKS = 1024


def landmarks(keys: torch.Tensor) -> torch.Tensor:
    """See `memtier_kernels.landmarks`."""
    return keys.to(compute_dtype(keys.dtype)).mean(dim=2).flatten(2)


def select_blocks(
    queries: torch.Tensor, landmarks: torch.Tensor, visible: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `memtier_kernels.select_blocks`."""
    full = compute_dtype(queries.dtype)
    queries, landmarks = queries.to(full), landmarks.to(full)
    if queries.dim() == 3:
        return best_blocks(queries @ landmarks.transpose(1, 2), visible, k)
    scores = _best_keys(queries, landmarks)
    groups, each = scores.shape[1], queries.shape[2] // scores.shape[1]
    rows = visible.repeat_interleave(each).repeat(groups)
    ids, best = (x.unflatten(1, (groups, -1, each)) for x in best_blocks(scores.flatten(1, 2), rows, k))
    return ids.transpose(1, 2).flatten(2, 3), best.transpose(1, 2).flatten(2, 3)


def late_interaction(queries: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
    """(B, R, H, n): ``max_j q_h . l_{b,j,g(h)}`` of queries (B, R, H, D) and landmarks (B, n, m, G, D)."""
    each = queries.shape[2] // landmarks.shape[3]
    return _best_keys(queries, landmarks).unflatten(2, (-1, each)).transpose(1, 2).flatten(2, 3)


def _best_keys(queries: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
    """As `late_interaction`, in the order (B, G, R * H / G, n)."""
    groups = landmarks.shape[3]
    q = queries.unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3)
    scores = []
    # in pieces that stay in the cache of a core: the products with single landmarks are far more than the scores
    for piece in landmarks.split(_PIECE_BLOCKS, dim=1) if landmarks.shape[1] else (landmarks,):
        products = (q @ one.permute(0, 2, 3, 1) for one in piece.unbind(2))
        scores.append(functools.reduce(torch.maximum, products))
    return torch.cat(scores, dim=-1)


def best_blocks(scores: torch.Tensor, visible: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of scores (B, R, n) a row, as `memtier_kernels.select_blocks` returns them. Changes `scores`."""
    batch, rows, n = scores.shape
    if n == 0:
        none = torch.full((batch, rows, k), -1, dtype=torch.int64, device=scores.device)
        return none, torch.full((batch, rows, k), float("-inf"), dtype=scores.dtype, device=scores.device)
    visible = visible.to(scores.device)[:, None]
    # a compiler cannot follow a branch on data, nor may a device wait for one
    eager = scores.device.type == "cpu" and not torch.compiler.is_compiling()
    # what every row sees needs no mask, and that is nearly all of a long stream
    all_see = min(n, max(0, int(visible.min()))) if eager and rows else 0
    hidden = torch.arange(all_see, n, device=scores.device) >= visible
    scores[..., all_see:].masked_fill_(hidden, float("-inf"))
    best, ids = scores.topk(min(k + 1, n), dim=-1)
    # masks over all n cost twenty times topk
    if eager and n > k > 0 and not _ties(best[..., k - 1 :]):
        return _ascending(ids[..., :k], best[..., :k])
    threshold = best[..., min(k, n) - 1 : min(k, n)]
    above = scores > threshold
    level = (scores == threshold) & (torch.arange(n, device=scores.device) < visible)
    # of the blocks that tie at the threshold the newest fill what is left
    from_newest = level.flip(-1).to(torch.int64).cumsum(-1).flip(-1)
    chosen = above | (level & (from_newest <= k - above.sum(-1, keepdim=True)))
    ids = compact_indices(chosen, k)
    picked = scores.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, float("-inf"))
    return ids, picked


def _ties(last_and_next: torch.Tensor) -> bool:
    """Whether any row's k-th score equals the next one: then topk does not say which of them it took."""
    last, following = last_and_next.unbind(-1)
    return bool(((last == following) & (last > float("-inf"))).any())


def _ascending(ids: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In the order of ids; -1, last, where the score is -inf."""
    nothing = scores == float("-inf")
    ids, order = ids.masked_fill(nothing, torch.iinfo(ids.dtype).max).sort(dim=-1)
    scores = scores.gather(-1, order)
    return ids.masked_fill(scores == float("-inf"), -1), scores
