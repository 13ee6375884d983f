"""The kernels of innovation: sums over a row, and a gradient that needs no sum."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memtier_kernels.innovation.reference import EPSILON
from memtier_kernels.launch import dense, launch

__all__ = ["backward", "forward"]

Tensor = torch.Tensor

# numbers of each tensor that a program of four warps holds at a time
_TILE = 2048


def forward(h: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Innovation (B, T) and its denominator, in float32."""
    h, predicted = dense(h), dense(predicted)
    batch, tokens, size = h.shape
    e = torch.empty(batch, tokens, dtype=torch.float32, device=h.device)
    scale = torch.empty_like(e)
    rows, block = _tile(size)
    launch(
        _forward, (triton.cdiv(batch * tokens, rows),), h, predicted, e, scale, *h.stride()[:2],
        *predicted.stride()[:2], batch * tokens, tokens, size,
        EPS=EPSILON, ROWS=rows, BLOCK_E=block, num_warps=4,
    )  # fmt: skip
    return e, scale


def backward(
    de: Tensor, h: Tensor, predicted: Tensor, e: Tensor, scale: Tensor, of_h: bool, of_predicted: bool
) -> tuple[Tensor, Tensor]:
    """The gradients that are asked for; the other is empty."""
    h, predicted = dense(h), dense(predicted)
    batch, tokens, size = h.shape
    dh = h.new_empty(h.shape if of_h else (0,))
    dpredicted = predicted.new_empty(predicted.shape if of_predicted else (0,))
    rows, block = _tile(size)
    launch(
        _backward, (triton.cdiv(batch * tokens, rows), triton.cdiv(size, block)), h, predicted, de, e, scale,
        dh if of_h else None, dpredicted if of_predicted else None, *h.stride()[:2], *predicted.stride()[:2],
        *de.stride(), batch * tokens, tokens, size, ROWS=rows, BLOCK_E=block, num_warps=4,
    )  # fmt: skip
    return dh, dpredicted


def _tile(size: int) -> tuple[int, int]:
    block = min(_TILE, max(16, triton.next_power_of_2(size)))
    return _TILE // block, block


@triton.jit
def _forward(
    h, predicted, e, scale, h_b, h_t, p_b, p_t, rows, tokens, size,
    EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    b, t = row // tokens, row % tokens
    h_row, p_row = (h + b * h_b + t * h_t)[:, None], (predicted + b * p_b + t * p_t)[:, None]
    off = tl.zeros([ROWS, BLOCK_E], tl.float32)
    whole = tl.zeros([ROWS, BLOCK_E], tl.float32)
    for first in range(0, size, BLOCK_E):
        column = first + tl.arange(0, BLOCK_E)
        ok = exists[:, None] & (column < size)[None, :]
        value = tl.load(h_row + column[None, :], mask=ok, other=0.0).to(tl.float32)
        miss = value - tl.load(p_row + column[None, :], mask=ok, other=0.0).to(tl.float32)
        off += miss * miss
        whole += value * value
    below = tl.sum(whole, 1) + EPS
    tl.store(e + row, tl.sum(off, 1) / below, mask=exists)  # pyright: ignore[reportOperatorIssue]
    tl.store(scale + row, below, mask=exists)


@triton.jit
def _backward(
    h, predicted, de, e, scale, dh, dpredicted, h_b, h_t, p_b, p_t, de_b, de_t, rows, tokens, size,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    b, t = row // tokens, row % tokens
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    ok = exists[:, None] & (column < size)[None, :]
    flow = tl.load(de + b * de_b + t * de_t, mask=exists, other=0.0).to(tl.float32)
    flow *= 2.0 / tl.load(scale + row, mask=exists, other=1.0)
    value = tl.load((h + b * h_b + t * h_t)[:, None] + column[None, :], mask=ok, other=0.0).to(tl.float32)
    other = tl.load((predicted + b * p_b + t * p_t)[:, None] + column[None, :], mask=ok, other=0.0)
    miss = value - other.to(tl.float32)
    at = (row * size)[:, None] + column[None, :]
    if dh is not None:
        share = tl.load(e + row, mask=exists, other=0.0)
        tl.store(dh + at, (flow[:, None] * (miss - share[:, None] * value)).to(dh.dtype.element_ty), mask=ok)
    if dpredicted is not None:
        tl.store(dpredicted + at, (-flow[:, None] * miss).to(dpredicted.dtype.element_ty), mask=ok)
