"""Choosing an implementation, and the small tensor helpers that several references share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from memtier.errors import ConfigError, KernelError

__all__ = ["Impl", "choose", "compact_indices", "compute_dtype"]

Impl = Literal["auto", "reference", "triton"]


def choose(op: str, impl: str, *, reference: Callable[..., Any], triton: Callable[..., Any] | None = None) -> Any:
    """The function that runs `op`.

    Raises:
        KernelError: `impl="triton"` was forced and `op` has no Triton kernel here.
        ConfigError: `impl` is not a known name.
    """
    if impl == "reference" or (impl == "auto" and triton is None):
        return reference
    if impl == "triton" and triton is None:
        raise KernelError(
            f'{op} was called with impl="triton", and it has no Triton kernel yet. '
            'Use impl="auto" (the best there is) or impl="reference".'
        )
    if impl in ("auto", "triton"):
        return triton
    raise ConfigError(f'impl is {impl!r}; it must be "auto", "reference" or "triton".')


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
