"""Plain torch: the depthwise convolution of the library, over the tail and the new inputs."""

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
    if tail is None:
        tail = x.new_zeros(batch, weight.shape[1] - 1, channels)
    padded = torch.cat([tail.to(x.dtype), x], dim=1)
    bias = None if bias is None else bias.to(x.dtype)
    if tokens == 1:
        # the library's convolution takes ten times as long to begin as one token takes
        y = (padded * weight.to(x.dtype).T).sum(1, keepdim=True)
        y = y if bias is None else y + bias
    else:
        y = F.conv1d(padded.transpose(1, 2), weight.to(x.dtype)[:, None], bias, groups=channels).transpose(1, 2)
    if activation == "silu":
        y = F.silu(y)
    return y, padded[:, tokens:].clone()
