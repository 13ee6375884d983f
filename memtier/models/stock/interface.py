"""The attention function "memtier" of transformers' interface: what it takes, and who reads for it.

A `StockReader` passes its step down as a keyword argument. A `memtier.TieredCache` in plain transformers has no such
way; a layer hands its keys to the cache right before it calls its attention function, so the cache announces itself
there, for this thread, and the function takes that up.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from transformers import AttentionInterface

from memtier.errors import ConfigError, ModelError

__all__ = [
    "IMPLEMENTATION",
    "AttentionCall",
    "LayerReader",
    "announce",
    "attention_modules",
    "memory_attention",
    "outside_graphs",
]

F = TypeVar("F", bound=Callable[..., Any])

IMPLEMENTATION = "memtier"
# arguments by which a model changes its scores; None or 0 where it does not
REFUSED = ("position_bias", "alibi", "head_mask")


@dataclass(frozen=True)
class AttentionCall:
    """What one layer asks in one forward pass, as the model rotated it.

    Args:
        q: (B, T, H, D).   k, v: (B, T, G, D).
        scale: of the scores.
        local_tokens: the layer's own sliding window; None for none.
        softcap: scores s become ``softcap * tanh(s / softcap)``; None leaves them.
        sink_logits: (H,), scores of the model's own attention sink; None for none.
        mask: the model's mask, None if it made none.
        position_ids: (B or 1, T) int64; None if the model does not pass them on.
    """

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    local_tokens: int | None
    softcap: float | None
    sink_logits: torch.Tensor | None
    mask: Any
    position_ids: torch.Tensor | None

    def turned(self, q: torch.Tensor, k: torch.Tensor) -> AttentionCall:
        """The same with other queries and keys."""
        return replace(self, q=q, k=k)


class LayerReader(Protocol):
    """Reads a forward pass, one layer after another."""

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """(B, T, H, D)."""
        ...


_announced = threading.local()


def announce(reader: LayerReader) -> None:
    """The next call of the attention function, on this thread, is answered by `reader`."""
    _announced.reader = reader


def outside_graphs(function: F) -> F:
    """For what reads numbers on the host: a compiled model calls it between two graphs."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType]


@outside_graphs
def memory_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    memtier_step: LayerReader | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function "memtier" of transformers' interface.

    Args:
        query: (B, H, T, D); key, value: (B, G, T, D).

    Returns:
        (B, T, H, D), and no attention weights.

    Raises:
        ModelError: it was called outside of a forward pass with memory, or with dropout.
        ConfigError: the model changes its scores in a way that is not supported.
    """
    reader = getattr(_announced, "reader", None) if memtier_step is None else memtier_step
    _announced.reader = None
    if reader is None:
        raise ModelError(
            "the attention implementation 'memtier' works in a forward pass with memory only. Read through memtier, "
            "give a memtier.TieredCache as past_key_values, or call model.set_attn_implementation('sdpa')."
        )
    if dropout:
        raise ModelError("attention with memory takes no dropout: put the model in eval mode.")
    if used := [name for name in REFUSED if kwargs.get(name) is not None]:
        raise ConfigError(f"the model changes its attention scores by {', '.join(used)}, which is not supported.")
    sizes = {x.shape[-1] for x in (query, key, value)} | {getattr(module, "head_dim", query.shape[-1])}
    if len(sizes) != 1:
        raise ConfigError(
            f"the model has queries, keys, values or heads of different sizes {sorted(sizes)}, which is not supported."
        )
    call = AttentionCall(
        layer=module.layer_idx,  # pyright: ignore[reportArgumentType]
        q=query.transpose(1, 2),
        k=key.transpose(1, 2),
        v=value.transpose(1, 2),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        local_tokens=sliding_window,
        softcap=softcap,
        sink_logits=s_aux,
        mask=attention_mask,
        position_ids=position_ids,
    )
    return reader.attend(call), None


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention of each layer, in order."""
    return [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]


AttentionInterface.register(IMPLEMENTATION, memory_attention)
