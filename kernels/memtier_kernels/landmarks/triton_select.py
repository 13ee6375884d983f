"""The kernels of select_blocks: tiles of scores that live in registers only, and the k best of each row so far."""

# the types of Triton's reductions are wider than what they return in a kernel
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false
# pyright: reportArgumentType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from memtier_kernels.launch import dense, launch
from memtier_kernels.triton_tuning import config, tuned

__all__ = ["select_blocks"]

Tensor = torch.Tensor

# programs that keep a large GPU busy: few rows share the blocks among as many
_PROGRAMS = 264


def select_blocks(queries: Tensor, landmarks: Tensor, visible: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `memtier_kernels.select_blocks`."""
    queries, landmarks = dense(queries), dense(landmarks)
    batch, n, size = queries.shape[0], landmarks.shape[1], landmarks.shape[-1]
    device = queries.device
    late = queries.dim() == 4
    # the heads of a KV group are rows that share its landmarks
    groups, keys, heads = (landmarks.shape[3], landmarks.shape[2], queries.shape[2]) if late else (1, 1, 1)
    q_h, l_m, l_g = (queries.stride(2), landmarks.stride(2), landmarks.stride(3)) if late else (0, 0, 0)
    each = heads // groups
    rows = queries.shape[1] * each
    visible = visible.to(device, torch.int64).contiguous()
    ids = torch.empty(*queries.shape[:-1], k, dtype=torch.int64, device=device)
    scores = torch.empty(*queries.shape[:-1], k, dtype=torch.float32, device=device)
    tile_rows = 16 if rows <= 16 or k > 32 else 32 if late else 64
    tiles = triton.cdiv(rows, tile_rows)
    slots = max(2, triton.next_power_of_2(k))
    # no share of the blocks smaller than a few tiles
    shares = max(1, min(_PROGRAMS // max(1, batch * groups * tiles), triton.cdiv(n, 512)))
    best, best_ids = scores, ids
    if shares > 1:
        best = torch.empty(batch * groups * rows, shares, slots, dtype=torch.float32, device=device)
        best_ids = torch.empty(batch * groups * rows, shares, slots, dtype=torch.int64, device=device)
    wide = queries.dtype != landmarks.dtype or queries.dtype == torch.float32
    launch(
        _select, (tiles * shares, batch * groups), queries, landmarks, visible, best, best_ids, *queries.stride()[:2],
        q_h, *landmarks.stride()[:2], l_m, l_g, rows, n, size, groups, each, keys, shares, k,
        triton.next_power_of_2(rows), triton.next_power_of_2(n),
        LATE=late, WIDE=wide, SPLIT=shares > 1, SLOTS=slots, BLOCK_R=tile_rows,
        BLOCK_K=min(32 if wide else 64, max(16, triton.next_power_of_2(size))),
    )  # fmt: skip
    if shares > 1:
        launch(
            _merge, (batch * groups * rows,), best, best_ids, scores, ids, shares, k, SLOTS=slots,
            BLOCK=max(256, slots), num_warps=1 if slots <= 16 else 4,
        )  # fmt: skip
    return ids, scores


@triton.jit
def _take(scores, ids, best, best_ids):
    """The best of each row after a tile of `scores` (R, N), whose blocks are all older than those seen so far.

    A score enters if it is over the lowest of the best; out goes the lowest, and of equal ones the oldest.
    """
    low = tl.min(best, 1)
    high = tl.max(scores, 1)
    while tl.max((high > low).to(tl.int32), 0) > 0:
        enters = (high > low)[:, None]
        newest = tl.max(tl.where(scores == high[:, None], ids, -1), 1)
        oldest = tl.min(tl.where(best == low[:, None], best_ids, 2147483647), 1)
        leaves = enters & (best == low[:, None]) & (best_ids == oldest[:, None])
        best = tl.where(leaves, high[:, None], best)
        best_ids = tl.where(leaves, newest[:, None], best_ids)
        scores = tl.where(enters & (ids == newest[:, None]), float("-inf"), scores)
        low = tl.min(best, 1)
        high = tl.max(scores, 1)
    return best, best_ids


@triton.jit
def _empty(k, BLOCK_R: tl.constexpr, SLOTS: tl.constexpr):
    """Scores and ids of `k` slots that hold nothing, and of more that never will."""
    slot = tl.arange(0, SLOTS)[None, :]
    best = tl.zeros([BLOCK_R, SLOTS], tl.float32) + tl.where(slot < k, float("-inf"), float("inf"))
    return best, tl.zeros([BLOCK_R, SLOTS], tl.int32) - 1 - slot


@triton.jit
def _store(scores, ids, best, best_ids, at_R, exists_R, k, SLOTS: tl.constexpr):
    """The best of each row by age, the oldest first; behind them -1 and -inf."""
    slot = tl.arange(0, SLOTS)[None, :]
    # what holds nothing comes last, each with a number of its own
    key = tl.where((best_ids >= 0) & (slot < k), best_ids, 2147483647 - SLOTS + slot)
    for i in range(k):
        oldest = tl.min(key, 1)
        mine = key == oldest[:, None]
        score = tl.max(tl.where(mine, best, float("-inf")), 1)
        holds = oldest < 2147483647 - SLOTS
        tl.store(ids + at_R * k + i, tl.where(holds, oldest, -1).to(tl.int64), mask=exists_R)
        tl.store(scores + at_R * k + i, tl.where(holds, score, float("-inf")), mask=exists_R)
        key = tl.where(mine, 2147483647, key)


def _fits(candidate: triton.Config, given: dict[str, Any]) -> bool:
    """Registers: products of float32 take more, and so does a maximum beside the sum; more warps have more."""
    warps, columns = candidate.num_warps, candidate.kwargs["BLOCK_N"]
    if given["BLOCK_R"] == 16:
        return warps == 4 and columns == 128
    if given["LATE"]:
        return warps == 4 and columns == 64
    return warps == 8 and (columns == 64 or not given["WIDE"])


@tuned(
    [
        config(warps=4, stages=3, BLOCK_N=64),
        config(warps=4, stages=3, BLOCK_N=128),
        config(warps=4, stages=4, BLOCK_N=128),
        config(warps=8, stages=3, BLOCK_N=64),
        config(warps=8, stages=3, BLOCK_N=128),
    ],
    key=["row_class", "block_class", "size", "keys", "LATE", "WIDE", "SLOTS"],
    prune=_fits,
)
@triton.jit
def _select(
    queries, landmarks, visible, best_scores, best_blocks, q_b, q_r, q_h, l_b, l_n, l_m, l_g, rows, n, size, groups,
    each, keys, shares, k, row_class, block_class,
    LATE: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, SLOTS: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # late rows see most: begin with them
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    share = tile % shares
    b = (tl.program_id(1) // groups).to(tl.int64)
    group = (tl.program_id(1) % groups).to(tl.int64)
    row = (tile // shares).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    r, head = row // each, group * each + row % each
    sees = tl.minimum(tl.load(visible + r, mask=row < rows, other=0), n).to(tl.int32)[:, None]
    part = tl.arange(0, BLOCK_K)
    landmarks += b * l_b + group * l_g
    q_R = queries + (b * q_b + r * q_r + head * q_h)[:, None]
    parts = tl.cdiv(size, BLOCK_K)
    best, best_ids = _empty(k, BLOCK_R, SLOTS)

    # this program's share of what the tile's rows see, whole tiles, newest first
    seen = tl.max(tl.max(sees, 1), 0)
    length = tl.cdiv(tl.cdiv(seen, shares), BLOCK_N) * BLOCK_N
    begin = share * length
    tiles = tl.maximum(0, tl.cdiv(tl.minimum(begin + length, seen) - begin, BLOCK_N))
    for back in range(tiles):
        block = begin + (tiles - 1 - back) * BLOCK_N + tl.arange(0, BLOCK_N)
        l_N = landmarks + (block.to(tl.int64) * l_n)[None, :]
        scores = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
        if LATE:
            product = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
            for step in range(keys * parts):
                d = step % parts * BLOCK_K + part
                key = step // parts
                q = tl.load(q_R + d[None, :], mask=(row < rows)[:, None] & (d < size)[None, :], other=0.0)
                at = key.to(tl.int64) * l_m
                mark = tl.load(l_N + at + d[:, None], mask=(block < seen)[None, :] & (d < size)[:, None], other=0.0)
                if WIDE:
                    q, mark = q.to(tl.float32), mark.to(tl.float32)
                product = tl.dot(q, mark, tl.where(step % parts == 0, 0.0, product), input_precision="tf32x3")
                last = step % parts == parts - 1
                scores = tl.where(last & ((key == 0) | (product > scores)), product, scores)
        else:
            for step in range(parts):
                d = step * BLOCK_K + part
                q = tl.load(q_R + d[None, :], mask=(row < rows)[:, None] & (d < size)[None, :], other=0.0)
                mark = tl.load(l_N + d[:, None], mask=(block < seen)[None, :] & (d < size)[:, None], other=0.0)
                if WIDE:
                    q, mark = q.to(tl.float32), mark.to(tl.float32)
                scores = tl.dot(q, mark, scores, input_precision="tf32x3")
        scores = tl.where(block[None, :] < sees, scores, float("-inf"))
        best, best_ids = _take(scores, block[None, :], best, best_ids)

    at_R = (b * (rows // each) + r) * groups * each + head
    if SPLIT:
        slot = tl.arange(0, SLOTS)[None, :]
        at = (at_R * shares + share)[:, None] * SLOTS + slot
        exists = (row < rows)[:, None]
        tl.store(best_scores + at, tl.where(slot < k, best, float("-inf")), mask=exists)
        tl.store(best_blocks + at, best_ids.to(tl.int64), mask=exists)
    else:
        _store(best_scores, best_blocks, best, best_ids, at_R, row < rows, k, SLOTS)


@triton.jit
def _merge(best_scores, best_blocks, scores, ids, shares, k, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """The best of one row from its shares, the newest share first; BLOCK holds whole shares."""
    row = tl.program_id(0).to(tl.int64)
    best, best_ids = _empty(k, 1, SLOTS)
    count = shares * SLOTS
    tiles = tl.cdiv(count, BLOCK)
    for back in range(tiles):
        place = (tiles - 1 - back) * BLOCK + tl.arange(0, BLOCK)[None, :]
        found = tl.load(best_scores + row * count + place, mask=place < count, other=float("-inf"))
        blocks = tl.load(best_blocks + row * count + place, mask=place < count, other=-1).to(tl.int32)
        best, best_ids = _take(found, blocks, best, best_ids)
    at_R = row + tl.arange(0, 1)
    _store(scores, ids, best, best_ids, at_R, at_R >= 0, k, SLOTS)
