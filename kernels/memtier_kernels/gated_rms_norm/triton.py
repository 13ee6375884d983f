"""The kernels: a row in registers; rows too long for the backward's registers in two sweeps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memtier_kernels.launch import dense, launch

__all__ = ["backward", "forward"]

Tensor = torch.Tensor

# the longest row whose tensors and sums the backward holds in registers
_WHOLE_ROW = 8192
# programs of the backward, so rows of the partial buffer: four rows at a time on each multiprocessor of a large GPU
_PROGRAMS = 528


def forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The normed rows, and one over the root mean square of each, (B, T) float32."""
    x, gate = dense(x), dense(gate)
    batch, tokens, size = x.shape
    y = torch.empty(batch, tokens, size, dtype=dtype, device=x.device)
    inverse = torch.empty(batch, tokens, dtype=torch.float32, device=x.device)
    block = max(16, triton.next_power_of_2(size))
    launch(
        _forward, (batch * tokens,), x, gate, weight.contiguous(), y, inverse, *x.stride()[:2], *gate.stride()[:2],
        tokens, size, eps, BLOCK_E=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return y, inverse


def backward(dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, gate and weight."""
    dy, x, gate, weight = dense(dy), dense(x), dense(gate), weight.contiguous()
    batch, tokens, size = x.shape
    rows = batch * tokens
    dx, dgate = x.new_empty(x.shape), gate.new_empty(gate.shape)
    strides = (*dy.stride()[:2], *x.stride()[:2], *gate.stride()[:2])
    whole = size <= _WHOLE_ROW
    block = max(16, triton.next_power_of_2(size)) if whole else 1024
    # short rows: more of them at a time
    each = triton.cdiv(rows, _PROGRAMS * max(1, min(4, 4096 // block))) if whole else triton.cdiv(rows, _PROGRAMS)
    each = max(1, each)
    programs = triton.cdiv(rows, each)
    partial = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    sums = None
    if not whole:
        sums = torch.empty(rows, dtype=torch.float32, device=x.device)
        launch(
            _row_sums, (rows,), dy, x, gate, weight, inverse, sums, *strides, tokens, size, BLOCK_E=block, num_warps=4
        )
    launch(
        _backward, (programs, triton.cdiv(size, block)), dy, x, gate, weight, inverse, sums, dx, dgate, partial,
        *strides, rows, each, tokens, size, BLOCK_E=block, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return dx, dgate, partial.sum(0).to(weight.dtype)


@triton.jit
def _forward(
    x, gate, weight, y, inverse, x_b, x_t, g_b, g_t, tokens, size, eps, BLOCK_E: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b, t = row // tokens, row % tokens
    column = tl.arange(0, BLOCK_E)
    ok = column < size
    value = tl.load(x + b * x_b + t * x_t + column, mask=ok, other=0.0).to(tl.float32)
    opening = tl.load(gate + b * g_b + t * g_t + column, mask=ok, other=0.0).to(tl.float32)
    u = value * opening * tl.sigmoid(opening)
    scale = tl.rsqrt(tl.sum(u * u, 0) / size + eps)
    tl.store(inverse + row, scale)
    gain = tl.load(weight + column, mask=ok, other=0.0).to(tl.float32)
    tl.store(y + row * size + column, (u * scale * gain).to(y.dtype.element_ty), mask=ok)


@triton.jit
def _load_row(dy, x, gate, row, column, ok, dy_b, dy_t, x_b, x_t, g_b, g_t, tokens):
    """Of one row: the output's gradient, x, the gate, its sigmoid."""
    b, t = row // tokens, row % tokens
    flow = tl.load(dy + b * dy_b + t * dy_t + column, mask=ok, other=0.0).to(tl.float32)
    value = tl.load(x + b * x_b + t * x_t + column, mask=ok, other=0.0).to(tl.float32)
    opening = tl.load(gate + b * g_b + t * g_t + column, mask=ok, other=0.0).to(tl.float32)
    return flow, value, opening, tl.sigmoid(opening)


@triton.jit
def _row_sums(
    dy, x, gate, weight, inverse, sums, dy_b, dy_t, x_b, x_t, g_b, g_t, tokens, size, BLOCK_E: tl.constexpr
):  # fmt: skip
    """The mean over a row of the gradient of its normed values times these values."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK_E], tl.float32)
    for first in range(0, size, BLOCK_E):
        column = first + tl.arange(0, BLOCK_E)
        ok = column < size
        flow, value, opening, part = _load_row(
            dy, x, gate, row, column, ok, dy_b, dy_t, x_b, x_t, g_b, g_t, tokens
        )  # fmt: skip
        gain = tl.load(weight + column, mask=ok, other=0.0).to(tl.float32)
        total += flow * gain * value * opening * part
    tl.store(sums + row, tl.sum(total, 0) * tl.load(inverse + row) / size)


@triton.jit
def _backward(
    dy, x, gate, weight, inverse, sums, dx, dgate, partial, dy_b, dy_t, x_b, x_t, g_b, g_t, rows, each, tokens, size,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """`each` rows a program; `sums` of `_row_sums`, or None where a program holds whole rows and sums them itself."""
    begin = tl.program_id(0).to(tl.int64) * each
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    ok = column < size
    dgain = tl.zeros([BLOCK_E], tl.float32)
    for number in range(begin, tl.minimum(begin + each, rows)):
        row = tl.cast(number, tl.int64)
        flow, value, opening, part = _load_row(
            dy, x, gate, row, column, ok, dy_b, dy_t, x_b, x_t, g_b, g_t, tokens
        )  # fmt: skip
        scale = tl.load(inverse + row)
        silu = opening * part
        normed = value * silu * scale
        # silu'(gate) = s (1 + gate (1 - s))
        value *= part + silu * (1.0 - part)
        dgain += flow * normed
        # loaded in every row, since the registers are few and the cache is near
        flow *= tl.load(weight + column, mask=ok, other=0.0).to(tl.float32)
        if sums is None:
            mean = tl.sum(flow * normed, 0) / size
        else:
            mean = tl.load(sums + row)
        du = (flow - normed * mean) * scale
        tl.store(dx + row * size + column, (du * silu).to(dx.dtype.element_ty), mask=ok)
        tl.store(dgate + row * size + column, (du * value).to(dgate.dtype.element_ty), mask=ok)
    tl.store(partial + tl.program_id(0).to(tl.int64) * size + column, dgain, mask=ok)
