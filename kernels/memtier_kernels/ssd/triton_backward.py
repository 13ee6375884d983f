"""Backward: gradients of every input, from the states before each chunk and the gradients of those after it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from memtier_kernels.launch import launch
from memtier_kernels.ssd.triton_chunks import Chunks, Decays, decays, locate, padded, plan
from memtier_kernels.ssd.triton_states import kept_gradients, kept_states
from memtier_kernels.triton_tuning import config, tuned

__all__ = ["backward"]


def backward(
    dy: torch.Tensor, dlast: torch.Tensor, dlog: torch.Tensor,
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None,
    state: torch.Tensor | None, cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Gradients of x, dt, A, B, C, D (empty if absent) and the first states.

    Args:
        dy, dlast, dlog: gradients of y, of the last states and of the total log decays.
    """
    chunks = plan(x, cu_seqlens)
    sums = decays(dt, A, chunks)
    kept, _, _ = kept_states(x, B, state, sums, chunks)
    grads, dfirst, through = kept_gradients(dy, C, dlast, sums, chunks, kept)
    dx, direct, skips = _inputs(dy, x, B, C, D, grads, sums, chunks)
    weights, crossing = _pairs(dy, x, B, C, sums, chunks)
    dC, left = _project(dy, kept, C, B, weights, sums, chunks, towards_end=False)
    dB, entered = _project(x, grads, B, C, weights, sums, chunks, towards_end=True)
    ddt, dA = _finish(dt, A, direct, crossing, left, entered, through, dlog, sums, chunks)
    dD = dx.new_empty(0) if D is None else skips.sum((0, 1)).to(D.dtype)
    return dx, ddt, dA, dB, dC, dD, dfirst


def _pairs(
    dy: torch.Tensor, x: torch.Tensor, B: torch.Tensor, C: torch.Tensor, sums: Decays, chunks: Chunks
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """From pairs of tokens within a chunk: the weights that give dB and dC, (chunks, G, splits, Q, Q), a sum over the
    heads of each split; the gradient of log decays, (chunks, H, Q)."""
    _, tokens, heads, head = x.shape
    groups, size = B.shape[2:]
    J = heads // groups
    each = chunks.heads_each(groups, J)
    splits = triton.cdiv(J, each)
    weights = torch.empty(chunks.total, groups, splits, chunks.Q, chunks.Q, dtype=x.dtype, device=x.device)
    crossing = torch.empty_like(sums.dt)
    launch(
        _weights, (splits * groups * chunks.total,), x, dy, B, C, sums.dt, sums.high, sums.low, chunks.table, weights,
        crossing, *x.stride()[:3], *dy.stride()[:3], *B.stride()[:3], *C.stride()[:3],
        tokens, chunks.each, heads, J, head, size, each,
        Q=chunks.Q, PADDED_P=padded(head), PADDED_N=padded(size), EXACT=x.dtype == torch.float32,
        PACKED=chunks.table is not None,
    )  # fmt: skip
    return weights, crossing


def _inputs(
    dy: torch.Tensor, x: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None, grads: torch.Tensor,
    sums: Decays, chunks: Chunks,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dx; the gradient of dt as a factor of x, (tiles, chunks, H, Q), a sum over tiles yet to be taken; dD likewise,
    (tiles, chunks, H)."""
    _, tokens, heads, head = x.shape
    groups, size = B.shape[2:]
    J = heads // groups
    each = chunks.heads_each(groups, J)
    wide = x.dtype == torch.float32
    rows = min(32 if wide else 64, padded(head))
    tiles = triton.cdiv(head, rows)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    direct = torch.empty(tiles, *sums.dt.shape, dtype=torch.float32, device=x.device)
    skips = torch.empty(tiles, chunks.total, heads, dtype=torch.float32, device=x.device)
    launch(
        _dx, (triton.cdiv(J, each) * groups * tiles * chunks.total,), x, dy, B, C, D, grads, sums.dt, sums.high,
        sums.low, sums.whole, chunks.table, dx, direct, skips,
        *x.stride()[:3], *dy.stride()[:3], *B.stride()[:3], *C.stride()[:3], 0 if D is None else D.stride(0),
        *dx.stride()[:3], tokens, chunks.each, chunks.total, heads, J, head, size, each,
        Q=chunks.Q, PADDED_N=padded(size), BLOCK_P=rows, EXACT=wide, PACKED=chunks.table is not None,
    )  # fmt: skip
    return dx, direct, skips


def _project(
    v: torch.Tensor, states: torch.Tensor, own: torch.Tensor, other: torch.Tensor, weights: torch.Tensor,
    sums: Decays, chunks: Chunks, *, towards_end: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradient of `own` (B, T, G, N), and of log decays by what came from, or goes to, other chunks, (tiles,
    chunks, H, Q), a sum over tiles yet to be taken.

    Args:
        v, states: dy and the states before chunks, for C; x and the gradients of the states after them, for B.
        other: B for C and C for B.
        towards_end: B.
    """
    batch, tokens, heads, head = v.shape
    groups, size = own.shape[2:]
    J, splits = heads // groups, weights.shape[2]
    each = chunks.heads_each(groups, J)
    wide = v.dtype == torch.float32
    rows, columns = padded(head), min(64, padded(size))
    count = triton.cdiv(size, columns)
    out = torch.empty(
        splits, batch, tokens, groups, size, dtype=own.dtype if splits == 1 else torch.float32, device=v.device
    )
    flow = torch.empty(count, chunks.total, heads, chunks.Q, dtype=torch.float32, device=v.device)
    launch(
        _projections, (count * splits * groups * chunks.total,), v, states, own, other, weights, sums.dt, sums.high,
        sums.low, sums.whole, chunks.table, out, flow,
        *v.stride()[:3], *own.stride()[:3], *other.stride()[:3], *out.stride()[:4], tokens, chunks.each, chunks.total,
        heads, J, head, size, each, splits,
        Q=chunks.Q, PADDED_P=rows, BLOCK_P=min(32 if wide else 128, rows), BLOCK_N=columns,
        TOWARDS_END=towards_end, PACKED=chunks.table is not None,
    )  # fmt: skip
    return (out[0] if splits == 1 else out.sum(0).to(own.dtype)), flow


def _finish(
    dt: torch.Tensor, A: torch.Tensor, direct: torch.Tensor, crossing: torch.Tensor, left: torch.Tensor,
    entered: torch.Tensor, through: torch.Tensor, dlog: torch.Tensor, sums: Decays, chunks: Chunks,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of dt and A."""
    tokens, heads = dt.shape[1:]
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=dt.device)
    rates = torch.empty(chunks.total, heads, dtype=torch.float32, device=dt.device)
    block = min(8, triton.next_power_of_2(heads))
    launch(
        _decays_backward, (chunks.total * triton.cdiv(heads, block),), A, direct, crossing, left, entered, through,
        dlog, sums.dt, chunks.table, ddt, rates, A.stride(0), *dlog.stride(), *ddt.stride(), tokens, chunks.each,
        chunks.total, heads, direct.shape[0], left.shape[0], entered.shape[0], through.shape[0],
        Q=chunks.Q, BLOCK_H=block, PACKED=chunks.table is not None, num_warps=4,
    )  # fmt: skip
    return ddt, rates.sum(0).to(A.dtype)


def _fits(one: triton.Config, arguments: dict[str, Any]) -> bool:
    columns, size = one.kwargs["BLOCK_N"], arguments["PADDED_N"]
    if size < 64 or arguments["EXACT"]:
        # a loop of one step is no loop: all of it at once takes more registers
        return columns == 32 and one.num_warps == (8 if size <= 32 else 4)
    return 32 < columns <= size


@tuned(
    [
        config(warps=4, stages=2, BLOCK_P=32),
        config(warps=8, stages=2, BLOCK_P=32),
        config(warps=8, stages=2, BLOCK_P=64),
    ],
    key=["P", "N", "Q"],
    prune=lambda one, arguments: one.num_warps == (4 if arguments["EXACT"] else 8),
)
@triton.jit(do_not_specialize=["tokens", "each", "heads_each"])
def _weights(
    x, dy, B, C, dt, high, low, table, weights, crossing,
    x_b, x_t, x_h, dy_b, dy_t, dy_h, B_b, B_t, B_g, C_b, C_t, C_g, tokens, each, H, J, P, N, heads_each,
    Q: tl.constexpr, PADDED_P: tl.constexpr, PADDED_N: tl.constexpr, BLOCK_P: tl.constexpr, EXACT: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    splits = tl.cdiv(J, heads_each)
    split = pid % splits
    g = (pid // splits % (H // J)).to(tl.int64)
    c = pid // splits // (H // J)
    batch, _, start, count, _, _ = locate(table, c, tokens, each, Q, PACKED)
    c = c.to(tl.int64)
    i, j = tl.arange(0, Q), tl.arange(0, Q)
    n, p = tl.arange(0, 32), tl.arange(0, BLOCK_P)
    ok = i < count
    rows = start + i
    both_ij = tl.zeros([Q, Q], tl.float32)
    for first in range(0, PADDED_N, 32):
        row_ok = ok[:, None] & (n < N - first)[None, :]
        at = (first + n)[None, :]
        C_iN = tl.load(C + batch * C_b + g * C_g + (rows * C_t)[:, None] + at, mask=row_ok, other=0.0)
        B_jN = tl.load(B + batch * B_b + g * B_g + (rows * B_t)[:, None] + at, mask=row_ok, other=0.0)
        both_ij = tl.dot(C_iN, tl.trans(B_jN), both_ij, input_precision="tf32x3")
    both_ij = tl.where(i[:, None] > j[None, :], both_ij, 0.0)

    weights_ij = tl.zeros([Q, Q], tl.float32)
    # sums over pairs need no more digits than 16-bit inputs have, but may be larger than float16 reaches
    from_here_on = (i[:, None] <= j[None, :]).to(tl.float32 if EXACT else tl.bfloat16)
    for k in range(split * heads_each, tl.minimum((split + 1) * heads_each, J)):
        h = g * J + tl.cast(k, tl.int64)
        weight_ij = tl.zeros([Q, Q], tl.float32)
        for first in range(0, PADDED_P, BLOCK_P):
            token_ok = ok[:, None] & (p < P - first)[None, :]
            at = (first + p)[None, :]
            x_jP = tl.load(x + batch * x_b + h * x_h + (rows * x_t)[:, None] + at, mask=token_ok, other=0.0)
            dy_iP = tl.load(dy + batch * dy_b + h * dy_h + (rows * dy_t)[:, None] + at, mask=token_ok, other=0.0)
            weight_ij = tl.dot(dy_iP, tl.trans(x_jP), weight_ij, input_precision="tf32x3")
        at = (c * H + h) * Q
        log_ij = tl.load(high + at + i)[:, None] - tl.load(high + at + j)[None, :]
        if EXACT:
            log_ij += tl.load(low + at + i)[:, None] - tl.load(low + at + j)[None, :]
        # above the diagonal this is only kept from overflowing
        weight_ij *= tl.exp2(tl.minimum(log_ij, 0.0)) * tl.load(dt + at + j)[None, :]
        weights_ij += weight_ij
        # the pair (i, j) decays by every token after j up to i: sums over pairs, so that nothing cancels
        pair_ij = (weight_ij * both_ij).to(from_here_on.dtype)
        since_ij = tl.dot(from_here_on, pair_ij, input_precision="tf32x3")
        tl.store(crossing + at + i, tl.sum(tl.where(i[:, None] > j[None, :], since_ij, 0.0), axis=1))
    weights_ij = tl.where(i[:, None] >= j[None, :], weights_ij, 0.0)
    to = weights + ((c * (H // J) + g) * splits + split) * Q * Q + i[:, None] * Q + j[None, :]
    tl.store(to, weights_ij.to(weights.dtype.element_ty))


@tuned(
    [
        config(warps=8, stages=2, BLOCK_N=32),
        config(warps=4, stages=2, BLOCK_N=32),
        config(warps=8, stages=2, BLOCK_N=64),
        config(warps=8, stages=2, BLOCK_N=128),
    ],
    key=["P", "N", "Q"], prune=_fits,
)  # fmt: skip
@triton.jit(do_not_specialize=["tokens", "each", "total", "heads_each"])
def _dx(
    x, dy, B, C, D, grads, dt, high, low, whole, table, dx, direct, skips,
    x_b, x_t, x_h, dy_b, dy_t, dy_h, B_b, B_t, B_g, C_b, C_t, C_g, D_h, dx_b, dx_t, dx_h,
    tokens, each, total, H, J, P, N, heads_each,
    Q: tl.constexpr, PADDED_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    splits = tl.cdiv(J, heads_each)
    split = pid % splits
    g = (pid // splits % (H // J)).to(tl.int64)
    pid = pid // splits // (H // J)
    tiles = tl.cdiv(P, BLOCK_P)
    tile = pid % tiles
    c = pid // tiles
    batch, _, start, count, _, _ = locate(table, c, tokens, each, Q, PACKED)
    c = c.to(tl.int64)
    i, j = tl.arange(0, Q), tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    ok, p_ok = i < count, p < P
    token_ok = ok[:, None] & p_ok[None, :]
    rows = start + i
    at_C = C + batch * C_b + g * C_g + (rows * C_t)[:, None] + n[None, :]
    at_B = B + batch * B_b + g * B_g + (rows * B_t)[:, None] + n[None, :]
    both_ji = tl.zeros([Q, Q], tl.float32)
    for first in range(0, PADDED_N, BLOCK_N):
        row_ok = ok[:, None] & (n < N - first)[None, :]
        B_jN = tl.load(at_B + first, mask=row_ok, other=0.0)
        C_iN = tl.load(at_C + first, mask=row_ok, other=0.0)
        both_ji = tl.dot(B_jN, tl.trans(C_iN), both_ji, input_precision="tf32x3")
    both_ji = tl.where(i[None, :] >= j[:, None], both_ji, 0.0)

    for k in range(split * heads_each, tl.minimum((split + 1) * heads_each, J)):
        h = g * J + tl.cast(k, tl.int64)
        of_chunk = c * H + h
        # what x_j dt_j gets from the end of the chunk
        into_jP = tl.zeros([Q, BLOCK_P], tl.float32)
        for first in range(0, PADDED_N, BLOCK_N):
            n_ok = n < N - first
            B_jN = tl.load(at_B + first, mask=ok[:, None] & n_ok[None, :], other=0.0)
            G_PN = tl.load(
                grads + of_chunk * P * N + first + (p * N)[:, None] + n[None, :], mask=p_ok[:, None] & n_ok[None, :],
                other=0.0,
            )  # fmt: skip
            into_jP = tl.dot(B_jN, tl.trans(G_PN), into_jP, input_precision="tf32x3")
        at = of_chunk * Q
        high_i, high_j, low_j = tl.load(high + at + i), tl.load(high + at + j), tl.load(low + at + j)
        log_whole = tl.load(whole + of_chunk)
        last = log_whole.to(tl.float32)
        rest = (log_whole - last.to(tl.float64)).to(tl.float32)
        into_jP *= tl.exp2((last - high_j) + (rest - low_j))[:, None]
        # and from within it
        log_ji = high_i[None, :] - high_j[:, None]
        if EXACT:
            log_ji += tl.load(low + at + i)[None, :] - low_j[:, None]
        near_ji = tl.exp2(tl.minimum(log_ji, 0.0)) * both_ji
        dy_iP = tl.load(dy + batch * dy_b + h * dy_h + (rows * dy_t)[:, None] + p[None, :], mask=token_ok, other=0.0)
        into_jP = tl.dot(near_ji.to(dy_iP.dtype), dy_iP, into_jP, input_precision="tf32x3")

        x_jP = tl.load(x + batch * x_b + h * x_h + (rows * x_t)[:, None] + p[None, :], mask=token_ok, other=0.0)
        to = tile.to(tl.int64) * total * H + of_chunk
        tl.store(direct + to * Q + j, tl.sum(into_jP * x_jP.to(tl.float32), axis=1))
        dx_jP = into_jP * tl.load(dt + at + j)[:, None]
        if D is not None:
            dx_jP += tl.load(D + h * D_h).to(tl.float32) * dy_iP.to(tl.float32)
            tl.store(skips + to, tl.sum(tl.sum(x_jP.to(tl.float32) * dy_iP.to(tl.float32), axis=1), axis=0))
        to = dx + batch * dx_b + h * dx_h + (rows * dx_t)[:, None] + p[None, :]
        tl.store(to, dx_jP.to(dx.dtype.element_ty), mask=token_ok)


@tuned([config(warps=4, stages=2), config(warps=8, stages=2)], key=["P", "N", "Q", "TOWARDS_END"])
@triton.jit(do_not_specialize=["tokens", "each", "total", "heads_each", "splits"])
def _projections(
    v, states, own, other, weights, dt, high, low, whole, table, out, flow,
    v_b, v_t, v_h, own_b, own_t, own_g, other_b, other_t, other_g, out_s, out_b, out_t, out_g,
    tokens, each, total, H, J, P, N, heads_each, splits,
    Q: tl.constexpr, PADDED_P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, TOWARDS_END: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles = tl.cdiv(N, BLOCK_N)
    tile = pid % tiles
    split = pid // tiles % splits
    g = (pid // tiles // splits % (H // J)).to(tl.int64)
    c = pid // tiles // splits // (H // J)
    batch, _, start, count, _, _ = locate(table, c, tokens, each, Q, PACKED)
    c = c.to(tl.int64)
    i, j = tl.arange(0, Q), tl.arange(0, Q)
    p = tl.arange(0, BLOCK_P)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ok, n_ok = i < count, n < N
    row_ok = ok[:, None] & n_ok[None, :]
    rows = start + i

    at = weights + ((c * (H // J) + g) * splits + split) * Q * Q
    weights_ij = tl.load(at + (j[None, :] * Q + i[:, None] if TOWARDS_END else i[:, None] * Q + j[None, :]))
    other_jN = tl.load(
        other + batch * other_b + g * other_g + (rows * other_t)[:, None] + n[None, :], mask=row_ok, other=0.0
    )
    out_iN = tl.dot(weights_ij, other_jN, input_precision="tf32x3")
    own_iN = tl.load(own + batch * own_b + g * own_g + (rows * own_t)[:, None] + n[None, :], mask=row_ok, other=0.0)
    for k in range(split * heads_each, tl.minimum((split + 1) * heads_each, J)):
        h = g * J + tl.cast(k, tl.int64)
        of_chunk = c * H + h
        at_v = v + batch * v_b + h * v_h + (rows * v_t)[:, None] + p[None, :]
        at_S = states + of_chunk * P * N + (p * N)[:, None] + n[None, :]
        far_iN = tl.zeros([Q, BLOCK_N], tl.float32)
        for first in range(0, PADDED_P, BLOCK_P):
            p_ok = p < P - first
            v_iP = tl.load(at_v + first, mask=ok[:, None] & p_ok[None, :], other=0.0)
            S_PN = tl.load(at_S + first * N, mask=p_ok[:, None] & n_ok[None, :], other=0.0)
            far_iN = tl.dot(v_iP, S_PN, far_iN, input_precision="tf32x3")
        high_i = tl.load(high + of_chunk * Q + i)
        if TOWARDS_END:
            log_whole = tl.load(whole + of_chunk)
            last = log_whole.to(tl.float32)
            rest = (log_whole - last.to(tl.float64)).to(tl.float32)
            weight_i = tl.exp2((last - high_i) + (rest - tl.load(low + of_chunk * Q + i)))
            weight_i *= tl.load(dt + of_chunk * Q + i)
        else:
            weight_i = tl.exp2(high_i)
        far_iN *= weight_i[:, None]
        tl.store(
            flow + ((tile.to(tl.int64) * total + c) * H + h) * Q + i, tl.sum(far_iN * own_iN.to(tl.float32), axis=1)
        )
        out_iN += far_iN
    to = out + split.to(tl.int64) * out_s + batch * out_b + g * out_g + (rows * out_t)[:, None] + n[None, :]
    tl.store(to, out_iN.to(out.dtype.element_ty), mask=row_ok)


@triton.jit(
    do_not_specialize=["tokens", "each", "total", "direct_tiles", "left_tiles", "entered_tiles", "through_tiles"]
)
def _decays_backward(
    A, direct, crossing, left, entered, through, dlog, dt, table, ddt, rates,
    A_h, dlog_s, dlog_h, ddt_b, ddt_t, ddt_h, tokens, each, total, H, direct_tiles, left_tiles,
    entered_tiles, through_tiles,
    Q: tl.constexpr, BLOCK_H: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    blocks = tl.cdiv(H, BLOCK_H)
    c = pid // blocks
    batch, sequence, start, count, _, _ = locate(table, c, tokens, each, Q, PACKED)
    c = c.to(tl.int64)
    h = pid % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, Q)
    h_ok = h < H
    ok = h_ok[:, None] & (i < count)[None, :]
    of_chunk = c * H + h
    inside = (of_chunk * Q)[:, None] + i[None, :]
    per_head = tl.cast(total, tl.int64) * H

    # every pair of a source and a sink on both sides of token i decays by it
    passing = tl.load(dlog + sequence * dlog_s + h * dlog_h, mask=h_ok, other=0.0).to(tl.float32)
    for k in range(through_tiles):
        passing += tl.load(through + k * per_head + of_chunk, mask=h_ok, other=0.0)
    to_later = tl.zeros([BLOCK_H, Q], tl.float32)
    for k in range(left_tiles):
        to_later += tl.load(left + k * per_head * Q + inside, mask=ok, other=0.0)
    from_earlier = tl.zeros([BLOCK_H, Q], tl.float32)
    for k in range(entered_tiles):
        from_earlier += tl.load(entered + k * per_head * Q + inside - 1, mask=ok & (i > 0)[None, :], other=0.0)
    d_decay = tl.load(crossing + inside, mask=ok, other=0.0) + passing[:, None]
    d_decay += tl.cumsum(to_later, axis=1, reverse=True) + tl.cumsum(from_earlier, axis=1)

    rate = tl.load(A + h * A_h, mask=h_ok, other=0.0).to(tl.float32)
    step = tl.load(dt + inside, mask=ok, other=0.0)
    d_step = rate[:, None] * d_decay
    for k in range(direct_tiles):
        d_step += tl.load(direct + k * per_head * Q + inside, mask=ok, other=0.0)
    to = ddt + batch * ddt_b + ((start + i) * ddt_t)[None, :] + (h * ddt_h)[:, None]
    tl.store(to, d_step.to(ddt.dtype.element_ty), mask=ok)
    tl.store(rates + of_chunk, tl.sum(tl.where(ok, step * d_decay, 0.0), axis=1), mask=h_ok)
