"""What forward and backward share: which keys a tile of queries sees, and how a tile of keys is loaded.

A tile of queries holds M rows, row m = token m // J of head m % J of its key/value head (J = H / G). A tile of keys
holds N rows of a `Source`. `visit_band` and `visit_paged` walk over the tiles of keys that a tile of queries sees and
call a step (`triton_forward.softmax_step`, `triton_queries.gradient_step`) on each, so masks cannot differ.

The head size is loaded whole, padded to a power of two, or, where far keys are rotated by place (HALVES), as two
halves, so that rotate-half is elementwise.
"""

# a kernel's constants are plain numbers to its caller, and what is bound depends on them: Triton's types know neither
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver

LOG2E = tl.constexpr(1.4426950408889634)

_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


def architecture() -> int:
    """80 for an A100, 90 for an H100 or H200."""
    return driver.active.get_current_target().arch


def weight(given: dict[str, Any]) -> int:
    """How many registers a row of a tile takes, in bytes: a float32 product keeps each number as three."""
    return given["D_PAD"] * (2 if given["q"].at.element_size() == 2 else 6)


class Source(NamedTuple):
    """A `Band` or a `Paged`: pointers, then sizes and strides in elements.

    `first` and `second` are a band's start and end (a token stride of 1), or `first` is the table of a pool. `size` is
    the number of keys in a band or in a table row (K * S); `by_group` is 0 if one table row serves every query.
    """

    k: Any
    v: Any
    first: Any
    second: Any
    mask: Any
    cos: Any
    sin: Any
    size: int
    by_group: int
    k_batch: int
    k_block: int
    k_token: int
    k_head: int
    v_batch: int
    v_block: int
    v_token: int
    v_head: int
    first_batch: int
    second_batch: int
    table_row: int
    mask_batch: int
    mask_row: int


class Rows(NamedTuple):
    """A tensor (B, T, H, D): pointer and strides."""

    at: Any
    batch: int
    token: int
    head: int


@triton.jit
def forget(numbers):
    """The same 32-bit numbers, not known to be the same: what was computed of them is computed again rather than kept
    in registers across a loop."""
    if not _INTERPRETED:
        numbers = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [numbers], tl.int32, is_pure=False, pack=1)
    return numbers


@triton.jit
def load_columns(
    base, offset_N, seen_N, FIRST: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr
):
    """(N, PAD): columns FIRST .. FIRST + SIZE of rows at `offset_N`, zero in the padding and in rows not seen."""
    column = tl.arange(0, PAD)
    at = base + offset_N[:, None] + (column + FIRST)[None, :]
    if MASKED:
        if SIZE < PAD:
            tile = tl.load(at, mask=seen_N[:, None] & (column < SIZE)[None, :], other=0.0)
        else:
            tile = tl.load(at, mask=seen_N[:, None], other=0.0)
    elif SIZE < PAD:
        tile = tl.load(at, mask=(column < SIZE)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def store_columns(base, offset_N, seen_N, tile, FIRST: tl.constexpr, SIZE: tl.constexpr, PAD: tl.constexpr):
    """The inverse of `load_columns`."""
    column = tl.arange(0, PAD)
    at = base + offset_N[:, None] + (column + FIRST)[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=seen_N[:, None] & (column < SIZE)[None, :])


@triton.jit
def load_keys(
    base, offset_N, seen_N, D: tl.constexpr, D_PAD: tl.constexpr, H_PAD: tl.constexpr, HALVES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Whole rows twice, or their two halves."""
    if HALVES:
        low = load_columns(base, offset_N, seen_N, 0, D // 2, H_PAD, MASKED)
        high = load_columns(base, offset_N, seen_N, D // 2, D // 2, H_PAD, MASKED)
    else:
        low = load_columns(base, offset_N, seen_N, 0, D, D_PAD, MASKED)
        high = low
    return low, high


@triton.jit
def load_rotation(source, place_N, seen_N, D: tl.constexpr, H_PAD: tl.constexpr):
    """cos and sin of both halves, in float32, for keys at a place in their table row."""
    offset_N = place_N * D
    cos_low = load_columns(source.cos, offset_N, seen_N, 0, D // 2, H_PAD, True).to(tl.float32)
    cos_high = load_columns(source.cos, offset_N, seen_N, D // 2, D // 2, H_PAD, True).to(tl.float32)
    sin_low = load_columns(source.sin, offset_N, seen_N, 0, D // 2, H_PAD, True).to(tl.float32)
    sin_high = load_columns(source.sin, offset_N, seen_N, D // 2, D // 2, H_PAD, True).to(tl.float32)
    return cos_low, cos_high, sin_low, sin_high


@triton.jit
def rotate(low, high, rotation):
    """``x * cos + (-high, low) * sin`` in float32."""
    cos_low, cos_high, sin_low, sin_high = rotation
    low, high = low.to(tl.float32), high.to(tl.float32)
    return low * cos_low - high * sin_low, high * cos_high + low * sin_high


@triton.jit
def rotate_back(low, high, rotation):
    """The transpose of `rotate`: from the gradient of a rotated key to that of the key."""
    cos_low, cos_high, sin_low, sin_high = rotation
    return low * cos_low + high * sin_high, high * cos_high - low * sin_low


@triton.jit
def scores(q, q_high, k, k_high, HALVES: tl.constexpr):
    """(M, N) float32: ``q k^T``."""
    s = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    if HALVES:
        s = tl.dot(q_high, tl.trans(k_high), s, input_precision="tf32x3")
    return s


@triton.jit
def hide(s, other, place, begin, end):
    """`other` where a key's place is not in the interval [begin, end) that a query sees; all broadcast to `s`."""
    # asked only once the scores are there, since a tile of bits costs as many registers as they do
    return tl.where((place >= begin) & (place < end), s, other)


@triton.jit
def tile_rows(tile, tokens, J: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of each row in a tile of queries: its token (those past the end repeat the last), head, and whether it exists."""
    row_M = tl.cast(tile, tl.int64) * BLOCK_M + forget(tl.arange(0, BLOCK_M))
    return tl.minimum(row_M // J, tokens - 1), row_M % J, row_M < tokens * J


@triton.jit
def tile_tokens(tile, tokens, J: tl.constexpr, BLOCK_M: tl.constexpr):
    """The first and the last token of a tile of queries."""
    row = tl.cast(tile, tl.int64) * BLOCK_M
    return row // J, tl.minimum((row + BLOCK_M - 1) // J, tokens - 1)


@triton.jit
def load_queries(
    source, b, token_M, head_M, exists_M, D: tl.constexpr, D_PAD: tl.constexpr, H_PAD: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """Rows of a (B, T, H, D) tensor, whole twice or in two halves."""
    offset_M = token_M * source.token + head_M * source.head
    return load_keys(source.at + b * source.batch, offset_M, exists_M, D, D_PAD, H_PAD, HALVES, True)


@triton.jit
def load_logs(lse, delta, index_M, exists_M):
    """Log-sum-exp, in powers of two, and the shift of the gradient of a score; a row that sees nothing has weights of
    0: its log-sum-exp is infinite here."""
    log_M = tl.load(lse + index_M, mask=exists_M, other=float("-inf"))
    delta_M = tl.load(delta + index_M, mask=exists_M, other=0.0)
    return tl.where(log_M == float("-inf"), float("inf"), log_M * LOG2E), delta_M


@triton.jit
def paged_keys(source, b, row, place_N, S: tl.constexpr):
    """Keys at places of a table row: seen or not, and their offsets in k and v without batch and head."""
    entry_N = place_N // S
    within_N = place_N % S
    inside_N = place_N < source.size
    table = source.first + b * source.first_batch + row * source.table_row
    block_N = tl.load(table + entry_N, mask=inside_N, other=-1).to(tl.int64)
    seen_N = block_N >= 0
    if source.mask is not None:
        hide = source.mask + b * source.mask_batch + row * source.mask_row
        seen_N = seen_N & (tl.load(hide + place_N, mask=inside_N, other=0) != 0)
    block_N = tl.maximum(block_N, 0)
    return (
        seen_N, block_N * source.k_block + within_N * source.k_token,
        block_N * source.v_block + within_N * source.v_token,
    )  # fmt: skip


@triton.jit
def visit_band(
    acc, acc_high, top, total, part, queries, tile, tokens, group, source, b, g, scale, share, shares,
    D: tl.constexpr, D_PAD: tl.constexpr, H_PAD: tl.constexpr, HALVES: tl.constexpr, J: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Step over the tiles of a band that the tile of queries sees; of `shares` equal shares of them, number `share`.

    Intervals never start or end earlier than those before, so the first start and the last end bound the tile, and the
    last start and the first end bound the keys that every row sees: only tiles outside the latter take a mask.
    """
    token_M, _, _ = tile_rows(tile, tokens, J, BLOCK_M)
    first, last = tile_tokens(tile, tokens, J, BLOCK_M)
    k_base = source.k + b * source.k_batch + g * source.k_head
    v_base = source.v + b * source.v_batch + g * source.v_head
    starts = source.first + b * source.first_batch
    ends = source.second + b * source.second_batch
    low = tl.maximum(tl.load(starts + first).to(tl.int64), 0)
    high = tl.minimum(tl.load(ends + last).to(tl.int64), source.size)
    # from here on places count from `low`
    keys = tl.maximum(high - low, 0).to(tl.int32)
    full_low = tl.minimum(tl.maximum(tl.load(starts + last).to(tl.int64) - low, 0), keys).to(tl.int32)
    full_high = tl.minimum(tl.maximum(tl.load(ends + first).to(tl.int64) - low, 0), keys).to(tl.int32)
    start_M = tl.minimum(tl.maximum(tl.load(starts + token_M).to(tl.int64) - low, 0), keys).to(tl.int32)
    end_M = tl.minimum(tl.maximum(tl.load(ends + token_M).to(tl.int64) - low, 0), keys).to(tl.int32)

    tiles = (keys + BLOCK_N - 1) // BLOCK_N
    begin, stop = tiles * share // shares, tiles * (share + 1) // shares
    full_begin = tl.minimum(tl.maximum((full_low + BLOCK_N - 1) // BLOCK_N, begin), stop)
    full_stop = tl.minimum(tl.maximum(full_high // BLOCK_N, full_begin), stop)
    full = full_stop - full_begin
    k_base += low * source.k_token
    v_base += low * source.v_token
    for i in range(full_begin, full_stop):
        place_N = tl.cast(i, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        k, k_high = load_keys(k_base, place_N * source.k_token, place_N, D, D_PAD, H_PAD, HALVES, False)
        v = load_columns(v_base, place_N * source.v_token, place_N, 0, D, D_PAD, False)
        acc, acc_high, top, total, part = STEP(
            acc, acc_high, top, total, part, queries, k, k_high, v, place_N, start_M, end_M, scale, HALVES, False
        )
    for i in range(begin, stop - full):
        tile = tl.where(i < full_begin, i, i + full)
        begun = tile * BLOCK_N
        lane_N = tl.arange(0, BLOCK_N)
        inside_N = lane_N < keys - begun
        place_N = begun.to(tl.int64) + lane_N
        k, k_high = load_keys(k_base, place_N * source.k_token, inside_N, D, D_PAD, H_PAD, HALVES, True)
        v = load_columns(v_base, place_N * source.v_token, inside_N, 0, D, D_PAD, True)
        # counted within the tile, a thread's places are constants
        acc, acc_high, top, total, part = STEP(
            acc,
            acc_high,
            top,
            total,
            part,
            queries,
            k,
            k_high,
            v,
            lane_N,
            start_M - begun,
            end_M - begun,
            scale,
            HALVES,
            True,
        )
    return acc, acc_high, top, total, part


@triton.jit
def visit_paged(
    acc, acc_high, top, total, part, queries, tile, tokens, group, source, b, g, scale, share, shares,
    S: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, H_PAD: tl.constexpr, HALVES: tl.constexpr, J: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Step over the table rows of the tile's groups, several table entries to a tile where blocks are small; of
    `shares` equal shares of the work, number `share`. Rows of other groups than the one at hand are masked."""
    token_M, _, _ = tile_rows(tile, tokens, J, BLOCK_M)
    first, last = tile_tokens(tile, tokens, J, BLOCK_M)
    if group is not None:
        group_M = (tl.load(group + token_M) * source.by_group).to(tl.int32)
        first_group = tl.load(group + first).to(tl.int64) * source.by_group
        last_group = tl.load(group + last).to(tl.int64) * source.by_group
    else:
        group_M = tl.zeros_like(token_M).to(tl.int32)
        first_group, last_group = tl.zeros_like(first), tl.zeros_like(last)
    k_base = source.k + b * source.k_batch + g * source.k_head
    v_base = source.v + b * source.v_batch + g * source.v_head
    tiles = tl.cast((source.size + BLOCK_N - 1) // BLOCK_N, tl.int32)
    steps = (last_group - first_group + 1).to(tl.int32) * tiles
    for i in range(steps * share // shares, steps * (share + 1) // shares):
        row = first_group + tl.cast(i // tiles, tl.int64)
        place_N = tl.cast(i % tiles, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        seen_N, k_offset_N, v_offset_N = paged_keys(source, b, row, place_N, S)
        k, k_high = load_keys(k_base, k_offset_N, seen_N, D, D_PAD, H_PAD, HALVES, True)
        v = load_columns(v_base, v_offset_N, seen_N, 0, D, D_PAD, True)
        if source.cos is not None:
            k, k_high = rotate(k, k_high, load_rotation(source, place_N, seen_N, D, H_PAD))
        row_N = tl.where(seen_N, row, -1).to(tl.int32)
        acc, acc_high, top, total, part = STEP(
            acc, acc_high, top, total, part, queries, k, k_high, v, row_N, group_M, group_M + 1, scale, HALVES, True
        )
    return acc, acc_high, top, total, part


@triton.jit
def visit(
    acc, acc_high, top, total, part, queries, tile, tokens, group, source, b, g, scale, share, shares,
    S: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, H_PAD: tl.constexpr, HALVES: tl.constexpr, J: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Step over a source: a band if S is 0, else a pool of blocks of S tokens."""
    if S == 0:
        acc, acc_high, top, total, part = visit_band(
            acc, acc_high, top, total, part, queries, tile, tokens, group, source, b, g, scale, share, shares,
            D, D_PAD, H_PAD, HALVES, J, BLOCK_M, BLOCK_N, STEP,
        )  # fmt: skip
    else:
        acc, acc_high, top, total, part = visit_paged(
            acc, acc_high, top, total, part, queries, tile, tokens, group, source, b, g, scale, share, shares,
            S, D, D_PAD, H_PAD, HALVES, J, BLOCK_M, BLOCK_N, STEP,
        )  # fmt: skip
    return acc, acc_high, top, total, part
