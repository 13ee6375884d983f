"""Forward: the outputs of each chunk, from the state before it and from within it."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from memtier_kernels.launch import launch
from memtier_kernels.ssd.triton_chunks import decays, locate, padded, plan
from memtier_kernels.ssd.triton_states import kept_states
from memtier_kernels.triton_tuning import config, tuned

__all__ = ["forward"]


def forward(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None,
    state: torch.Tensor | None, cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """See `memtier_kernels.ssd`; the last axis of x, B and C is dense."""
    _, tokens, heads, head = x.shape
    groups, size = B.shape[2:]
    chunks = plan(x, cu_seqlens)
    sums = decays(dt, A, chunks)
    kept, last, log_decay = kept_states(x, B, state, sums, chunks)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    each = chunks.heads_each(groups, heads // groups)

    programs = groups * triton.cdiv(heads // groups, each) * chunks.total
    launch(
        _outputs, lambda meta: (programs * triton.cdiv(head, meta["BLOCK_P"]),),
        x, B, C, D, kept, sums.dt, sums.high, sums.low, chunks.table, y,
        *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], 0 if D is None else D.stride(0), *y.stride()[:3],
        tokens, chunks.each, heads, heads // groups, head, size, each,
        Q=chunks.Q, PADDED_P=padded(head), PADDED_N=padded(size),
        EXACT=x.dtype == torch.float32, PACKED=chunks.table is not None,
    )  # fmt: skip
    return y, last, log_decay


def _fits(one: triton.Config, arguments: dict[str, Any]) -> bool:
    columns, size = one.kwargs["BLOCK_N"], arguments["PADDED_N"]
    small = min(arguments["PADDED_P"], size) < 64
    if small or arguments["EXACT"]:
        # a loop of one step is no loop: all of it at once takes more registers
        return columns == 32 and one.num_warps == (8 if size <= 32 else 4)
    # registers end where a wide tile is not the whole row
    return columns > 32 and (one.num_warps == 8 or columns < 128 or columns == size) and columns <= size


@tuned(
    [
        config(warps=8, stages=2, BLOCK_P=32, BLOCK_N=32),
        config(warps=4, stages=2, BLOCK_P=32, BLOCK_N=32),
        config(warps=4, stages=2, BLOCK_P=64, BLOCK_N=64),
        config(warps=4, stages=2, BLOCK_P=64, BLOCK_N=128),
        config(warps=8, stages=2, BLOCK_P=64, BLOCK_N=128),
    ],
    key=["P", "N", "Q"], prune=_fits,
)  # fmt: skip
@triton.jit(do_not_specialize=["tokens", "each", "heads_each"])
def _outputs(
    x, B, C, D, kept, dt, high, low, table, y,
    x_b, x_t, x_h, B_b, B_t, B_g, C_b, C_t, C_g, D_h, y_b, y_t, y_h, tokens, each, H, J, P, N, heads_each,
    Q: tl.constexpr, PADDED_P: tl.constexpr, PADDED_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    # of one chunk: programs of other heads run next to each other, and find B and C in the cache
    splits = tl.cdiv(J, heads_each)
    split = pid % splits
    g = (pid // splits % (H // J)).to(tl.int64)
    pid = pid // splits // (H // J)
    tiles = tl.cdiv(P, BLOCK_P)
    p = pid % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    c = pid // tiles
    batch, _, start, count, _, _ = locate(table, c, tokens, each, Q, PACKED)
    c = c.to(tl.int64)
    i, j = tl.arange(0, Q), tl.arange(0, Q)
    n = tl.arange(0, BLOCK_N)
    ok, p_ok = i < count, p < P
    token_ok = ok[:, None] & p_ok[None, :]
    rows = start + i
    at_C = C + batch * C_b + g * C_g + (rows * C_t)[:, None] + n[None, :]
    at_B = B + batch * B_b + g * B_g + (rows * B_t)[:, None] + n[None, :]

    both_ij = tl.zeros([Q, Q], tl.float32)
    for first in range(0, PADDED_N, BLOCK_N):
        row_ok = ok[:, None] & (n < N - first)[None, :]
        C_iN = tl.load(at_C + first, mask=row_ok, other=0.0)
        B_jN = tl.load(at_B + first, mask=row_ok, other=0.0)
        both_ij = tl.dot(C_iN, tl.trans(B_jN), both_ij, input_precision="tf32x3")
    # Masked here, once: a mask within the loop would live in registers. In there, what lies above the diagonal is only
    # kept from overflowing.
    both_ij = tl.where(i[:, None] >= j[None, :], both_ij, 0.0)

    for k in range(split * heads_each, tl.minimum((split + 1) * heads_each, J)):
        h = g * J + tl.cast(k, tl.int64)
        of_chunk = c * H + h
        # from before the chunk
        y_iP = tl.zeros([Q, BLOCK_P], tl.float32)
        for first in range(0, PADDED_N, BLOCK_N):
            n_ok = n < N - first
            C_iN = tl.load(at_C + first, mask=ok[:, None] & n_ok[None, :], other=0.0)
            S_PN = tl.load(
                kept + of_chunk * P * N + first + (p * N)[:, None] + n[None, :], mask=p_ok[:, None] & n_ok[None, :],
                other=0.0,
            )  # fmt: skip
            y_iP = tl.dot(C_iN, tl.trans(S_PN), y_iP, input_precision="tf32x3")
        at = of_chunk * Q
        high_i, high_j = tl.load(high + at + i), tl.load(high + at + j)
        y_iP *= tl.exp2(high_i)[:, None]
        # from within it
        log_ij = high_i[:, None] - high_j[None, :]
        if EXACT:
            log_ij += tl.load(low + at + i)[:, None] - tl.load(low + at + j)[None, :]
        weight_ij = tl.exp2(tl.minimum(log_ij, 0.0)) * both_ij * tl.load(dt + at + j)[None, :]
        x_jP = tl.load(x + batch * x_b + h * x_h + (rows * x_t)[:, None] + p[None, :], mask=token_ok, other=0.0)
        y_iP = tl.dot(weight_ij.to(x_jP.dtype), x_jP, y_iP, input_precision="tf32x3")
        if D is not None:
            y_iP += tl.load(D + h * D_h).to(tl.float32) * x_jP.to(tl.float32)
        to = y + batch * y_b + h * y_h + (rows * y_t)[:, None] + p[None, :]
        tl.store(to, y_iP.to(y.dtype.element_ty), mask=token_ok)
