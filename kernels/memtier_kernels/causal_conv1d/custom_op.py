"""`causal_conv1d` as an operator that torch.compile keeps whole, with its gradient."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["causal_conv1d"]

Tensor = torch.Tensor


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """See `memtier_kernels.causal_conv1d`: by the kernels."""
    return _forward(x, weight, bias, tail, activation == "silu")


@torch.library.custom_op("memtier::causal_conv1d", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    from memtier_kernels.causal_conv1d.triton import forward

    return forward(x, weight, bias, tail, silu)


@torch.library.custom_op("memtier::causal_conv1d_backward", mutates_args=())
def _backward(
    dy: Tensor, dnew_tail: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from memtier_kernels.causal_conv1d.triton import backward

    return backward(dy, dnew_tail, x, weight, bias, tail, silu)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])


@_backward.register_fake
def _(
    dy: Tensor, dnew_tail: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    dtail = x.new_empty(0) if tail is None else tail.new_empty(tail.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dtail


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, tail, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, tail)


def _gradients(ctx: Any, dy: Tensor, dnew_tail: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, tail = ctx.saved_tensors
    dx, dweight, dbias, dtail = _backward(dy, dnew_tail, x, weight, bias, tail, ctx.silu)
    return dx, dweight, None if bias is None else dbias, None if tail is None else dtail, None


_forward.register_autograd(_gradients, setup_context=_setup)
