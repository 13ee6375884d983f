"""The rotary embedding of a stock model, at positions of our own.

A model gives its keys with the rotation of position 0, which turns nothing; what is left is a factor on the rotated
channels (`attention_scaling` of yarn and longrope), which queries and keys carry from then on. So the table here is a
pure rotation: the model's own frequencies, without that factor. Angles are float64, as in `memtier.layers.rotary`.

A model may rotate only its first R channels ("partial"). Its pairs are (i, i + R/2); ours are (i, i + D/2). Channels
are therefore put in another order, the same for queries and keys, which no score depends on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memtier.errors import ConfigError

__all__ = ["StockRotary", "find_rotary"]

SUPPORTED = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
# longrope and dynamic compute other frequencies once a sequence is longer than this
ORIGINAL_LENGTH = "original_max_position_embeddings"


@dataclass(frozen=True)
class StockRotary:
    """A `RotaryTable` with a model's frequencies.

    Args:
        frequencies: (R / 2,) float64, on the CPU: radians a position.
        head_dim: D, even.
        trained_tokens: no distance may reach this; None if nothing is known.
    """

    kind: str
    frequencies: torch.Tensor
    head_dim: int
    trained_tokens: int | None

    @property
    def channel_order(self) -> torch.Tensor | None:
        """(D,) int64: the channels so ordered that pairs lie D/2 apart; None if they do already."""
        half, whole = self.frequencies.numel(), self.head_dim // 2
        if half == whole:
            return None
        channels, rest = torch.arange(self.head_dim), 2 * half + torch.arange(2 * (whole - half))
        first, second = rest.chunk(2)
        return torch.cat([channels[:half], first, channels[half : 2 * half], second])

    def __call__(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (..., D) of positions (...,)."""
        frequency = torch.nn.functional.pad(self.frequencies, (0, self.head_dim // 2 - self.frequencies.numel()))
        angle = positions.to(torch.float64)[..., None] * frequency.to(positions.device)
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)


def find_rotary(model: nn.Module, config: Any, head_dim: int) -> StockRotary:
    """The rotary embedding that a model's attention uses.

    Args:
        config: of the text model.

    Raises:
        ConfigError: it has none (learned positions, ALiBi), or one of a kind that is not supported.
    """
    name = config.model_type
    modules = [m for m in model.modules() if hasattr(m, "rope_type")]
    if not modules:
        raise ConfigError(
            f"{name} has no rotary positions: learned positions and ALiBi tie a key to its place in the stream, so it "
            f"cannot be read again from another one. Use a model with rotary position embedding."
        )
    # a dict where layers differ
    kinds = {str(m.rope_type) for m in modules}
    kind = kinds.pop()
    if kinds or kind not in SUPPORTED:
        raise ConfigError(
            f"{name} has rotary positions of kind {', '.join(sorted({kind, *kinds}))}, which are not supported: "
            f"one of {', '.join(SUPPORTED)} for all layers is."
        )
    _check_pairs(name, type(modules[0]))
    # made anew, since a model that was moved to a 16-bit dtype has rounded its frequencies; of a short sequence
    with torch.device("cpu"):
        own: Any = type(modules[0])(config)
    frequencies = own.inv_freq.to(torch.float64)
    if head_dim % 2 or 2 * frequencies.numel() > head_dim:
        raise ConfigError(
            f"{name} has heads of {head_dim} channels and rotates {2 * frequencies.numel()} of them; an even number "
            f"of channels, and no more rotated than there are, is supported."
        )
    rotary = StockRotary(kind, frequencies, head_dim, _trained_tokens(config, kind))
    _check_table(name, rotary, own)
    return rotary


def _trained_tokens(config: Any, kind: str) -> int | None:
    trained = getattr(config, "max_position_embeddings", None)
    original = (config.rope_parameters or {}).get(ORIGINAL_LENGTH)
    if kind in ("longrope", "dynamic") and original:
        # beyond it the frequencies are others, and keys of both kinds cannot be read together
        return min(original, trained or original)
    return trained


def _check_pairs(name: str, rotary_class: type) -> None:
    """Which channels a model turns together is read off its own `rotate_half`: the i-th with the (i + R/2)-th here."""
    rotate = getattr(sys.modules[rotary_class.__module__], "rotate_half", None)
    x = torch.arange(1.0, 9.0)
    if rotate is None or not torch.equal(rotate(x), torch.cat([-x[4:], x[:4]])):
        raise ConfigError(f"{name} pairs the channels of its rotary embedding in a way that is not supported (halves).")


def _check_table(name: str, rotary: StockRotary, own: Any) -> None:
    """The model's table must be a rotation by `frequencies`, times `attention_scaling`."""
    last = min(64, rotary.trained_tokens or 64)
    positions = torch.arange(last)
    half = rotary.frequencies.numel()
    cos, sin = own(torch.zeros(1), positions[None])
    angle = positions.to(torch.float64)[:, None] * rotary.frequencies
    factor = own.attention_scaling
    same = cos.shape[-1] == 2 * half and all(
        torch.allclose(mine * factor, theirs[0, :, :half].double(), atol=1e-4)
        for mine, theirs in ((angle.cos(), cos), (angle.sin(), sin))
    )
    if not same:
        raise ConfigError(f"{name} has a rotary embedding whose angles are not position times frequency.")
