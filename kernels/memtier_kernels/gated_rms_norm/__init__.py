"""The norm after a recurrent layer: a gate, and the root mean square norm of what passes it."""

from __future__ import annotations

import torch

from memtier_kernels.dispatch import Impl, choose
from memtier_kernels.gated_rms_norm import custom_op, reference

__all__ = ["gated_rms_norm"]

# the forward kernel holds a row in registers
_LONGEST_ROW = 16_384


def gated_rms_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, *, eps: float, impl: Impl = "auto"
) -> torch.Tensor:
    """``u / rms(u) * weight`` over the last axis, with ``u = x * silu(gate)`` (Dao and Gu 2024, Mamba-2).

    Args:
        x, gate: (B, T, E).
        weight: (E,).
        eps: added to the mean square.

    Returns:
        (B, T, E) in x's dtype; under autocast in the autocast dtype.
    """
    size = x.shape[-1]
    run = choose(
        "gated_rms_norm", impl, x, reference=reference.gated_rms_norm, triton=custom_op.gated_rms_norm,
        limit=f"rows of {size} are over {_LONGEST_ROW}" if size > _LONGEST_ROW else None,
    )  # fmt: skip
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return run(x, gate, weight, eps, dtype)
