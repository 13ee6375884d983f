"""The fast lane of a stock model's decoding: between two choices of a span, keys are turned once and read in one row.

While no span is chosen, what a token sees only grows by the token itself. So sinks, span and window of each layer lie
side by side, turned to their places in the compact layout, where one query meets them all; a step turns its own key,
puts it at the end and calls plain attention. What a session carries is made from it again when anyone looks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from memtier.blocks import MemorySettings
from memtier.cache import LayerState, TieredCache
from memtier.layers.bmojo import MixerState
from memtier.layers.finite import check_keys
from memtier.layers.landmarks import search_queries
from memtier.layers.plan import next_boundary, window_start
from memtier.layers.rotary import Turn, turn, turn_of
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
    visible: torch.Tensor | None  # (B, 1, 1, room) bool: False at far places that hold nothing; None if none does
    blocks: torch.Tensor  # (B, window) int64: which of the span's blocks each belongs to, -1 for a sink
    first_place: int  # of the window's first token
    local: int | None  # how many tokens before it one sees, where that is fewer than there is room for


@dataclass
class _Taken:
    """What a step of one layer leaves: its call, and q as it was turned."""

    call: AttentionCall
    q: torch.Tensor


def lane_of(
    cache: TieredCache, rotaries: tuple[StockRotary | None, ...], local: tuple[int | None, ...]
) -> DecodeLane | None:
    """The lane on which a cache's next token may be read: the one it is on, or a new one; None if it must choose."""
    if torch.is_grad_enabled() or _chooses(cache):
        return None
    lane = cache.lane
    if isinstance(lane, DecodeLane) and lane.fits():
        return lane
    if not cache.has_plain_spans:
        return None
    cache.lane = lane = DecodeLane(cache, rotaries, local)
    return lane


def _chooses(cache: TieredCache) -> bool:
    """Whether the next token may bring more than itself; a boundary at which no block was sealed yet brings nothing."""
    settings, at = cache.settings, cache.position
    if not settings.widened or settings.far_positions != "compact" or settings.landmark_keys:
        return True
    if at < max(1, settings.sink_tokens) or at in cache.marks:
        return True
    return at == next_boundary(settings, cache.boundary) and window_start(settings, at) > 0


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
        self._low = window_start(cache.settings, max(cache.boundary, 0))
        far = cache.settings.sink_tokens + cache.settings.span_blocks * cache.settings.span_block_tokens
        self._room = far + cache.settings.ring_tokens
        states = cache.states
        first = states[0]
        assert isinstance(first, MixerState)
        self._turns = _every_turn(rotaries, first.attention.keys, far + self._room)
        self._rows = [self._row(i, state, rotaries[i], local[i]) for i, state in enumerate(states)]
        self._states = states
        self._taken: list[list[_Taken]] = [[] for _ in states]
        # of the step that is being read
        self._now: dict[int, _Taken] = {}
        self._by: dict[tuple[StockRotary, int], Turn] = {}

    def fits(self) -> bool:
        """Whether the next token has room, in the mode that torch is in."""
        same = not self._rows[0].keys.is_inference() or torch.is_inference_mode_enabled()
        return same and self._settings == self._cache.settings and all(row.used < self._room for row in self._rows)

    @property
    def nbytes(self) -> int:
        """On the device."""
        return sum(2 * row.keys.nbytes for row in self._rows)

    # -- a step

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """(B, 1, H, D); q, k, v of one token, keys before their rotation and in our order."""
        row = self._rows[call.layer]
        q, k, at = call.q, call.k, row.used
        if row.rotary is not None:
            by = self._turn(row.rotary, row.first_place + at - row.window)
            q, k = turn(q, by), turn(k, by)
        row.keys[:, :, at] = k[:, 0]
        row.values[:, :, at] = call.v[:, 0]
        self._now[call.layer] = _Taken(call, q)
        grouped, keys, values, visible = _read(row, q, at + 1)
        if call.softcap is None and call.sink_logits is None:
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible, scale=call.scale)
        else:
            out = _weights(grouped, keys, visible, call).to(values.dtype) @ values
        return out.flatten(1, 2)[:, None]

    def commit(self) -> None:
        """All layers have read the token.

        Raises:
            ModelError: keys that are not finite.
        """
        check_keys({layer: taken.call.k for layer, taken in self._now.items()})
        for layer, taken in self._now.items():
            self._taken[layer].append(taken)
            self._rows[layer].used += 1
        self._now, self._by = {}, {}
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
            "keys": roll(state.keys, torch.cat([t.call.k for t in taken], dim=1)),
            "values": roll(state.values, torch.cat([t.call.v for t in taken], dim=1)),
        }
        if layer in self._settings.memory_layers:
            asked = torch.cat([t.call.q for t in taken[-self._settings.span_refresh_tokens :]], dim=1)
            changes["query_tail"] = roll(state.query_tail, search_queries(asked, last.call.k.shape[2], 0))
        grouped, keys, _, visible = _read(row, last.q, row.used)
        shares = _weights(grouped, keys, visible, last.call).mean((1, 2))
        window = max(row.window - (row.used - keys.shape[2]), 0)
        sinks = min(row.sinks, window)
        mass = state.mass.new_zeros(state.mass.shape)
        mass[:, SOURCES.index("sinks")] = shares[:, :sinks].sum(-1)
        mass[:, SOURCES.index("span")] = shares[:, sinks:window].sum(-1)
        mass[:, SOURCES.index("window")] = shares[:, window:].sum(-1)
        changes["mass"] = mass
        blocks = torch.zeros_like(state.span_mass)
        if row.window > row.sinks:
            blocks = blocks.scatter_add(1, row.blocks, shares[:, row.sinks : row.window].to(blocks.dtype))
        return replace(state, **changes, span_mass=blocks)

    # -- private

    def _turn(self, rotary: StockRotary, place: int) -> Turn:
        """The same for all layers of a step that share an embedding and a place."""
        if (rotary, place) not in self._by:
            cos, sin = self._turns[rotary]
            self._by[rotary, place] = cos[place], sin[place]
        return self._by[rotary, place]

    def _row(self, layer: int, held: LayerState, rotary: StockRotary | None, local: int | None) -> _Row:
        assert isinstance(held, MixerState)
        state, settings = held.attention, self._settings
        count = self._cache.position - self._low
        block, batch, device = settings.span_block_tokens, state.keys.shape[0], state.keys.device
        size = settings.span_blocks * block if layer in settings.memory_layers else 0
        far = settings.sink_tokens + size
        # what a token may see at all is no limit
        local = None if local is None or local >= self._room else local
        parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        sinks, visible = 0, None
        index = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        if local is None and self._low:
            sinks = min(settings.sink_tokens, self._low)
            parts.append((
                state.sink_keys[:, :sinks], state.sink_values[:, :sinks], torch.arange(sinks, device=device),
            ))  # fmt: skip
            if size and bool((state.span_ids >= 0).any()):
                token = state.span_ids[..., None] * block + torch.arange(block, device=device)
                kept = ((state.span_ids >= 0)[..., None] & (token >= settings.sink_tokens)).flatten(1)
                # what all rows hide need not be there
                take = kept.any(0).nonzero().flatten()
                kept = kept[:, take]
                span_keys, span_values = (t.flatten(1, 2)[:, take] for t in (state.span_keys, state.span_values))
                parts.append((span_keys, span_values, take + settings.sink_tokens))
                index = (take // block).expand(batch, -1)
                if not bool(kept.all()):
                    hidden = F.pad(~kept, (sinks, self._room - sinks - take.numel()))
                    visible = ~hidden[:, None, None]
        first = state.keys.shape[1] - count
        before = sum(place.numel() for _, _, place in parts)
        parts.append((state.keys[:, first:], state.values[:, first:], torch.arange(far, far + count, device=device)))
        keys, values = (state.keys.new_empty(batch, state.keys.shape[2], self._room, state.keys.shape[3]) for _ in "kv")
        used = 0
        for k, v, place in parts:
            if rotary is not None:
                cos, sin = self._turns[rotary]
                k = turn(k, (cos[place], sin[place]))
            # the same room at every place, whatever is hidden there
            seen = slice(used, used + place.numel())
            keys[:, :, seen], values[:, :, seen] = k.transpose(1, 2), v.transpose(1, 2)
            used = seen.stop
        return _Row(state, rotary, keys, values, used, sinks, before, visible, index, far, local)


def _read(row: _Row, q: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What the token before `end` reads with: q (B, G, H / G, D), K and V (B, G, n, D), what it sees of them."""
    start = 0 if row.local is None else max(0, end - row.local)
    keys, values = row.keys[:, :, start:end], row.values[:, :, start:end]
    grouped = q.reshape(q.shape[0], keys.shape[1], -1, q.shape[3])
    return grouped, keys, values, None if row.visible is None else row.visible[..., :end]


def _every_turn(rotaries: tuple[StockRotary | None, ...], like: torch.Tensor, places: int) -> dict[StockRotary, Turn]:
    """The tables of all places."""
    at = torch.arange(places)
    return {rotary: turn_of(*(t.to(like.device) for t in rotary(at, like.dtype))) for rotary in set(rotaries) if rotary}


def _weights(
    grouped: torch.Tensor, keys: torch.Tensor, visible: torch.Tensor | None, call: AttentionCall
) -> torch.Tensor:
    """Shares (B, G, H / G, n) of one query's softmax, without what a sink of the model's own takes."""
    wide = torch.float64 if keys.dtype == torch.float64 else torch.float32
    scores = (grouped @ keys.transpose(-1, -2)).to(wide) * call.scale
    if call.softcap is not None:
        scores = call.softcap * (scores / call.softcap).tanh()
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if call.sink_logits is None:
        return scores.softmax(-1)
    sink = call.sink_logits.to(wide).unflatten(0, (keys.shape[1], -1))[..., None].expand(scores.shape[0], -1, -1, 1)
    return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
