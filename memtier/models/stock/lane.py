"""The fast lane of a stock model's decoding: between two choices of a span, keys are turned once and read in one row.

While no span is chosen, what a token sees only grows by the token itself. So sinks, span and window of each layer lie
side by side, turned to their places in the compact layout, where one query meets them all; a step turns its own key,
puts it at the end and calls plain attention. What a session carries is made from it again when anyone looks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from memtier.blocks import MemorySettings
from memtier.cache import LayerState, TieredCache
from memtier.layers.attention import check_keys
from memtier.layers.bmojo import MixerState
from memtier.layers.landmarks import search_queries
from memtier.layers.plan import next_boundary, window_start
from memtier.layers.rotary import apply_rotary
from memtier.layers.state import AttentionState, roll
from memtier.models.stock.interface import AttentionCall
from memtier.models.stock.rotary import StockRotary
from memtier_kernels.span_attention.sources import SOURCES

__all__ = ["DecodeLane", "lane_of"]


@dataclass
class _Row:
    """One layer: K and V (B, G, room, D), of which `used` are read, those before `window` being sinks and span."""

    state: AttentionState
    rotary: StockRotary | None
    keys: torch.Tensor
    values: torch.Tensor
    used: int
    sinks: int
    window: int
    hidden: torch.Tensor | None  # (B, window) bool: far places that hold nothing
    blocks: torch.Tensor  # (B, window) int64: which of the span's blocks each belongs to, -1 for a sink
    first_place: int  # of the window's first token


@dataclass
class _Taken:
    """What a step of one layer leaves: q as it was turned, k and v as they are kept, what the token would look for."""

    call: AttentionCall
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def lane_of(cache: TieredCache, rotaries: tuple[StockRotary | None, ...], local: tuple[int | None, ...]) -> Any:
    """The lane on which a cache's next token may be read: the one it is on, or a new one; None if it must choose."""
    if torch.is_grad_enabled() or not _is_plain(cache):
        return None
    lane = cache.lane
    if isinstance(lane, DecodeLane) and lane.fits():
        return lane
    cache.lane = DecodeLane(cache, rotaries, local)
    return cache.lane


def _is_plain(cache: TieredCache) -> bool:
    settings, at = cache.settings, cache.position
    if not settings.widened or settings.far_positions != "compact" or settings.landmark_keys or at < 1:
        return False
    if not cache.chooses_next:
        return True
    # a boundary at which no block was sealed yet chooses nothing
    chooses = at in cache.marks or at < settings.sink_tokens or window_start(settings, at) > 0
    return not chooses and at == next_boundary(settings, cache.boundary) and cache.has_plain_spans


class DecodeLane:
    """Reads one token after another into a cache, until one must choose.

    Args:
        cache: where it stands.
        rotaries, local: of each layer.
    """

    def __init__(
        self, cache: TieredCache, rotaries: tuple[StockRotary | None, ...], local: tuple[int | None, ...]
    ) -> None:
        self._cache = cache
        self._settings: MemorySettings = cache.settings
        self._local = local
        self._low = window_start(cache.settings, max(cache.boundary, 0))
        states = cache.states
        self._rows = [self._row(i, state, rotaries[i], local[i]) for i, state in enumerate(states)]
        self._states = states
        self._taken: list[list[_Taken]] = [[] for _ in states]
        self._now: dict[int, _Taken] = {}

    def fits(self) -> bool:
        """Whether the next token has room, in the mode that torch is in."""
        row = self._rows[0]
        same = not row.keys.is_inference() or torch.is_inference_mode_enabled()
        return same and self._settings == self._cache.settings and all(r.used < r.keys.shape[2] for r in self._rows)

    @property
    def nbytes(self) -> int:
        """On the device."""
        return sum(2 * row.keys.nbytes for row in self._rows)

    # -- a step

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """(B, 1, H, D); q, k, v of one token, keys before their rotation and in our order.

        Raises:
            ModelError: keys that are not finite.
        """
        row = self._rows[call.layer]
        q, k = call.q, call.k
        check_keys(k, call.layer)
        if row.rotary is not None:
            place = row.first_place + row.used - row.window
            table = row.rotary(torch.tensor([place]), q.dtype)
            cos, sin = (t.to(q.device) for t in table)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        at = row.used
        row.keys[:, :, at] = k[:, 0]
        row.values[:, :, at] = call.v[:, 0]
        self._now[call.layer] = _Taken(call, q, call.k, call.v)
        keys, values, hidden = self._seen(call.layer, at + 1)
        grouped = q[:, 0].unflatten(1, (keys.shape[1], -1))
        if call.softcap is None and call.sink_logits is None:
            mask = None if hidden is None else ~hidden[:, None, None]
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=call.scale)
        else:
            out = _weights(grouped, keys, hidden, call).to(values.dtype) @ values
        return out.flatten(1, 2)[:, None]

    def commit(self) -> None:
        """All layers have read the token."""
        for layer, taken in self._now.items():
            self._taken[layer].append(taken)
            self._rows[layer].used += 1
        self._now = {}
        cache = self._cache
        if cache.position == next_boundary(self._settings, cache.boundary):
            cache.boundary = cache.position
        cache.position += 1

    # -- what is carried

    def settled(self) -> list[LayerState]:
        """The states of all layers as they would stand without a lane."""
        return [
            MixerState(self._settled(layer, taken), None) if taken else self._states[layer]
            for layer, taken in enumerate(self._taken)
        ]

    def _settled(self, layer: int, taken: list[_Taken]) -> AttentionState:
        row, last = self._rows[layer], taken[-1]
        state = row.state
        changes = {
            "keys": roll(state.keys, torch.cat([t.k for t in taken], dim=1)),
            "values": roll(state.values, torch.cat([t.v for t in taken], dim=1)),
        }
        if layer in self._settings.memory_layers:
            asked = torch.cat([t.call.q for t in taken[-self._settings.span_refresh_tokens :]], dim=1)
            changes["query_tail"] = roll(state.query_tail, search_queries(asked, last.k.shape[2], 0))
        keys, _, hidden = self._seen(layer, row.used)
        shares = _weights(last.q[:, 0].unflatten(1, (keys.shape[1], -1)), keys, hidden, last.call).mean((1, 2))
        window = row.window - (row.used - keys.shape[2])
        mass = state.mass.new_zeros(state.mass.shape)
        mass[:, SOURCES.index("sinks")] = shares[:, : min(row.sinks, max(window, 0))].sum(-1)
        mass[:, SOURCES.index("span")] = shares[:, min(row.sinks, max(window, 0)) : max(window, 0)].sum(-1)
        mass[:, SOURCES.index("window")] = shares[:, max(window, 0) :].sum(-1)
        changes["mass"] = mass
        blocks = torch.zeros_like(state.span_mass)
        if row.window > row.sinks:
            at = row.blocks[:, row.sinks :]
            changes["span_mass"] = blocks.scatter_add(1, at, shares[:, row.sinks : row.window].to(blocks.dtype))
        else:
            changes["span_mass"] = blocks
        return replace(state, **changes)

    # -- private

    def _seen(self, layer: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """K and V (B, G, n, D) that the token before `end` sees, and which of them are hidden (B, n)."""
        row, local = self._rows[layer], self._local_of(layer)
        start = 0 if local is None else max(0, end - local)
        hidden = row.hidden
        if hidden is not None:
            hidden = F.pad(hidden, (0, end - row.window))
        return row.keys[:, :, start:end], row.values[:, :, start:end], hidden

    def _local_of(self, layer: int) -> int | None:
        local, settings = self._local[layer], self._settings
        far = settings.sink_tokens + settings.span_blocks * settings.span_block_tokens
        return None if local is None or local >= settings.ring_tokens + far else local

    def _row(self, layer: int, held: LayerState, rotary: StockRotary | None, local: int | None) -> _Row:
        assert isinstance(held, MixerState)
        state, settings = held.attention, self._settings
        count = self._cache.position - self._low
        start = state.keys.shape[1] - count
        keys, values = [state.keys[:, start:]], [state.values[:, start:]]
        remembers, block = layer in settings.memory_layers, settings.span_block_tokens
        size = settings.span_blocks * block if remembers else 0
        far = settings.sink_tokens + size
        places = [torch.arange(far, far + count, device=state.keys.device)]
        sinks, index, hidden = 0, torch.zeros(state.keys.shape[0], 0, dtype=torch.int64, device=state.keys.device), None
        if self._local_of(layer) is None and self._low:
            sinks = min(settings.sink_tokens, self._low)
            there = torch.arange(sinks, device=state.keys.device)
            far_keys, far_values, far_places = [state.sink_keys[:, :sinks]], [state.sink_values[:, :sinks]], [there]
            index = there.expand(state.keys.shape[0], -1) * 0 - 1
            if remembers and bool((state.span_ids >= 0).any()):
                offsets = torch.arange(block, device=there.device)
                token = state.span_ids[..., None] * block + offsets
                kept = ((state.span_ids >= 0)[..., None] & (token >= settings.sink_tokens)).flatten(1)
                flat = torch.arange(size, device=there.device)
                # what all rows hide need not be there
                take = kept.any(0).nonzero().flatten()
                kept = kept[:, take]
                far_keys.append(state.span_keys.flatten(1, 2)[:, take])
                far_values.append(state.span_values.flatten(1, 2)[:, take])
                far_places.append(flat[take] + settings.sink_tokens)
                index = torch.cat([index, (flat[take] // block).expand(index.shape[0], -1)], dim=1)
                if not bool(kept.all()):
                    hidden = F.pad(~kept, (sinks, 0))
            keys, values, places = far_keys + keys, far_values + values, far_places + places
        k, v, place = torch.cat(keys, dim=1), torch.cat(values, dim=1), torch.cat(places)
        if rotary is not None:
            cos, sin = (t.to(k.device) for t in rotary(place.cpu(), k.dtype))
            k = apply_rotary(k, cos, sin)
        used = k.shape[1]
        # the same at every place, whatever is hidden there
        room = far + settings.ring_tokens
        return _Row(state, rotary, _roomy(k, room), _roomy(v, room), used, sinks, used - count, hidden, index, far)


def _roomy(x: torch.Tensor, room: int) -> torch.Tensor:
    """x (B, n, G, D) as (B, G, room, D), the rest unwritten."""
    out = x.new_zeros(x.shape[0], x.shape[2], room, x.shape[3])
    out[:, :, : x.shape[1]] = x.transpose(1, 2)
    return out


def _weights(
    grouped: torch.Tensor, keys: torch.Tensor, hidden: torch.Tensor | None, call: AttentionCall
) -> torch.Tensor:
    """Shares (B, G, H / G, n) of one query's softmax, without what a sink of the model's own takes."""
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    scores = (grouped @ keys.transpose(-1, -2)).to(wide) * call.scale
    if call.softcap is not None:
        scores = call.softcap * (scores / call.softcap).tanh()
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    if call.sink_logits is None:
        return scores.softmax(-1)
    sink = call.sink_logits.to(wide).unflatten(0, (keys.shape[1], -1))[..., None].expand(scores.shape[0], -1, -1, 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
