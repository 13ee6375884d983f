"""Backward, second half: the gradients of keys and values. No atomics: each program owns the keys it sums for.

A band: a program takes a tile of keys through the queries that may see it, a range since intervals never turn back.
A pool: a program takes a block, or a tile of it, through the places where tables name it.
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
    forget,
    hide,
    load_columns,
    load_keys,
    load_logs,
    load_queries,
    load_rotation,
    rotate,
    rotate_back,
    store_columns,
    weight,
)
from memtier_kernels.triton_tuning import config, tuned

__all__ = ["CELL", "band_gradients", "block_tile", "paged_gradients"]

# keys of a band for which one range of queries is kept: no tile of keys is smaller
CELL = 16


@triton.jit
def key_step(
    dk, dk_high, dv, k, k_high, v, place_N, q, d_out, lse, delta, row_M, stop, begin_M, end_M, b, g, tokens, kv_heads,
    scale,
    D: tl.constexpr, D_PAD: tl.constexpr, H_PAD: tl.constexpr, HALVES: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    """Add what the queries at rows `row_M` before `stop` give to a tile of keys: those whose place lies in
    [begin, end). dk is (N, D), or two halves."""
    exists_M = row_M < stop
    token_M = tl.minimum(row_M // J, tokens - 1)
    head_M = g * J + row_M % J
    q_low, q_high = load_queries(q, b, token_M, head_M, exists_M, D, D_PAD, H_PAD, HALVES)
    given, _ = load_queries(d_out, b, token_M, head_M, exists_M, D, D_PAD, H_PAD, False)
    given = given.to(q_low.dtype)
    index_M = (b * tokens + token_M) * (tl.cast(kv_heads, tl.int64) * J) + head_M
    log_M, delta_M = load_logs(lse, delta, index_M, exists_M)
    s = tl.dot(k, tl.trans(q_low), input_precision="tf32x3")
    if HALVES:
        s = tl.dot(k_high, tl.trans(q_high), s, input_precision="tf32x3")
    p = tl.exp2(s * scale - log_M[None, :])
    p = hide(p, 0.0, place_N[:, None], begin_M[None, :], end_M[None, :])
    dv = tl.dot(p.to(q_low.dtype), given, dv, input_precision="tf32x3")
    ds = p * (tl.dot(v, tl.trans(given), input_precision="tf32x3") - delta_M[None, :])
    ds = ds.to(q_low.dtype)
    dk = tl.dot(ds, q_low, dk, input_precision="tf32x3")
    if HALVES:
        dk_high = tl.dot(ds, q_high, dk_high, input_precision="tf32x3")
    return dk, dk_high, dv


@triton.jit(do_not_specialize=["tokens", "size_class"])
def of_band(
    dk, dv, source, q, d_out, lse, delta, first, stop, first_batch, stop_batch, tokens, kv_heads, scale, size_class,
    D: tl.constexpr, D_PAD: tl.constexpr, J: tl.constexpr, CELL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv (B, n, G, D). first, stop: for each cell of keys, the first token whose interval ends after the cell
    begins, and the first that starts after it ends."""
    g = (tl.program_id(1) % kv_heads).to(tl.int64)
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    low = tl.program_id(0).to(tl.int64) * BLOCK_N
    lane_N = tl.arange(0, BLOCK_N)
    place_N = low + lane_N
    inside_N = place_N < source.size
    k = load_columns(
        source.k + b * source.k_batch + g * source.k_head, place_N * source.k_token, inside_N, 0, D, D_PAD, True
    )
    v = load_columns(
        source.v + b * source.v_batch + g * source.v_head, place_N * source.v_token, inside_N, 0, D, D_PAD, True
    )
    k, v = k.to(q.at.dtype.element_ty), v.to(q.at.dtype.element_ty)
    last_cell = (tl.minimum(low + BLOCK_N, source.size) - 1) // CELL
    begin_row = tl.load(first + b * first_batch + low // CELL).to(tl.int64) * J
    stop_row = tl.load(stop + b * stop_batch + last_cell).to(tl.int64) * J
    steps = tl.cast((tl.maximum(stop_row - begin_row, 0) + BLOCK_M - 1) // BLOCK_M, tl.int32)
    grad_k = tl.zeros((BLOCK_N, D_PAD), tl.float32)
    grad_v = tl.zeros((BLOCK_N, D_PAD), tl.float32)
    unused = tl.zeros((BLOCK_N,), tl.float32)
    for i in range(steps):
        row_M = begin_row + tl.cast(i, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        token_M = tl.minimum(row_M // J, tokens - 1)
        begin_M = tl.load(source.first + b * source.first_batch + token_M).to(tl.int64) - low
        end_M = tl.minimum(tl.load(source.second + b * source.second_batch + token_M).to(tl.int64), source.size) - low
        # counted from the tile, which lies within [0, BLOCK_N)
        begin_M = tl.minimum(tl.maximum(begin_M, 0), BLOCK_N).to(tl.int32)
        end_M = tl.minimum(tl.maximum(end_M, 0), BLOCK_N).to(tl.int32)
        grad_k, unused, grad_v = key_step(
            grad_k, unused, grad_v, k, k, v, lane_N, q, d_out, lse, delta, row_M, stop_row, begin_M, end_M, b, g,
            tokens, kv_heads, scale, D, D_PAD, 16, False, J,
        )  # fmt: skip
    place_N = low + forget(tl.arange(0, BLOCK_N))
    inside_N = place_N < source.size
    offset_N = ((b * source.size + place_N) * kv_heads + g) * D
    store_columns(dk, offset_N, inside_N, grad_k * (scale / LOG2E), 0, D, D_PAD)
    store_columns(dv, offset_N, inside_N, grad_v, 0, D, D_PAD)


@triton.jit
def share_of(begin, stop, part, parts):
    """Part number `part` of a range; the length is divided in 32 bits, since 64 would take a call."""
    each = (tl.cast(stop - begin, tl.int32) + parts - 1) // parts
    first = tl.minimum(begin + tl.cast(each, tl.int64) * part, stop)
    return first, tl.minimum(first + each, stop)


@triton.jit(do_not_specialize=["blocks", "entries", "tokens", "size_class", "group_rows"])
def of_pool(
    dk, dv, source, q, d_out, lse, delta, in_row, at_entry, bounds, group_bounds, blocks, entries, tokens, kv_heads,
    scale, size_class, group_rows,
    S: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, H_PAD: tl.constexpr, HALVES: tl.constexpr, J: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dk and dv (parts, B, n, S, G, D); axis 2 of the grid counts the parts.

    in_row, at_entry (B, R * K): the table's entries sorted by block; bounds (B, n + 1) where each block's begin;
    group_bounds (R + 1) where each group's tokens begin. Parts share a block's entries, or, where one row serves all,
    the tokens.
    """
    tiles = (S + BLOCK_N - 1) // BLOCK_N
    block = (tl.program_id(0) // tiles).to(tl.int64)
    g = (tl.program_id(1) % kv_heads).to(tl.int64)
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    part, parts = tl.program_id(2), tl.num_programs(2)
    within_N = ((tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside_N = within_N < S
    k, k_high = load_keys(
        source.k + b * source.k_batch + g * source.k_head + block * source.k_block, within_N * source.k_token,
        inside_N, D, D_PAD, H_PAD, HALVES, True,
    )  # fmt: skip
    v = load_columns(
        source.v + b * source.v_batch + g * source.v_head + block * source.v_block, within_N * source.v_token,
        inside_N, 0, D, D_PAD, True,
    ).to(q.at.dtype.element_ty)  # fmt: skip
    dtype = q.at.dtype.element_ty
    begin = tl.load(bounds + b * (blocks + 1) + block)
    stop = tl.load(bounds + b * (blocks + 1) + block + 1)
    share_tokens = source.by_group == 0
    if share_tokens:
        first_entry, stop_entry = begin, stop
    else:
        first_entry, stop_entry = share_of(begin, stop, part, parts)

    grad_v = tl.zeros((BLOCK_N, D_PAD), tl.float32)
    if HALVES:
        grad_k = tl.zeros((BLOCK_N, H_PAD), tl.float32)
        grad_high = tl.zeros((BLOCK_N, H_PAD), tl.float32)
    else:
        grad_k = tl.zeros((BLOCK_N, D_PAD), tl.float32)
        grad_high = tl.zeros((BLOCK_N,), tl.float32)
    for i in range(first_entry, stop_entry):
        row = tl.load(in_row + b * entries + i).to(tl.int64)
        place_N = tl.load(at_entry + b * entries + i).to(tl.int64) * S + within_N
        seen_N = inside_N
        if source.mask is not None:
            hidden_by = source.mask + b * source.mask_batch + row * source.mask_row
            seen_N = seen_N & (tl.load(hidden_by + place_N, mask=inside_N, other=0) != 0)
        lane_N = tl.where(seen_N, 0, -1)
        first_token = tl.load(group_bounds + row).to(tl.int64)
        stop_token = tl.load(group_bounds + row + 1).to(tl.int64)
        if share_tokens:
            first_token, stop_token = share_of(first_token, stop_token, part, parts)
        steps = tl.cast(((stop_token - first_token) * J + BLOCK_M - 1) // BLOCK_M, tl.int32)
        if HALVES:
            turned, turned_high = rotate(k, k_high, load_rotation(source, place_N, inside_N, D, H_PAD))
            turned, turned_high = turned.to(dtype), turned_high.to(dtype)
            own = tl.zeros((BLOCK_N, H_PAD), tl.float32)
            own_high = tl.zeros((BLOCK_N, H_PAD), tl.float32)
        else:
            turned, turned_high = k.to(dtype), k_high.to(dtype)
            own, own_high = grad_k, grad_high
        for j in range(steps):
            row_M = first_token * J + tl.cast(j, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
            zero_M = tl.zeros((BLOCK_M,), tl.int32)
            own, own_high, grad_v = key_step(
                own, own_high, grad_v, turned, turned_high, v, lane_N, q, d_out, lse, delta, row_M, stop_token * J,
                zero_M, zero_M + 1, b, g, tokens, kv_heads, scale, D, D_PAD, H_PAD, HALVES, J,
            )  # fmt: skip
        if HALVES:
            own, own_high = rotate_back(own, own_high, load_rotation(source, place_N, inside_N, D, H_PAD))
            grad_k += own
            grad_high += own_high
        else:
            grad_k, grad_high = own, own_high
    batches = tl.num_programs(1) // kv_heads
    line = (part.to(tl.int64) * batches + b) * blocks + block
    within_N = (tl.program_id(0) % tiles) * BLOCK_N + forget(tl.arange(0, BLOCK_N))
    inside_N = within_N < S
    offset_N = ((line * S + within_N) * kv_heads + g) * D
    if HALVES:
        store_columns(dk, offset_N, inside_N, grad_k * (scale / LOG2E), 0, D // 2, H_PAD)
        store_columns(dk, offset_N, inside_N, grad_high * (scale / LOG2E), D // 2, D // 2, H_PAD)
    else:
        store_columns(dk, offset_N, inside_N, grad_k * (scale / LOG2E), 0, D, D_PAD)
    store_columns(dv, offset_N, inside_N, grad_v, 0, D, D_PAD)


def _band_fits(candidate: triton.Config, given: dict[str, Any]) -> bool:
    """Which tiles fit into registers was found by compiling (README.md)."""
    row = weight(given)
    if row <= 256:
        return candidate.kwargs["BLOCK_N"] >= 64
    return candidate.kwargs["BLOCK_N"] == (32 if row <= 512 else 16)


band_gradients = tuned(
    [
        config(warps=8, stages=2, BLOCK_M=32, BLOCK_N=64),
        config(warps=8, stages=2, BLOCK_M=32, BLOCK_N=128),
        config(warps=8, stages=2, BLOCK_M=32, BLOCK_N=32),
        config(warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
    ],
    key=["size_class", "D", "J"],
    prune=_band_fits,
)(of_band)


def _pool_fits(candidate: triton.Config, given: dict[str, Any]) -> bool:
    """No larger tiles than groups of queries, and no more registers than there are."""
    tile, warps = candidate.kwargs["BLOCK_M"], candidate.num_warps
    heavy = weight(given) > 512
    if (candidate.num_stages == 1) != heavy:
        return False
    if 0 < given["group_rows"] < 64 or (heavy and given["HALVES"]) or (weight(given) > 400 and architecture() < 90):
        return tile == 16
    if given["BLOCK_N"] == 16 and not heavy:
        return tile == (32 if weight(given) <= 256 else 16)
    return tile > 16 and (warps == 8 or (weight(given) <= 256 and not given["HALVES"]))


paged_gradients = tuned(
    [
        config(warps=4, stages=2, BLOCK_M=32),
        config(warps=8, stages=2, BLOCK_M=64),
        config(warps=4, stages=2, BLOCK_M=16),
        config(warps=8, stages=1, BLOCK_M=32),
        config(warps=8, stages=1, BLOCK_M=16),
    ],
    key=["size_class", "group_rows", "S", "D", "HALVES", "J"],
    prune=_pool_fits,
)(of_pool)


def block_tile(block: int, row: int, halves: bool, single: bool) -> int:
    """How many tokens of a block of a pool one program takes; `single`: they are float32."""
    largest = (64 if row <= 256 else 16 if single else 32) // (2 if halves else 1)
    return max(16, min(largest, triton.next_power_of_2(block)))
