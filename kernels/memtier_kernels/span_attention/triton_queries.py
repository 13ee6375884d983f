"""Backward, first half: the shift of each row's gradient, and the gradients of the queries.

With p the weights of the whole row, ``ds = p * (do v^T - delta)``, ``dq = ds k``, where for source s
``delta_s = sum(do * o) - dlse - dpart_s * exp(lse - part_s)``.
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
    load_columns,
    load_logs,
    load_queries,
    scores,
    store_columns,
    tile_rows,
    visit,
    weight,
)
from memtier_kernels.triton_tuning import config, tuned

__all__ = ["query_gradients", "row_shifts"]


@triton.jit(do_not_specialize=["tokens", "rows"])
def row_shifts(
    delta, out, d_out, lse, d_lse, parts, d_parts, tokens, heads, rows,
    PLANES: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta (PLANES, B, T, H): one plane a source if a gradient of `parts` comes in, else one for all."""
    row_M = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists_M = row_M < rows
    token_M = row_M // heads
    offset_M = (token_M // tokens) * d_out.batch + (token_M % tokens) * d_out.token + (row_M % heads) * d_out.head
    given = load_columns(d_out.at, offset_M, exists_M, 0, D, D_PAD, True).to(tl.float32)
    had = load_columns(out, row_M * D, exists_M, 0, D, D_PAD, True).to(tl.float32)
    shift_M = tl.sum(given * had, 1)
    if d_lse is not None:
        shift_M -= tl.load(d_lse + row_M, mask=exists_M, other=0.0)
    if d_parts is None:
        tl.store(delta + row_M, shift_M, mask=exists_M)
    else:
        log_M = tl.load(lse + row_M, mask=exists_M, other=0.0)
        for p in tl.static_range(PLANES):
            at = row_M + p * tl.cast(rows, tl.int64)
            part_M = tl.load(parts + at, mask=exists_M, other=float("-inf"))
            none_M = part_M == float("-inf")
            # a share too small for float32 has no gradient; the bound keeps the others finite
            over_M = tl.exp2(tl.minimum(tl.where(none_M, 0.0, log_M - tl.where(none_M, 0.0, part_M)), 80.0) * LOG2E)
            own_M = tl.load(d_parts + at, mask=exists_M, other=0.0) * over_M
            tl.store(delta + at, shift_M - tl.where(none_M, 0.0, own_M), mask=exists_M)


@triton.jit
def gradient_step(
    acc, acc_high, log, delta, part, queries, k, k_high, v, place_N, from_M, to_M, scale,
    HALVES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add what one tile of keys gives to the gradient of the queries, (M, D) or two halves of it."""
    q, q_high, given = queries[0], queries[1], queries[2]
    k, k_high, v = k.to(q.dtype), k_high.to(q.dtype), v.to(q.dtype)
    s = scores(q, q_high, k, k_high, HALVES)
    p = tl.exp2(s * scale - log[:, None])
    if MASKED:
        p = hide(p, 0.0, place_N[None, :], from_M[:, None], to_M[:, None])
    ds = (p * (tl.dot(given, tl.trans(v), input_precision="tf32x3") - delta[:, None])).to(q.dtype)
    acc = tl.dot(ds, k, acc, input_precision="tf32x3")
    if HALVES:
        acc_high = tl.dot(ds, k_high, acc_high, input_precision="tf32x3")
    return acc, acc_high, log, delta, part


@triton.jit
def through(
    acc, acc_high, lse, delta, queries, tile, tokens, group, source, b, g, kv_heads, scale,
    S: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, H_PAD: tl.constexpr, HALVES: tl.constexpr, J: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One source."""
    token_M, place_M, exists_M = tile_rows(tile, tokens, J, BLOCK_M)
    index_M = (b * tokens + token_M) * (tl.cast(kv_heads, tl.int64) * J) + g * J + place_M
    log_M, delta_M = load_logs(lse, delta, index_M, exists_M)
    acc, acc_high, _, _, _ = visit(
        acc, acc_high, log_M, delta_M, tl.zeros_like(log_M), queries, tile, tokens, group, source, b, g, scale, 0, 1,
        S, D, D_PAD, H_PAD, HALVES, J, BLOCK_M, BLOCK_N, gradient_step,
    )  # fmt: skip
    return acc, acc_high


@triton.jit
def begin(
    d_out, q, tile, tokens, b, g,
    J: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, H_PAD: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Empty sums, and a tile of q and of the gradient of out."""
    token_M, place_M, exists_M = tile_rows(tile, tokens, J, BLOCK_M)
    head_M = g * J + place_M
    low, high = load_queries(q, b, token_M, head_M, exists_M, D, D_PAD, H_PAD, HALVES)
    given, _ = load_queries(d_out, b, token_M, head_M, exists_M, D, D_PAD, H_PAD, False)
    if HALVES:
        acc = tl.zeros((BLOCK_M, H_PAD), tl.float32)
        acc_high = tl.zeros((BLOCK_M, H_PAD), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, D_PAD), tl.float32)
        acc_high = tl.zeros((BLOCK_M,), tl.float32)
    return acc, acc_high, (low, high, given.to(low.dtype))


@triton.jit
def finish(
    at, acc, acc_high, scale, tile, tokens, b, g, kv_heads,
    J: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, H_PAD: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store the gradient of a tile of queries."""
    token_M, place_M, exists_M = tile_rows(tile, tokens, J, BLOCK_M)
    offset_M = ((b * tokens + token_M) * (tl.cast(kv_heads, tl.int64) * J) + g * J + place_M) * D
    if HALVES:
        store_columns(at, offset_M, exists_M, acc * (scale / LOG2E), 0, D // 2, H_PAD)
        store_columns(at, offset_M, exists_M, acc_high * (scale / LOG2E), D // 2, D // 2, H_PAD)
    else:
        store_columns(at, offset_M, exists_M, acc * (scale / LOG2E), 0, D, D_PAD)


@triton.jit(do_not_specialize=["plane", "tokens", "size_class", "group_rows"])
def attend_backward(
    dq, dq_far, d_out, lse, delta, q, q_far, group, sinks, span, eidetic, fading, window, plane, tokens, kv_heads,
    scale, size_class, group_rows,
    SINKS: tl.constexpr, SPAN: tl.constexpr, EIDETIC: tl.constexpr, FADING: tl.constexpr, WINDOW: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, H_PAD: tl.constexpr, HALVES: tl.constexpr, J: tl.constexpr,
    JOINT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq and dq_far (B, T, H, D). `plane` is the distance of two sources in `delta`, or 0; JOINT: q_far is q, and dq
    takes both."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    g = (tl.program_id(1) % kv_heads).to(tl.int64)
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    NEAR_HALVES: tl.constexpr = HALVES and JOINT
    if SINKS >= 0 or SPAN >= 0 or EIDETIC >= 0 or JOINT:
        acc, acc_high, far = begin(d_out, q_far, tile, tokens, b, g, J, D, D_PAD, H_PAD, HALVES, BLOCK_M)
    if SINKS >= 0:
        acc, acc_high = through(
            acc, acc_high, lse, delta, far, tile, tokens, group, sinks, b, g, kv_heads, scale,
            SINKS, D, D_PAD, H_PAD, HALVES, J, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        delta += plane
    if SPAN >= 0:
        acc, acc_high = through(
            acc, acc_high, lse, delta, far, tile, tokens, group, span, b, g, kv_heads, scale,
            SPAN, D, D_PAD, H_PAD, HALVES, J, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        delta += plane
    if EIDETIC >= 0:
        acc, acc_high = through(
            acc, acc_high, lse, delta, far, tile, tokens, group, eidetic, b, g, kv_heads, scale,
            EIDETIC, D, D_PAD, H_PAD, HALVES, J, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        delta += plane
    if JOINT:
        near = far
    else:
        if SINKS >= 0 or SPAN >= 0 or EIDETIC >= 0:
            finish(dq_far, acc, acc_high, scale, tile, tokens, b, g, kv_heads, J, D, D_PAD, H_PAD, HALVES, BLOCK_M)
        acc, acc_high, near = begin(d_out, q, tile, tokens, b, g, J, D, D_PAD, H_PAD, False, BLOCK_M)
    if FADING >= 0:
        acc, acc_high = through(
            acc, acc_high, lse, delta, near, tile, tokens, group, fading, b, g, kv_heads, scale,
            FADING, D, D_PAD, H_PAD, NEAR_HALVES, J, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        delta += plane
    if WINDOW >= 0:
        acc, acc_high = through(
            acc, acc_high, lse, delta, near, tile, tokens, group, window, b, g, kv_heads, scale,
            WINDOW, D, D_PAD, H_PAD, NEAR_HALVES, J, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    finish(dq, acc, acc_high, scale, tile, tokens, b, g, kv_heads, J, D, D_PAD, H_PAD, NEAR_HALVES, BLOCK_M)


def _fits(candidate: triton.Config, given: dict[str, Any]) -> bool:
    """Which tiles fit into registers was found by compiling (README.md)."""
    tile, warps = candidate.kwargs["BLOCK_M"], candidate.num_warps
    row = weight(given)
    if row > 256:
        if given["q"].at.element_size() == 2:
            return (tile, warps) == (32, 8)
        return (tile, warps) == (16, 8)
    # a tile larger than a group of queries multiplies keys that most of its rows do not see
    if 0 < given["group_rows"] < 64:
        return (tile, warps) == (32, 4)
    if given["HALVES"] and architecture() < 90:
        return tile == 32
    return tile == 64 or (tile == 128 and architecture() >= 90)


query_gradients = tuned(
    [
        config(warps=4, stages=2, BLOCK_M=64, BLOCK_N=32),
        config(warps=8, stages=2, BLOCK_M=128, BLOCK_N=32),
        config(warps=4, stages=2, BLOCK_M=32, BLOCK_N=32),
        config(warps=8, stages=2, BLOCK_M=32, BLOCK_N=32),
        config(warps=4, stages=1, BLOCK_M=16, BLOCK_N=16),
        config(warps=8, stages=1, BLOCK_M=16, BLOCK_N=16),
    ],
    key=["size_class", "group_rows", "SINKS", "SPAN", "EIDETIC", "FADING", "WINDOW", "D", "HALVES", "JOINT", "J"],
    prune=_fits,
)(attend_backward)
