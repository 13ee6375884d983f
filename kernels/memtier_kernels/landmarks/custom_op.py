"""`landmarks` and `select_blocks` as operators that torch.compile keeps whole, with the gradient of the first."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["landmarks", "select_blocks"]

Tensor = torch.Tensor


@torch.library.custom_op("memtier::landmarks", mutates_args=())
def landmarks(keys: Tensor) -> Tensor:
    """See `memtier_kernels.landmarks`: by the kernels."""
    from memtier_kernels.landmarks.triton import forward

    return forward(keys)


@torch.library.custom_op("memtier::landmarks_backward", mutates_args=())
def _landmarks_backward(dmarks: Tensor, tokens: int, groups: int, dtype: torch.dtype) -> Tensor:
    from memtier_kernels.landmarks.triton import backward

    return backward(dmarks, tokens, groups, dtype)


@torch.library.custom_op("memtier::select_blocks", mutates_args=())
def select_blocks(queries: Tensor, landmarks: Tensor, visible: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `memtier_kernels.select_blocks`: by the kernels."""
    from memtier_kernels.landmarks import triton_select

    return triton_select.select_blocks(queries, landmarks, visible, k)


@landmarks.register_fake
def _(keys: Tensor) -> Tensor:
    batch, n, _, groups, size = keys.shape
    return keys.new_empty(batch, n, groups * size, dtype=torch.float32)


@_landmarks_backward.register_fake
def _(dmarks: Tensor, tokens: int, groups: int, dtype: torch.dtype) -> Tensor:
    batch, n, channels = dmarks.shape
    return dmarks.new_empty(batch, n, tokens, groups, channels // groups, dtype=dtype)


@select_blocks.register_fake
def _(queries: Tensor, landmarks: Tensor, visible: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*queries.shape[:-1], k)
    return queries.new_empty(shape, dtype=torch.int64), queries.new_empty(shape, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    (keys,) = inputs
    ctx.tokens, ctx.groups, ctx.dtype = keys.shape[2], keys.shape[3], keys.dtype


def _gradient(ctx: Any, dmarks: Tensor) -> Tensor:
    return _landmarks_backward(dmarks, ctx.tokens, ctx.groups, ctx.dtype)


landmarks.register_autograd(_gradient, setup_context=_setup)
