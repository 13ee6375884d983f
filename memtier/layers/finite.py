"""Numbers that are not finite, found in one pass over a tensor: its ends show them, since both carry NaN on."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from memtier.errors import ModelError

__all__ = ["check_keys", "check_logits", "is_finite"]

OVERFLOW = "The model's weights or its input overflow; the cache must not be used further."


def is_finite(x: torch.Tensor) -> bool:
    """Whether every number of x is finite; waits for the device."""
    return not x.numel() or all(math.isfinite(end) for end in x.detach().aminmax())


def check_logits(logits: torch.Tensor, tokens: int, start: int) -> None:
    """Look at what a model gave for the `tokens` from position `start` on.

    Raises:
        ModelError
    """
    if not is_finite(logits):
        raise ModelError(f"the model gave non-finite logits in the {tokens} tokens from {start} on. {OVERFLOW}")


def check_keys(keys: Mapping[int, torch.Tensor]) -> None:
    """Look at the new keys of some layers, by layer.

    Plain attention on a CPU makes zeros of scores that are not numbers, so the logits would not show them.

    Raises:
        ModelError
    """
    every = list(keys.values())
    if every[0].is_cpu and not is_finite(every[0] if len(every) == 1 else torch.cat([k.flatten() for k in every])):
        layer = next(layer for layer, k in keys.items() if not is_finite(k))
        raise ModelError(f"layer {layer} made non-finite keys. {OVERFLOW}")
