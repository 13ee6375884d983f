"""Root mean square norms, summed in float32 (float64 for float64 models).

Under autocast the result has the autocast dtype, so that what follows is not cast piece by piece."""

from __future__ import annotations

import torch
from torch import nn

from memtier_kernels import gated_rms_norm

__all__ = ["GatedRMSNorm", "RMSNorm"]


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        full = x if x.dtype == torch.float64 else x.float()
        full = full * torch.rsqrt(full.square().mean(-1, keepdim=True) + self.eps)
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return self.weight.to(kind) * full.to(kind)


class GatedRMSNorm(RMSNorm):
    """``RMSNorm(x * silu(gate))``, as in Mamba-2."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gated_rms_norm(x, gate, self.weight, eps=self.eps)
