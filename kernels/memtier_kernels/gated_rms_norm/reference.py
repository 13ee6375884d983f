"""Plain torch: the gate in the inputs' dtype, the norm in float32 (float64 for float64)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from memtier_kernels.dispatch import compute_dtype

__all__ = ["gated_rms_norm"]


def gated_rms_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """See `memtier_kernels.gated_rms_norm`; the result is of `dtype`."""
    u = x * F.silu(gate)
    full = u.to(compute_dtype(u.dtype))
    full = full * torch.rsqrt(full.square().mean(-1, keepdim=True) + eps)
    return weight.to(dtype) * full.to(dtype)
