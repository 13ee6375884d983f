"""`gated_rms_norm` as an operator that torch.compile keeps whole, with its gradient."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["gated_rms_norm"]

Tensor = torch.Tensor


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `memtier_kernels.gated_rms_norm`: by the kernels."""
    return _forward(x, gate, weight, eps, dtype)[0]


@torch.library.custom_op("memtier::gated_rms_norm", mutates_args=())
def _forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The result, and what the backward pass needs of each row."""
    from memtier_kernels.gated_rms_norm.triton import forward

    return forward(x, gate, weight, eps, dtype)


@torch.library.custom_op("memtier::gated_rms_norm_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from memtier_kernels.gated_rms_norm.triton import backward

    return backward(dy, x, gate, weight, inverse)


@_forward.register_fake
def _(x: Tensor, gate: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:2], dtype=torch.float32)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), gate.new_empty(gate.shape), weight.new_empty(weight.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], output[1])


def _gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(dy, *ctx.saved_tensors), None, None


_forward.register_autograd(_gradients, setup_context=_setup)
