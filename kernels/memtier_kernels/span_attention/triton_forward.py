"""The forward kernel: one online softmax over all sources, whole (prefill) or split over the keys (decode).

Prefill: a program takes one tile of queries through every source. Decode: few queries, so a program takes all of them
through one share of one source, and `merge_splits` joins the partial results.
"""

# a kernel's constants are plain numbers to its caller, and what is bound depends on them: Triton's types know neither
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from memtier_kernels.span_attention.triton_tiles import (
    LOG2E,
    architecture,
    hide,
    load_queries,
    scores,
    store_columns,
    tile_rows,
    visit,
    weight,
)
from memtier_kernels.triton_tuning import config, tuned

__all__ = ["decode", "merge_splits", "prefill"]


# counts that change from call to call: no new compilation where one of them is 1 or divisible by 16
_COUNTS = ["sinks_shares", "span_shares", "eidetic_shares", "fading_shares", "window_shares"]


@triton.jit
def softmax_step(
    acc, acc_high, top, total, part, queries, k, k_high, v, place_N, from_M, to_M, scale,
    HALVES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the running softmax, in powers of two.

    acc (M, D) and the sums `total` (earlier sources) and `part` (this source) are under the running maximum `top`.
    """
    q, q_high = queries[0], queries[1]
    s = scores(q, q_high, k.to(q.dtype), k_high.to(q.dtype), HALVES)
    if MASKED:
        s = hide(s, float("-inf"), place_N[None, :], from_M[:, None], to_M[:, None])
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    if MASKED:
        # a row that has seen nothing yet has no maximum to subtract
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    else:
        shift = new_top
    p = tl.exp2(s * scale - shift[:, None])
    fade = tl.exp2(top - shift)
    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * fade[:, None], input_precision="tf32x3")
    return acc, acc_high, new_top, total * fade, part * fade + tl.sum(p, 1)


@triton.jit(do_not_specialize=[*_COUNTS, "tokens", "size_class", "group_rows"])
def attend(
    out, lse, parts, q, q_far, group, sinks, span, eidetic, fading, window,
    sinks_shares, span_shares, eidetic_shares, fading_shares, window_shares,
    tokens, kv_heads, scale, size_class, group_rows,
    SINKS: tl.constexpr, SPAN: tl.constexpr, EIDETIC: tl.constexpr, FADING: tl.constexpr, WINDOW: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, H_PAD: tl.constexpr, HALVES: tl.constexpr, J: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """SINKS .. WINDOW: -1 if absent, 0 for a band, else tokens a block. `scale` includes log2 e.

    Whole: out (B, T, H, D), lse (B, T, H), parts (P, B, T, H). SPLIT: `.._shares` count the shares of each source, out
    (B, G, shares, T * J, D) and lse (B, G, shares, T * J) are float32.
    """
    if SPLIT:
        g = (tl.program_id(0) % kv_heads).to(tl.int64)
        share = tl.program_id(0) // kv_heads
        b = tl.program_id(1).to(tl.int64)
        tile = tl.cast(0, tl.int32)
    else:
        # late tiles see most where memory grows with the tokens: begin with them
        tile = tl.num_programs(0) - 1 - tl.program_id(0)
        g = (tl.program_id(1) % kv_heads).to(tl.int64)
        b = (tl.program_id(1) // kv_heads).to(tl.int64)
        share = 0
    heads = tl.cast(kv_heads, tl.int64) * J
    plane = (tl.num_programs(1) if SPLIT else tl.num_programs(1) // kv_heads) * tokens * heads
    acc = tl.zeros((BLOCK_M, D_PAD), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if SINKS >= 0 or SPAN >= 0 or EIDETIC >= 0:
        token_M, place_M, exists_M = tile_rows(tile, tokens, J, BLOCK_M)
        far = load_queries(q_far, b, token_M, g * J + place_M, exists_M, D, D_PAD, H_PAD, HALVES)
    if SINKS >= 0:
        acc, top, total = take_in(
            acc, top, total, parts, far, tile, tokens, group, sinks, b, g, kv_heads, scale, share, sinks_shares,
            SINKS, D, D_PAD, H_PAD, HALVES, J, SPLIT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        parts += plane
        share -= sinks_shares
    if SPAN >= 0:
        acc, top, total = take_in(
            acc, top, total, parts, far, tile, tokens, group, span, b, g, kv_heads, scale, share, span_shares,
            SPAN, D, D_PAD, H_PAD, HALVES, J, SPLIT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        parts += plane
        share -= span_shares
    if EIDETIC >= 0:
        acc, top, total = take_in(
            acc, top, total, parts, far, tile, tokens, group, eidetic, b, g, kv_heads, scale, share, eidetic_shares,
            EIDETIC, D, D_PAD, H_PAD, HALVES, J, SPLIT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        parts += plane
        share -= eidetic_shares
    if FADING >= 0 or WINDOW >= 0:
        token_M, place_M, exists_M = tile_rows(tile, tokens, J, BLOCK_M)
        near = load_queries(q, b, token_M, g * J + place_M, exists_M, D, D_PAD, H_PAD, False)
    if FADING >= 0:
        acc, top, total = take_in(
            acc, top, total, parts, near, tile, tokens, group, fading, b, g, kv_heads, scale, share, fading_shares,
            FADING, D, D_PAD, H_PAD, False, J, SPLIT, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        parts += plane
        share -= fading_shares
    if WINDOW >= 0:
        acc, top, total = take_in(
            acc, top, total, parts, near, tile, tokens, group, window, b, g, kv_heads, scale, share, window_shares,
            WINDOW, D, D_PAD, H_PAD, False, J, SPLIT, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    token_M, place_M, exists_M = tile_rows(tile, tokens, J, BLOCK_M)
    if SPLIT:
        shares = tl.num_programs(0) // kv_heads
        row_M = ((b * kv_heads + g) * shares + tl.program_id(0) // kv_heads) * (tokens * J) + tl.arange(0, BLOCK_M)
    else:
        row_M = (b * tokens + token_M) * heads + g * J + place_M
    empty_M = total == 0.0
    log_M = tl.where(empty_M, float("-inf"), (top + tl.log2(tl.where(empty_M, 1.0, total))) / LOG2E)
    tl.store(lse + row_M, log_M, mask=exists_M)
    store_columns(out, row_M * D, exists_M, acc / tl.where(empty_M, 1.0, total)[:, None], 0, D, D_PAD)


@triton.jit
def take_in(
    acc, top, total, parts, queries, tile, tokens, group, source, b, g, kv_heads, scale, share, shares,
    S: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, H_PAD: tl.constexpr, HALVES: tl.constexpr, J: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One source, or this program's share of it; its own log-sum-exp is stored where the rows are whole."""
    part = tl.zeros_like(total)
    unused = tl.zeros_like(total)
    if SPLIT:
        # other programs have the shares of other sources
        if (share >= 0) & (share < shares):
            acc, unused, top, total, part = visit(
                acc, unused, top, total, part, queries, tile, tokens, group, source, b, g, scale, share, shares,
                S, D, D_PAD, H_PAD, HALVES, J, BLOCK_M, BLOCK_N, softmax_step,
            )  # fmt: skip
    else:
        acc, unused, top, total, part = visit(
            acc, unused, top, total, part, queries, tile, tokens, group, source, b, g, scale, 0, 1,
            S, D, D_PAD, H_PAD, HALVES, J, BLOCK_M, BLOCK_N, softmax_step,
        )  # fmt: skip
        token_M, place_M, exists_M = tile_rows(tile, tokens, J, BLOCK_M)
        row_M = (b * tokens + token_M) * (tl.cast(kv_heads, tl.int64) * J) + g * J + place_M
        log_M = (top + tl.log2(tl.where(part == 0.0, 1.0, part))) / LOG2E
        tl.store(parts + row_M, tl.where(part == 0.0, float("-inf"), log_M), mask=exists_M)
    return acc, top, total + part


@triton.jit(do_not_specialize=["shares_0", "shares_1", "shares_2", "shares_3", "shares_4", "tokens"])
def merge_splits(
    out, lse, parts, partial, partial_lse, shares_0, shares_1, shares_2, shares_3, shares_4, tokens, kv_heads,
    PARTS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, J: tl.constexpr, SHARES_PAD: tl.constexpr,
):  # fmt: skip
    """Join the shares of each row; the first `shares_0` of them belong to the first of the sources there are."""
    row = tl.program_id(0).to(tl.int64)
    g = (tl.program_id(1) % kv_heads).to(tl.int64)
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    rows = tl.cast(tokens, tl.int64) * J
    counts = (shares_0, shares_1, shares_2, shares_3, shares_4)
    shares = shares_0 + shares_1 + shares_2 + shares_3 + shares_4
    first = ((b * kv_heads + g) * shares) * rows + row
    target = (b * tokens + row // J) * (tl.cast(kv_heads, tl.int64) * J) + g * J + row % J
    plane = (tl.num_programs(1) // kv_heads) * rows * kv_heads

    share_S = tl.arange(0, SHARES_PAD)
    log_S = tl.load(partial_lse + first + share_S * rows, mask=share_S < shares, other=float("-inf"))
    top = tl.max(log_S, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weight_S = tl.exp2((log_S - shift) * LOG2E)
    begun = 0
    for p in tl.static_range(PARTS):
        mine_S = (share_S >= begun) & (share_S < begun + counts[p])
        begun += counts[p]
        own_top = tl.max(tl.where(mine_S, log_S, float("-inf")), 0)
        own_shift = tl.where(own_top == float("-inf"), 0.0, own_top)
        own = tl.sum(tl.where(mine_S, tl.exp2((log_S - own_shift) * LOG2E), 0.0), 0)
        log = own_shift + tl.log2(tl.where(own == 0.0, 1.0, own)) / LOG2E
        tl.store(parts + p * plane + target, tl.where(own == 0.0, float("-inf"), log))
    total = tl.sum(weight_S, 0)
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(lse + target, tl.where(top == float("-inf"), top, shift + tl.log2(total) / LOG2E))

    column = tl.arange(0, D_PAD)
    acc = tl.zeros((D_PAD,), tl.float32)
    for i in range(0, shares, 8):
        some = i + tl.arange(0, 8)
        log_8 = tl.load(partial_lse + first + some * rows, mask=some < shares, other=float("-inf"))
        tile = tl.load(
            partial + (first + some * rows)[:, None] * D + column[None, :],
            mask=(some < shares)[:, None] & (column < D)[None, :], other=0.0,
        )  # fmt: skip
        acc += tl.sum(tile * tl.exp2((log_8 - shift) * LOG2E)[:, None], 0)
    tl.store(out + target * D + column, (acc / total).to(out.dtype.element_ty), mask=column < D)


def _fits(candidate: triton.Config, given: dict[str, Any]) -> bool:
    """Which tiles fit into registers was found by compiling (README.md)."""
    tile_m, tile_n = candidate.kwargs["BLOCK_M"], candidate.kwargs["BLOCK_N"]
    row = weight(given)
    if row > 256:
        best = (16, 16) if row > 512 else (64, 32) if row > 400 else (32, 32)
        return (tile_m, tile_n) == best and candidate.num_warps == (4 if tile_m == 32 else 8)
    # a tile larger than a group of queries multiplies keys that most of its rows do not see
    if 0 < given["group_rows"] < 64:
        return (tile_m, tile_n) == (16, 32)
    if tile_m == 128:
        return architecture() >= 90 and given["HALVES"] == (tile_n == 32)
    return tile_m == 64 and candidate.num_warps == 4


_KEY = [
    "size_class", "group_rows", "SINKS", "SPAN", "EIDETIC", "FADING", "WINDOW", "D", "HALVES", "J",
]  # fmt: skip

prefill = tuned(
    [
        config(warps=4, stages=2, BLOCK_M=64, BLOCK_N=32),
        config(warps=8, stages=2, BLOCK_M=128, BLOCK_N=64),
        config(warps=8, stages=2, BLOCK_M=128, BLOCK_N=32),
        config(warps=4, stages=2, BLOCK_M=16, BLOCK_N=32),
        config(warps=8, stages=2, BLOCK_M=64, BLOCK_N=32),
        config(warps=4, stages=2, BLOCK_M=32, BLOCK_N=32),
        config(warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
    ],
    key=_KEY,
    prune=_fits,
)(attend)


def _decode_fits(candidate: triton.Config, given: dict[str, Any]) -> bool:
    row = weight(given)
    # a tile of queries that is not the smallest takes the registers that a larger tile of keys would
    least = 64 if row <= 256 and given["BLOCK_M"] == 16 else 32 if row <= 512 else 16
    return candidate.kwargs["BLOCK_N"] == least or (least == 64 and candidate.kwargs["BLOCK_N"] == 32)


decode = tuned(
    [
        config(warps=4, stages=3, BLOCK_N=64),
        config(warps=4, stages=3, BLOCK_N=32),
        config(warps=8, stages=1, BLOCK_N=16),
    ],
    key=[*_KEY, "BLOCK_M"],
    prune=_decode_fits,
)(attend)
