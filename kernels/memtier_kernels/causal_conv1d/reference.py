"""Plain torch: `width` shifted products, which needs no transpose and is as exact as the sum itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tail: torch.Tensor | None,
    activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `memtier_kernels.causal_conv1d`."""
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    if tail is None:
        tail = x.new_zeros(batch, width - 1, channels)
    weight = weight.to(x.dtype)
    padded = torch.cat([tail.to(x.dtype), x], dim=1)
    y = padded[:, width - 1 :] * weight[:, width - 1]
    for j in range(width - 1):
        y = y + padded[:, j : j + tokens] * weight[:, j]
    if bias is not None:
        y = y + bias.to(x.dtype)
    if activation == "silu":
        y = F.silu(y)
    return y, padded[:, tokens:].clone()
