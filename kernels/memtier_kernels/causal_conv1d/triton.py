"""The kernels: a program walks along the tokens with the last inputs in registers, so each is loaded once.

Letters as in README.md. `seen` and `grads` below are tuples of (BLOCK_C,) vectors, oldest first.
"""

# Triton's compiler knows `a + (b,)` and not `(*a, b)`, and its types do not say that static_range is a range
# ruff: noqa: RUF005
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memtier_kernels.launch import dense, launch
from memtier_kernels.triton_tuning import config, tuned

__all__ = ["backward", "forward"]

Tensor = torch.Tensor

# programs that keep a large GPU busy: as many runs of tokens are cut
_PROGRAMS = 2048


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """See `memtier_kernels.causal_conv1d`."""
    x = dense(x)
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    y = x.new_empty(x.shape)
    new_tail = x.new_empty(batch, width - 1, channels)
    at_once = min(8, triton.next_power_of_2(max(tokens, 1)))
    run = _run_tokens(batch, tokens, channels, at_once)
    runs = max(1, triton.cdiv(tokens, run))
    launch(
        _forward, lambda c: (batch * runs, triton.cdiv(channels, c["BLOCK_C"])),
        x, weight, bias, tail, y, new_tail, *x.stride()[:2], *weight.stride(), *_strides(tail), tokens, channels, runs,
        run, triton.next_power_of_2(tokens), WIDTH=width, SILU=silu, AT_ONCE=at_once,
    )  # fmt: skip
    return y, new_tail


def backward(
    dy: Tensor, dnew_tail: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and tail; those of what is absent are empty."""
    x, dy, dnew_tail = dense(x), dense(dy), dense(dnew_tail)
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    at_once = min(8, triton.next_power_of_2(tokens + width - 1))
    # a run walks width - 1 tokens past its end, so it is cut that much shorter
    run = _run_tokens(batch, tokens, channels, at_once)
    run = run if run > width - 1 + at_once else run + at_once
    run -= width - 1
    runs = max(1, triton.cdiv(tokens, run))
    dx = x.new_empty(x.shape)
    dtail = None if tail is None else tail.new_empty(tail.shape)
    dbias = None if bias is None else bias.new_empty(bias.shape)
    partial = torch.empty(batch * runs, width + (bias is not None), channels, dtype=torch.float32, device=x.device)
    launch(
        _backward, lambda c: (batch * runs, triton.cdiv(channels, c["BLOCK_C"])),
        x, weight, bias, tail, dy, dnew_tail, dx, dtail, partial, *x.stride()[:2], *weight.stride(), *_strides(tail),
        *dy.stride()[:2], *dnew_tail.stride()[:2], tokens, channels, runs, run, triton.next_power_of_2(tokens),
        WIDTH=width, SILU=silu, AT_ONCE=at_once,
    )  # fmt: skip
    total = partial.sum(0)
    dweight = total[:width].t().to(weight.dtype, memory_format=torch.contiguous_format)
    if dbias is not None:
        dbias.copy_(total[width])
    nothing = x.new_empty(0)
    return dx, dweight, nothing if dbias is None else dbias, x.new_empty(0) if dtail is None else dtail


def _run_tokens(batch: int, tokens: int, channels: int, at_once: int) -> int:
    """Tokens a program walks: long runs load fewer inputs twice, but enough programs must be left."""
    run = triton.next_power_of_2(max(1, batch * tokens * triton.cdiv(channels, 256) // _PROGRAMS))
    return max(at_once, min(256, max(32, run)))


def _strides(tail: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if tail is None else (tail.stride(0), tail.stride(1), tail.stride(2))


@triton.jit
def _if(condition, c, channels):
    """Mask: the channels that exist, if a condition on the token holds."""
    return c < tl.where(condition, channels, 0)


@triton.jit
def _load_input(x, tail, t, c, channels, x_t, tail_w, tail_c, WIDTH: tl.constexpr):
    """The input at token t of one sequence in float32; a negative t lies in the tail."""
    value = tl.load(x + t * x_t + c, mask=_if(t >= 0, c, channels), other=0.0).to(tl.float32)
    if tail is not None:
        carried = tl.load(tail + (t + WIDTH - 1) * tail_w + c * tail_c, mask=_if(t < 0, c, channels), other=0.0)
        # rounded as the inputs are; one of the two is zero
        value += carried.to(x.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def _load_weights(weight, bias, c, ok, weight_c, weight_w, WIDTH: tl.constexpr):
    """The taps, oldest first, and the bias, in float32."""
    taps = ()
    for j in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight + c * weight_c + j * weight_w, mask=ok, other=0.0).to(tl.float32),)
    if bias is None:
        return taps, tl.zeros_like(taps[0])
    return taps, tl.load(bias + c, mask=ok, other=0.0).to(tl.float32)


_CONFIGS = [config(warps=2, BLOCK_C=256), config(warps=2, BLOCK_C=128), config(warps=4, BLOCK_C=512)]


@tuned(_CONFIGS, key=["tokens_class", "channels", "WIDTH"])
@triton.jit
def _forward(
    x, weight, bias, tail, y, new_tail, x_b, x_t, weight_c, weight_w, tail_b, tail_w, tail_c, tokens, channels, runs,
    run, tokens_class, WIDTH: tl.constexpr, SILU: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    b = pid // runs
    start = pid % runs * run
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = c < channels
    x += b * x_b
    if tail is not None:
        tail += b * tail_b
    y += b * tokens * channels
    taps, offset = _load_weights(weight, bias, c, ok, weight_c, weight_w, WIDTH)
    seen = ()
    for j in tl.static_range(WIDTH - 1):
        seen = seen + (_load_input(x, tail, start + (j - WIDTH + 1), c, channels, x_t, tail_w, tail_c, WIDTH),)
    stop = tl.minimum(start + run, tokens)
    for first in range(start, stop, AT_ONCE):
        # all loads before the first store: the compiler may not move a load across a store
        fresh = ()
        for u in tl.static_range(AT_ONCE):
            fresh = fresh + (tl.load(x + (first + u) * x_t + c, mask=_if(first + u < stop, c, channels), other=0.0),)
        for u in tl.static_range(AT_ONCE):
            seen = seen + (fresh[u].to(tl.float32),)
            z = offset
            for j in tl.static_range(WIDTH):
                z += taps[j] * seen[j]
            if SILU:
                z = z * tl.sigmoid(z)
            tl.store(y + (first + u) * channels + c, z.to(y.dtype.element_ty), mask=_if(first + u < stop, c, channels))
            seen = seen[1:]
    if stop == tokens:
        for j in tl.static_range(WIDTH - 1):
            last = _load_input(x, tail, stop + (j - WIDTH + 1), c, channels, x_t, tail_w, tail_c, WIDTH)
            tl.store(new_tail + (b * (WIDTH - 1) + j) * channels + c, last.to(new_tail.dtype.element_ty), mask=ok)


@tuned(_CONFIGS, key=["tokens_class", "channels", "WIDTH"])
@triton.jit
def _backward(
    x, weight, bias, tail, dy, dnew_tail, dx, dtail, partial, x_b, x_t, weight_c, weight_w, tail_b, tail_w, tail_c,
    dy_b, dy_t, dnew_b, dnew_w, tokens, channels, runs, run, tokens_class,
    WIDTH: tl.constexpr, SILU: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """At token t the gradient of z_t becomes known, and with it that of the input WIDTH - 1 tokens before."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // runs
    start = pid % runs * run
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = c < channels
    x += b * x_b
    if tail is not None:
        tail += b * tail_b
    dy += b * dy_b
    dnew_tail += b * dnew_b
    dx += b * tokens * channels
    taps, offset = _load_weights(weight, bias, c, ok, weight_c, weight_w, WIDTH)
    seen, grads, dtaps = (), (), ()
    for j in tl.static_range(WIDTH - 1):
        seen = seen + (_load_input(x, tail, start + (j - WIDTH + 1), c, channels, x_t, tail_w, tail_c, WIDTH),)
        grads = grads + (tl.zeros([BLOCK_C], tl.float32),)
    for _ in tl.static_range(WIDTH):
        dtaps = dtaps + (tl.zeros([BLOCK_C], tl.float32),)
    dbias = tl.zeros([BLOCK_C], tl.float32)
    stop = tl.minimum(start + run, tokens)
    for first in range(start, stop + (WIDTH - 1), AT_ONCE):
        inputs, flows = (), ()
        for u in tl.static_range(AT_ONCE):
            t = first + u
            inputs = inputs + (tl.load(x + t * x_t + c, mask=_if(t < tokens, c, channels), other=0.0),)
            flows = flows + (tl.load(dy + t * dy_t + c, mask=_if(t < tokens, c, channels), other=0.0),)
        for u in tl.static_range(AT_ONCE):
            t = first + u
            seen = seen + (inputs[u].to(tl.float32),)
            grad = flows[u].to(tl.float32)
            if SILU:
                z = offset
                for j in tl.static_range(WIDTH):
                    z += taps[j] * seen[j]
                gate = tl.sigmoid(z)
                grad = grad * gate * (1.0 + z * (1.0 - gate))
            grads = grads + (grad,)
            # past its end a run only finishes what its last inputs get
            own = tl.where(t < stop, grad, 0.0)
            dbias += own
            sums = ()
            for j in tl.static_range(WIDTH):
                sums = sums + (dtaps[j] + own * seen[j],)
            dtaps = sums
            # behind the last token the new tail's gradient comes in
            behind = t - tokens
            back = tl.load(
                dnew_tail + behind * dnew_w + c, mask=_if((behind >= 0) & (behind < WIDTH - 1), c, channels), other=0.0
            ).to(tl.float32)
            for j in tl.static_range(WIDTH):
                back += taps[j] * grads[WIDTH - 1 - j]
            s = t - (WIDTH - 1)
            tl.store(
                dx + s * channels + c, back.to(dx.dtype.element_ty), mask=_if((s >= start) & (s < stop), c, channels)
            )
            if dtail is not None:
                tl.store(
                    dtail + (b * (WIDTH - 1) + t) * channels + c, back.to(dtail.dtype.element_ty),
                    mask=_if((s < 0) & (start == 0), c, channels),
                )  # fmt: skip
            seen, grads = seen[1:], grads[1:]
    partial += pid * (WIDTH + (1 if bias is not None else 0)) * channels
    for j in tl.static_range(WIDTH):
        tl.store(partial + j * channels + c, dtaps[j], mask=ok)
    if bias is not None:
        tl.store(partial + WIDTH * channels + c, dbias, mask=ok)
