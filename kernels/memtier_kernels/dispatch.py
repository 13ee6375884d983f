"""Choosing an implementation, and the small tensor helpers that several references share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch

from memtier.errors import ConfigError, KernelError
from memtier_kernels.launch import is_recording

__all__ = ["Impl", "choose", "compact_indices", "compute_dtype", "is_interpreted"]

Impl = Literal["auto", "reference", "triton"]

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def choose(
    op: str,
    impl: str,
    x: torch.Tensor,
    *,
    reference: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    limit: str | None = None,
) -> Any:
    """The function that runs `op`.

    Args:
        x: an input of the op; its device and dtype decide what `impl="auto"` takes.
        limit: why the kernel cannot take these sizes; None if it can.

    Raises:
        KernelError: `impl="triton"` was forced and the kernel cannot run these inputs here.
        ConfigError: `impl` is not a known name.
    """
    if impl == "reference":
        return reference
    if triton is None:
        limit = "it has no Triton kernel yet"
    if impl == "auto":
        fits = x.is_cuda and sys.platform == "linux" and x.dtype in _KERNEL_DTYPES and limit is None
        return triton if fits else reference
    if impl != "triton":
        raise ConfigError(f'impl is {impl!r}; it must be "auto", "reference" or "triton".')
    if refusal := limit or _refusal(x):
        raise KernelError(
            f'{op} was called with impl="triton": {refusal}. Use impl="auto" (the best that can run) or "reference".'
        )
    return triton


def _refusal(x: torch.Tensor) -> str | None:
    if sys.platform != "linux":
        return f"Triton has no build for {sys.platform}"
    if x.dtype not in _KERNEL_DTYPES:
        return f"its kernel takes float16, bfloat16 and float32, and got {x.dtype}"
    if not x.is_cuda and not is_recording() and not is_interpreted():
        return f"it needs tensors on a CUDA device, and got {x.device} (TRITON_INTERPRET=1 runs kernels on the CPU)"
    return None


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: it has no registers that they could fill."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 stays float64, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compact_indices(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the first `count` true entries of the last axis, ascending, -1 where there are fewer.

    Args:
        mask: (..., n) bool.

    Returns:
        (..., count) int64.
    """
    n = mask.shape[-1]
    slot = torch.where(mask, mask.to(torch.int64).cumsum(-1) - 1, count).clamp_(max=count)
    out = torch.full((*mask.shape[:-1], count + 1), -1, dtype=torch.int64, device=mask.device)
    index = torch.arange(n, device=mask.device).expand(mask.shape)
    # every rejected entry lands in the one spare column, which is cut off
    return out.scatter_(-1, slot, index)[..., :count].contiguous()
