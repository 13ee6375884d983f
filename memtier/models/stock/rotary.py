"""The rotary embeddings of a stock model, layer by layer, at positions of our own.

Two ways to get keys before their rotation. `memtier.open` passes position 0 to the whole model, which turns nothing and
leaves a factor on the rotated channels (`attention_scaling` of yarn and longrope), which queries and keys carry from
then on; so the table here is a pure rotation: the model's own frequencies, without that factor. In plain transformers
the keys come as the model turned them: `undo` turns them back, by the very table that the model made in float32. Angles
of our own are float64, as in `memtier.layers.rotary`.

Models pair channels in different ways: (i, i + R/2), or (2i, 2i + 1), of all channels or of the first R. Our pairs are
(i, i + D/2). Channels are therefore put in another order, the same for queries and keys, which no score depends on.
Which pairs a model turns is read off its own function, by turning with it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from memtier.errors import ConfigError
from memtier.layers.rotary import apply_rotary

__all__ = ["StockRotary", "find_rotaries"]

SUPPORTED = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
# longrope and dynamic compute other frequencies once a sequence is longer than this
ORIGINAL_LENGTH = "original_max_position_embeddings"
# the last position that a table is compared at
TRIED_POSITIONS = 64


@dataclass(frozen=True, eq=False)
class StockRotary:
    """A `RotaryTable` with a model's frequencies.

    Args:
        frequencies: (R / 2,) float64, on the CPU: radians a position.
        head_dim: D, even.
        trained_tokens: no distance may reach this; None if nothing is known.
        interleaved: pairs are (2i, 2i + 1).
        scaling: the model's factor on rotated channels.
        long_frequencies: those that longrope takes for sequences of more than `trained_tokens`.
    """

    kind: str
    frequencies: torch.Tensor
    head_dim: int
    trained_tokens: int | None
    interleaved: bool = False
    scaling: float = 1.0
    long_frequencies: torch.Tensor | None = None
    _tables: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def channel_order(self) -> torch.Tensor | None:
        """(D,) int64: the channels so ordered that pairs lie D/2 apart; None if they do already."""
        half, whole = self.frequencies.numel(), self.head_dim // 2
        if half == whole and not self.interleaved:
            return None
        turned = torch.arange(2 * half)
        first, second = (turned[::2], turned[1::2]) if self.interleaved else turned.chunk(2)
        rest = 2 * half + torch.arange(2 * (whole - half))
        return torch.cat([first, rest[: whole - half], second, rest[whole - half :]])

    def in_order(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., D) with its channels in our order."""
        order = self.channel_order
        return x if order is None else x[..., order.to(x.device)]

    def __call__(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (..., D) of positions (...,)."""
        if positions.is_cpu and positions.numel():
            # positions are small, and the same ones come again in every layer and step
            most = int(positions.max()) + 1
            if dtype not in self._tables or self._tables[dtype][0].shape[0] < most:
                self._tables[dtype] = self._computed(torch.arange(2 * most), dtype)
            return tuple(table[positions] for table in self._tables[dtype])  # pyright: ignore[reportReturnType]
        return self._computed(positions, dtype)

    def _computed(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        frequency = self._padded(self.frequencies, 0.0)
        angle = positions.to(torch.float64)[..., None] * frequency.to(positions.device)
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def undo(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The table (..., D) that turns what the model turned to `positions` back to position 0, its factor kept.

        Args:
            positions: (...,) int64, as the model was given them.
            dtype: of the model's table.

        Raises:
            ConfigError: a dynamic embedding beyond the trained length: its frequencies depend on what was read before.
        """
        frequencies = self.frequencies
        longest = int(positions.max()) + 1
        if self.trained_tokens is not None and longest > self.trained_tokens:
            if self.kind == "dynamic":
                raise ConfigError(
                    f"the model's dynamic rotary embedding changes with the length of the text beyond "
                    f"{self.trained_tokens} tokens, and stands at {longest}. Stream through memtier.open, which keeps "
                    f"positions small."
                )
            if self.long_frequencies is not None:
                frequencies = self.long_frequencies
        # float32, as the model computes it: its own error is undone with it
        angle = positions.to(torch.float32)[..., None] * frequencies.to(positions.device, torch.float32)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        cos, sin = ((t * self.scaling).to(dtype).to(wide) for t in (angle.cos(), angle.sin()))
        factor = self.scaling / (cos * cos + sin * sin)
        cos, sin = self._padded(cos * factor, 1.0), self._padded(-sin * factor, 0.0)
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)

    def rounded(self, dtype: torch.dtype) -> StockRotary:
        """The same of a model whose frequencies were rounded with its weights (``model.to(torch.bfloat16)``)."""
        long = self.long_frequencies
        return StockRotary(
            self.kind, self.frequencies.to(dtype).to(torch.float64), self.head_dim, self.trained_tokens,
            self.interleaved, self.scaling, None if long is None else long.to(dtype).to(torch.float64),
        )  # fmt: skip

    def turned_back(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x (B, T, H, D) as it was before the model turned it to positions (B or 1, T), channels in our order."""
        cos, sin = self.undo(positions, x.dtype)
        return apply_rotary(self.in_order(x).to(cos.dtype), cos, sin)

    def _padded(self, x: torch.Tensor, value: float) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, self.head_dim // 2 - self.frequencies.numel()), value=value)


def find_rotaries(
    model: nn.Module, config: Any, kinds: Sequence[str], modules: Sequence[nn.Module], head_dim: int
) -> tuple[StockRotary | None, ...]:
    """The rotary embedding of each layer, None for a layer without positions.

    Args:
        config: of the text model.
        kinds: the type of each layer.
        modules: the attention of each layer.

    Raises:
        ConfigError: the model has none (learned positions, ALiBi), or one of a kind that is not supported.
    """
    name = config.model_type
    found = [m for m in model.modules() if hasattr(m, "rope_type")]
    if not found:
        raise ConfigError(
            f"{name} has no rotary positions: learned positions and ALiBi tie a key to its place in the stream, so it "
            f"cannot be read again from another one. Use a model with rotary position embedding."
        )
    # made anew, since a model that was moved to a 16-bit dtype has rounded its frequencies; of a short sequence
    with torch.device("cpu"):
        own: Any = type(found[0])(config)
    turn = getattr(sys.modules[type(modules[0]).__module__], "apply_rotary_pos_emb", None)
    rotaries: dict[str, StockRotary] = {}
    for kind in sorted(set(kinds)):
        if any(k == kind and _is_rotated(m) for k, m in zip(kinds, modules, strict=True)):
            rotaries[kind] = _rotary(name, config, own, kind, turn, head_dim)
    if not rotaries:
        raise ConfigError(f"{name} rotates the keys of no layer; it cannot be given a memory.")
    return tuple(rotaries[kind] if _is_rotated(m) else None for kind, m in zip(kinds, modules, strict=True))


def _is_rotated(module: Any) -> bool:
    """False for a layer whose model leaves its keys unrotated. That it is so is tried when the model is read."""
    if type(module).__name__ == "Cohere2Attention":
        return module.sliding_window is not None
    if type(module).__name__ == "Exaone4Attention":
        return module.sliding_window is None or bool(module.is_sliding)
    return bool(getattr(module, "use_rope", True))


def _rotary(name: str, config: Any, own: Any, layer_type: str, turn: Any, head_dim: int) -> StockRotary:
    each = isinstance(own.rope_type, dict)
    kind = own.rope_type.get(layer_type) if each else own.rope_type
    if kind not in SUPPORTED:
        raise ConfigError(
            f"{name} has rotary positions of kind {kind} in its {layer_type} layers, which are not supported: one of "
            f"{', '.join(SUPPORTED)} is."
        )
    parameters = (config.rope_parameters or {}).get(layer_type) if each else config.rope_parameters
    prefix = f"{layer_type}_" if each else ""
    frequencies = getattr(own, f"{prefix}inv_freq").to(torch.float64)
    if head_dim % 2 or 2 * frequencies.numel() > head_dim:
        raise ConfigError(
            f"{name} has heads of {head_dim} channels and rotates {2 * frequencies.numel()} of them; an even number "
            f"of channels, and no more rotated than there are, is supported."
        )
    trained = _trained_tokens(config, parameters, kind)
    scaling = float(getattr(own, f"{prefix}attention_scaling"))
    options = {"layer_type": layer_type} if each else {}
    interleaved = _pairs(name, own, turn, frequencies, scaling, options)
    long = None
    if kind == "longrope" and trained is not None:
        own(torch.zeros(1), torch.tensor([[trained]]), **options)
        long = getattr(own, f"{prefix}inv_freq").to(torch.float64, copy=True)
        own(torch.zeros(1), torch.tensor([[0]]), **options)
    return StockRotary(kind, frequencies.clone(), head_dim, trained, interleaved, scaling, long)


def _trained_tokens(config: Any, parameters: Any, kind: str) -> int | None:
    trained = getattr(config, "max_position_embeddings", None)
    original = (parameters or {}).get(ORIGINAL_LENGTH)
    if kind in ("longrope", "dynamic") and original:
        # beyond it the frequencies are others, and keys of both kinds cannot be read together
        return min(original, trained or original)
    return trained


def _pairs(name: str, own: Any, turn: Any, frequencies: torch.Tensor, scaling: float, options: dict[str, str]) -> bool:
    """Whether a model pairs neighbouring channels, read off how its own function turns a vector.

    Raises:
        ConfigError: it turns in another way than a rotation by position times frequency.
    """
    refusal = ConfigError(
        f"{name} pairs the channels of its rotary embedding, or computes its angles, in a way that is not supported: "
        f"halves or neighbours, turned by position times frequency, are."
    )
    if turn is None:
        raise refusal
    half = frequencies.numel()
    positions = torch.arange(TRIED_POSITIONS)[None]
    cos, sin = own(torch.zeros(1), positions, **options)
    x = torch.linspace(-1.0, 1.0, 2 * half * TRIED_POSITIONS).reshape(1, 1, TRIED_POSITIONS, 2 * half)
    try:
        got = turn(x, x, cos, sin)[0]
    except (RuntimeError, TypeError) as error:
        raise refusal from error
    angle = positions.to(torch.float64)[..., None] * frequencies
    c, s = (t[:, None] * scaling for t in (angle.cos(), angle.sin()))
    for interleaved in (False, True):
        a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
        parts = [a * c - b * s, b * c + a * s]
        wanted = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
        if got.shape == wanted.shape and torch.allclose(got.double(), wanted, atol=1e-4):
            return interleaved
    raise refusal
