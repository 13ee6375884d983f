"""`innovation` and `keep_surprising` as operators that torch.compile keeps whole, with the gradient of the first."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["innovation", "keep_surprising"]

Tensor = torch.Tensor


def innovation(h: Tensor, predicted: Tensor) -> Tensor:
    """See `memtier_kernels.innovation`: by the kernels."""
    return _innovation(h, predicted)[0]


@torch.library.custom_op("memtier::innovation", mutates_args=())
def _innovation(h: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """Innovation, and its denominator, which the backward pass needs."""
    from memtier_kernels.innovation.triton import forward

    return forward(h, predicted)


@torch.library.custom_op("memtier::innovation_backward", mutates_args=())
def _innovation_backward(
    de: Tensor, h: Tensor, predicted: Tensor, e: Tensor, scale: Tensor, of_h: bool, of_predicted: bool
) -> tuple[Tensor, Tensor]:
    from memtier_kernels.innovation.triton import backward

    return backward(de, h, predicted, e, scale, of_h, of_predicted)


@torch.library.custom_op("memtier::keep_surprising", mutates_args=())
def keep_surprising(innovation: Tensor, positions: Tensor, before: Tensor, m: int) -> Tensor:
    """See `memtier_kernels.keep_surprising`: by the kernels."""
    from memtier_kernels.innovation import triton_keep

    return triton_keep.keep_surprising(innovation, positions, before, m)


@_innovation.register_fake
def _(h: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    e = h.new_empty(h.shape[:2], dtype=torch.float32)
    return e, torch.empty_like(e)


@_innovation_backward.register_fake
def _(
    de: Tensor, h: Tensor, predicted: Tensor, e: Tensor, scale: Tensor, of_h: bool, of_predicted: bool
) -> tuple[Tensor, Tensor]:
    dh = h.new_empty(h.shape if of_h else (0,))
    return dh, predicted.new_empty(predicted.shape if of_predicted else (0,))


@keep_surprising.register_fake
def _(innovation: Tensor, positions: Tensor, before: Tensor, m: int) -> Tensor:
    return positions.new_empty(innovation.shape[0], before.shape[0], m, dtype=torch.int64)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _gradients(ctx: Any, de: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None]:
    of_h, of_predicted = ctx.needs_input_grad
    dh, dpredicted = _innovation_backward(de, *ctx.saved_tensors, of_h, of_predicted)
    return dh if of_h else None, dpredicted if of_predicted else None


_innovation.register_autograd(_gradients, setup_context=_setup)
