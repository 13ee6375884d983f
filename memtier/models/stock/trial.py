"""What a model does to queries and keys between its projections and its attention is not assumed but tried.

The model, or the attention of each kind of layer alone, reads a few tokens twice: at position 0 and at growing
positions. An attention function that ignores queries and keys makes all else the same, so they must differ by the
rotation that the layout knows, and by nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memtier.errors import ConfigError, ModelError
from memtier.models.stock.interface import IMPLEMENTATION, AttentionCall, attention_modules
from memtier.models.stock.layout import StockLayout
from memtier.models.stock.rotary import StockRotary

__all__ = ["try_classes", "try_rotations"]

TOKENS, STRIDE = 8, 5
# of the largest number; what is left in 16 bits is the rounding of turned keys and of the table
ALLOWED, ALLOWED_16_BITS = 1e-3, 1.5e-2
HALF = (torch.float16, torch.bfloat16)


class _Observer:
    """Keeps queries and keys; gives back the values, whatever they are."""

    def __init__(self) -> None:
        self.calls: dict[int, AttentionCall] = {}

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """(B, T, H, D)."""
        if call.layer in self.calls:
            raise ModelError(f"layer {call.layer} attends twice in one pass, which is not supported.")
        self.calls[call.layer] = call
        return call.v.repeat_interleave(call.q.shape[2] // call.k.shape[2], 2)


@torch.no_grad()
def try_rotations(layout: StockLayout, run: Callable[[torch.Tensor, _Observer], Any]) -> None:
    """Compare queries and keys at position 0 and elsewhere.

    Args:
        run: reads TOKENS tokens at positions (1, TOKENS), its attention being read by the observer.

    Raises:
        ConfigError: something else than the rotation is done to them.
    """
    stride = max(1, min(STRIDE, (layout.trained_tokens or STRIDE * TOKENS) // TOKENS - 1))
    positions = torch.arange(TOKENS)[None] * stride
    still, moved = _Observer(), _Observer()
    run(torch.zeros_like(positions), still)
    run(positions, moved)
    for layer, call in moved.calls.items():
        rotary, before = layout.rotaries[layer], still.calls[layer]
        off = _difference(rotary, call, before, positions.to(call.q.device))
        if not off <= (ALLOWED_16_BITS if call.q.dtype in HALF else ALLOWED):
            raise ConfigError(
                f"{layout.model_type} gives other logits when its keys are rotated at attention: layer {layer} does "
                f"more to queries or keys than its rotary embedding (off by {off:.1e} of the largest). This model "
                f"cannot be given a memory."
            )


@torch.no_grad()
def try_classes(layout: StockLayout, skeleton: nn.Module) -> None:
    """`try_rotations` of one layer of each kind, with random weights, where there is no model to run.

    Args:
        skeleton: the model on the meta device.

    Raises:
        ConfigError: as `try_rotations`; or the attention takes other arguments than transformers' models do.
    """
    config: Any = skeleton.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    rotary = next(m for m in skeleton.modules() if hasattr(m, "rope_type"))
    own: Any = type(rotary)(config)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, TOKENS, config.hidden_size, generator=draw)
    tried: set[tuple[type, str, bool]] = set()
    for module, kind, turned in zip(attention_modules(skeleton), layout.kinds, layout.rotaries, strict=True):
        case = type(module), kind, turned is None
        if case in tried:
            continue
        tried.add(case)
        run = _alone(_with_weights(module, draw), own, hidden, kind)
        try:
            try_rotations(layout, run)
        except (TypeError, RuntimeError) as error:
            raise ConfigError(
                f"{layout.model_type} has attention that cannot be tried by itself ({error}). memtier.open tries the "
                f"whole model: use that."
            ) from error


def _alone(layer: Any, own: Any, hidden: torch.Tensor, kind: str) -> Callable[[torch.Tensor, _Observer], Any]:
    """The attention of one layer, as its model calls it."""
    each = isinstance(own.rope_type, dict)
    options = {"layer_type": kind} if each else {}

    def run(positions: torch.Tensor, observer: _Observer) -> Any:
        table = None if each and kind not in own.rope_type else own(hidden, positions, **options)
        return layer(
            hidden_states=hidden, position_embeddings=table, attention_mask=None, position_ids=positions,
            memtier_step=observer,
        )  # fmt: skip

    return run


def _difference(
    rotary: StockRotary | None, call: AttentionCall, before: AttentionCall, positions: torch.Tensor
) -> float:
    """How far turned queries and keys, turned back, are from those of position 0; of the largest."""
    if rotary is None:
        pairs = [[(call.q, before.q), (call.k, before.k)]]
    else:
        # a model that was cast has rounded its frequencies too; one that was loaded so has not
        able = [rotary, rotary.rounded(call.q.dtype)] if call.q.dtype in HALF else [rotary]
        wanted = rotary.in_order(before.q), rotary.in_order(before.k)
        pairs = [
            [(one.turned_back(x, positions), w) for x, w in zip((call.q, call.k), wanted, strict=True)] for one in able
        ]
    return min(max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in each) for each in pairs)


def _with_weights(module: nn.Module, draw: torch.Generator) -> nn.Module:
    """A copy on the CPU with random weights; norms away from 1, where a mistake would not show."""
    layer: Any = copy.deepcopy(module).to_empty(device="cpu").float().eval()
    layer.config._attn_implementation = IMPLEMENTATION
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=draw)
            if parameter.ndim > 1:
                parameter.mul_(parameter.shape[-1] ** -0.5)
            else:
                parameter.mul_(0.2).add_(1.0)
    return layer
