"""A stock model's own forward pass, read with memory: what a `memtier.TieredCache` does for `generate`.

The model computes positions, masks and rotations as ever. Keys and queries come rotated, and are turned back by the
model's own table. Rows of a batch that are padded stand at places of their own, so each is read as if it were alone,
without its padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from memtier.cache import LayerState, TieredCache
from memtier.errors import ConfigError, ModelError
from memtier.layers.attention import attend
from memtier.layers.bmojo import MixerState
from memtier.layers.plan import StepPlan
from memtier.layers.rotary import apply_rotary
from memtier.models.stock.interface import AttentionCall
from memtier.models.stock.lane import DecodeLane, lane_of
from memtier.models.stock.rotary import StockRotary

__all__ = ["PlainLines"]

# where frequencies may be rounded: tokens that are compared, and how far apart two of them must be
DECIDING_TOKENS, DECIDING_DISTANCE = 512, 16


@dataclass
class _Line:
    """Rows that stand at one place: `row` is None for all of the batch."""

    cache: TieredCache
    row: int | None
    plan: StepPlan | None
    lane: DecodeLane | None
    chosen: torch.Tensor | None  # indices of the row's own tokens in this pass; None for all
    after: dict[int, LayerState]

    def advance(self) -> None:
        """Every layer has read."""
        assert self.plan is not None, "a line without a lane has a plan"
        self.cache.advance(self.plan, [self.after[layer] for layer in range(len(self.after))])


@dataclass
class _Step:
    """One forward pass, of which `layers` have read."""

    tokens: int
    lines: list[_Line]
    padding: torch.Tensor | None
    layers: int = 0


class PlainLines:
    """The rows of a batch, each a line of tokens with a memory of its own.

    Args:
        make: an empty cache of so many rows, on a device, of a dtype.
        rotaries: of each layer.
        local_tokens: the sliding window of each layer.
    """

    def __init__(
        self,
        make: Callable[[int, torch.device, torch.dtype], TieredCache],
        rotaries: tuple[StockRotary | None, ...],
        local_tokens: tuple[int | None, ...],
    ) -> None:
        self._make = make
        self._rotaries = list(rotaries)
        self._local = local_tokens
        self._caches: list[TieredCache] = []
        self._rows = 0
        self._step: _Step | None = None
        self._unsure = True
        self._tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._undo: tuple[list[TieredCache], dict[int, AttentionCall], _Step] | None = None
        self.records = False
        self.columns = 0

    @property
    def caches(self) -> list[TieredCache]:
        """One for the whole batch, or one a row."""
        return self._caches

    @property
    def together(self) -> bool:
        """One cache holds all rows."""
        return len(self._caches) == 1

    # -- one forward pass, layer by layer

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """(B, T, H, D); the first layer begins a pass, the last ends it.

        Raises:
            ModelError: a batch of another size than before; a pass that left out a layer, or entered one twice.
            ConfigError: a mask that is not causal with padding; rotations that are not the model's table.
        """
        if call.layer == 0:
            self._step, self._tables = self._begin(call), {}
        step = self._step
        if step is None or call.layer != step.layers:
            raise ModelError(f"layer {call.layer} attends out of turn; the model has an unknown layout.")
        _check_mask(call, self._local[call.layer], step.padding)
        unturned = self._unturned(call)
        out = unturned.q.new_zeros(call.q.shape)
        for line in step.lines:
            _read(line, unturned, out, self._rotaries[call.layer])
        step.layers += 1
        if self.records:
            self._record(unturned, step)
        if call.layer == len(self._rotaries) - 1:
            self._end(step)
        return out

    def _begin(self, call: AttentionCall) -> _Step:
        rows, tokens = call.q.shape[:2]
        if not self._caches:
            self._caches, self._rows = [self._make(rows, call.q.device, call.q.dtype)], rows
        if rows != self._rows:
            raise ModelError(f"the cache holds {self._rows} rows, and {rows} came. Use a new cache for another batch.")
        padding = _padding(call)
        if padding is not None and self.together and rows > 1:
            self._caches = [self._caches[0].rows(torch.tensor([row])) for row in range(rows)]
        lines: list[_Line] = []
        for row, cache in enumerate(self._caches):
            chosen = None if padding is None else padding[row].nonzero().flatten()
            count = tokens if chosen is None else chosen.numel()
            if count:
                lane = lane_of(cache, tuple(self._rotaries), self._local) if count == 1 and not self.records else None
                plan = None if lane is not None else cache.plan(count, (), call.q.device)
                lines.append(_Line(cache, None if self.together else row, plan, lane, chosen, {}))
        if not lines:
            raise ModelError("the attention mask hides every token of this pass; there is nothing to read.")
        return _Step(tokens, lines, padding)

    def _end(self, step: _Step) -> None:
        for line in step.lines:
            if line.lane is not None:
                line.lane.commit()
            else:
                line.advance()
        self.columns += step.tokens
        self._step = None

    # -- the model's rotation

    def _unturned(self, call: AttentionCall) -> AttentionCall:
        """The call with queries and keys as they were before the model rotated them, channels in our order."""
        rotary = self._rotaries[call.layer]
        if rotary is None:
            return call
        positions = self._positions(call)
        if call.layer == 0 and self._unsure and call.q.dtype in (torch.float16, torch.bfloat16):
            rotary = self._decide(call, rotary, positions)
        q, k = (rotary.in_order(x) for x in (call.q, call.k))
        cos, sin = self._table(rotary, positions, q.dtype)
        wide = cos.dtype
        q, k = (apply_rotary(x.to(wide), cos, sin).to(x.dtype) for x in (q, k))
        return call.turned(q, k)

    def _positions(self, call: AttentionCall) -> torch.Tensor:
        tokens = call.q.shape[1]
        if call.position_ids is None:
            # what a model takes that is not told
            return torch.arange(self.columns, self.columns + tokens, device=call.q.device)[None]
        if call.position_ids.dim() != 2 or call.position_ids.shape[1] != tokens:
            raise ConfigError(
                f"the model has positions of shape {tuple(call.position_ids.shape)} for {tokens} tokens; one number a "
                f"token is supported."
            )
        return call.position_ids

    def _table(
        self, rotary: StockRotary, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for all layers of a pass that share an embedding."""
        if id(rotary) not in self._tables:
            self._tables[id(rotary)] = rotary.undo(positions, dtype)
        return self._tables[id(rotary)]

    def _decide(self, call: AttentionCall, rotary: StockRotary, positions: torch.Tensor) -> StockRotary:
        """Whether the model's frequencies are rounded: those of a model that was cast are, of one loaded so not.

        In the first layer a token that comes twice has the same value, so it had the same key before the rotation.
        """
        step = self._step
        assert step is not None
        line = step.lines[0]
        row, chosen = line.row or 0, slice(None) if line.chosen is None else line.chosen
        k, v = (x[row : row + 1, chosen][:, :DECIDING_TOKENS] for x in (call.k, call.v))
        place = positions.expand(call.k.shape[0], -1)[row : row + 1, chosen][:, :DECIDING_TOKENS]
        flat = v[0].flatten(1).float()
        same = torch.cdist(flat, flat) <= 1e-3 * flat.norm(dim=-1, keepdim=True)
        distance = ((place[0, :, None] - place[0]).abs() * same).flatten()
        if int(distance.max()) < DECIDING_DISTANCE:
            return rotary
        self._unsure = False
        pair = divmod(int(distance.argmax()), place.shape[1])
        able = [rotary, rotary.rounded(call.k.dtype)]
        errors = []
        for one in able:
            first, second = one.turned_back(k[:, list(pair)], place[:, list(pair)])[0]
            errors.append(float((first - second).abs().max()))
        best = able[errors.index(min(errors))]
        self._rotaries = [best if r is rotary else r for r in self._rotaries]
        return best

    # -- going back

    def _record(self, call: AttentionCall, step: _Step) -> None:
        if call.layer == 0 or self._undo is None:
            self._undo = [_copied(line.cache) for line in step.lines], {}, step
        self._undo[1][call.layer] = call

    def crop(self, tokens: int) -> None:
        """Take back the last tokens of the last pass.

        Raises:
            ModelError: more than that, or nothing was recorded.
        """
        undo, self._undo = self._undo, None
        if not tokens:
            return
        if undo is None or tokens > undo[2].tokens:
            raise ModelError(
                f"{tokens} tokens are to be taken back, and no more than the last forward pass can be, if "
                f"activate_past_recording() was called before it. Make a copy of the cache before the pass instead."
            )
        before, calls, step = undo
        kept = step.tokens - tokens
        for line, cache in zip(step.lines, before, strict=True):
            line.cache.__dict__.update(cache.__dict__)
            chosen = None if line.chosen is None else line.chosen[line.chosen < kept]
            count = kept if chosen is None else chosen.numel()
            if not count:
                continue
            plan = line.cache.plan(count, (), calls[0].q.device)
            again = _Line(line.cache, line.row, plan, None, chosen, {})
            for layer in range(len(calls)):
                call = _first(calls[layer], kept)
                _read(again, call, call.q.new_zeros(call.q.shape), self._rotaries[layer])
            again.advance()
        self.columns -= tokens

    # -- rows

    def reorder(self, order: torch.Tensor) -> None:
        """Keep the rows named by `order` (n,) int64, one or several times."""
        self._step = self._undo = None
        if not self._caches or torch.equal(order.cpu(), torch.arange(self._rows)):
            return
        if self.together:
            self._caches = [self._caches[0].rows(order)]
        else:
            self._caches = [self._caches[row].rows(torch.tensor([0])) for row in order.tolist()]
        self._rows = order.numel()


def _read(line: _Line, call: AttentionCall, out: torch.Tensor, rotary: StockRotary | None) -> None:
    """One layer of a line: fills its rows and tokens of `out`, and notes the state after."""
    rows = slice(None) if line.row is None else slice(line.row, line.row + 1)
    columns: Any = slice(None) if line.chosen is None else line.chosen
    mine = replace(call, q=call.q[rows][:, columns], k=call.k[rows][:, columns], v=call.v[rows][:, columns])
    if line.lane is not None:
        out[rows, columns] = line.lane.attend(mine)
        return
    state = line.cache.states[call.layer]
    assert isinstance(state, MixerState)
    assert line.plan is not None, "a line without a lane has a plan"
    read, after = attend(
        mine.q, mine.k, mine.v, line.plan, state.attention, line.cache,
        layer=call.layer, rotary=rotary, scale=call.scale, local_tokens=call.local_tokens, softcap=call.softcap,
        sink_logits=call.sink_logits,
    )  # fmt: skip
    out[rows, columns] = read
    line.after[call.layer] = MixerState(after, None)


def _padding(call: AttentionCall) -> torch.Tensor | None:
    """(B, T) bool, the tokens of this pass that are real; None if all are.

    Raises:
        ConfigError: a mask of an unknown kind.
    """
    mask, (rows, tokens) = call.mask, call.q.shape[:2]
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] != tokens:
        kind = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ConfigError(
            f"the attention mask is {kind} for {tokens} tokens; a cache with memory reads masks of the sdpa, eager and "
            f"flash implementations, and no mask of your own."
        )
    seen = mask if mask.dim() == 2 else _visible(mask).diagonal(dim1=-2, dim2=-1)[:, 0]
    real = seen.bool().expand(rows, -1)
    return None if bool(real.all()) else real


def _visible(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def _check_mask(call: AttentionCall, local: int | None, padding: torch.Tensor | None) -> None:
    """A mask that says more than "causal, without the padding" would be read wrongly."""
    if not isinstance(call.mask, torch.Tensor) or call.mask.dim() != 4:
        return
    place = torch.arange(call.q.shape[1], device=call.q.device)
    wanted = place[:, None] >= place
    if local is not None:
        wanted = wanted & (place[:, None] - place < local)
    real = torch.ones_like(place, dtype=torch.bool)[None] if padding is None else padding
    seen = _visible(call.mask)[:, 0] & real[:, :, None]
    if not bool((seen == (wanted & real[:, None] & real[:, :, None])).all()):
        raise ConfigError(
            f"the attention mask of layer {call.layer} is not causal with padding; a cache with memory reads no other."
        )


def _first(call: AttentionCall, tokens: int) -> AttentionCall:
    return replace(call, q=call.q[:, :tokens], k=call.k[:, :tokens], v=call.v[:, :tokens])


def _copied(cache: TieredCache) -> TieredCache:
    """The cache as it stands: steps replace its tensors and never change them."""
    cache.settle()
    copy = object.__new__(type(cache))
    copy.__dict__.update(cache.__dict__)
    copy.marks = set(cache.marks)
    return copy
