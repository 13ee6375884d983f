"""Short causal depthwise convolution that continues from a carried tail."""

from __future__ import annotations

from typing import Literal

import torch

from memtier_kernels.causal_conv1d import custom_op, reference
from memtier_kernels.dispatch import Impl, choose

__all__ = ["causal_conv1d"]

# the kernels keep one vector a tap in registers
_WIDEST = 8


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    tail: torch.Tensor | None = None,
    activation: Literal["silu"] | None = None,
    impl: Impl = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depthwise causal convolution: ``y_t = act(bias + sum_j weight[:, j] * x_{t - width + 1 + j})``.

    Args:
        x: (B, T, C).
        weight: (C, width).
        bias: (C,) or None.
        tail: (B, width - 1, C), the inputs before x; None for zeros.
        activation: "silu" or None.

    Returns:
        y (B, T, C) and the new tail (B, width - 1, C), which owns its memory.
    """
    limit = f"width {weight.shape[1]} is over {_WIDEST}" if weight.shape[1] > _WIDEST else None
    run = choose(
        "causal_conv1d", impl, x, reference=reference.causal_conv1d, triton=custom_op.causal_conv1d, limit=limit
    )
    return run(x, weight, bias, tail, activation)
