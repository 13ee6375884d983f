"""TieredCache: everything a session carries on the device, in the shape of a transformers Cache.

Its tensors have fixed sizes, whatever the position. Blocks that leave the window go to a `SpanSelector`; without one
they are kept in host memory (`HostSpanSelector`), so the cache also works by itself in ``model.generate``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from transformers import Cache

from memtier.blocks import MemoryBlock, MemorySettings, SpanSelection, SpanSelector
from memtier.errors import IncompatibleMemoryError, ModelError
from memtier.layers.bmojo import MixerState
from memtier.layers.finite import is_finite
from memtier.layers.host_selector import HostSpanSelector
from memtier.layers.mamba2 import Mamba2State
from memtier.layers.plan import StepPlan, make_plan, next_boundary, window_start
from memtier.layers.records import flatten, map_tensors, unflatten
from memtier_kernels.span_attention.sources import SOURCES

__all__ = ["LayerState", "ReadableConfig", "TieredCache"]

LayerState = MixerState | Mamba2State


class DecodeLane(Protocol):
    """A way to read tokens faster while nothing is chosen (`memtier.models.stock.lane`)."""

    def settled(self) -> list[LayerState]:
        """The states as they would stand without it."""
        ...

    @property
    def nbytes(self) -> int:
        """On the device."""
        ...


class ReadableConfig(Protocol):
    """What a cache asks of a model: `BMojoConfig`, or the layout of a stock model."""

    @property
    def layer_types(self) -> list[str] | None: ...

    @property
    def dtype(self) -> str | torch.dtype | None: ...

    @property
    def vocab_size(self) -> int: ...

    def memory_settings(self) -> MemorySettings: ...

    def empty_states(
        self, settings: MemorySettings, batch: int, device: torch.device, dtype: torch.dtype
    ) -> list[LayerState]: ...


class TieredCache(Cache):
    """Carried memory of one session (batch 1) or of a batch of sequences that stand at the same position.

    Args:
        config: of the model that will read.
        settings: memory sizes; None for the model's own.
        selector: where sealed blocks go; None: host memory, and `take_sealed` gives nothing.
    """

    def __init__(
        self,
        config: ReadableConfig,
        *,
        settings: MemorySettings | None = None,
        selector: SpanSelector | None = None,
        batch_size: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(layers=[])
        self.config = config
        self.settings = config.memory_settings() if settings is None else settings
        self.selector: SpanSelector = HostSpanSelector(self.settings.recency_share) if selector is None else selector
        self._rows = batch_size
        self._lane: DecodeLane | None = None
        self.position = 0
        self.boundary = -1
        self.marks: set[int] = set()
        self.states = config.empty_states(
            self.settings, batch_size, torch.device(device or "cpu"), dtype or _model_dtype(config)
        )
        self._collect = selector is not None and batch_size == 1
        self._sealed: dict[int, list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]] = {}

    # the states of the layers: its own, or for a while a row of a batch that is decoded together

    @property
    def states(self) -> list[LayerState]:
        """What each layer carries, in memory of its own: a row of a batch is copied out, and leaves the batch."""
        self.settle()
        return self._held[0]

    @states.setter
    def states(self, states: list[LayerState]) -> None:
        self._lane = None
        self._held: tuple[list[LayerState], int | None] = states, None

    @property
    def lane(self) -> DecodeLane | None:
        """Where tokens are read that choose nothing; what is carried is made from it when anyone looks."""
        return self._lane

    @lane.setter
    def lane(self, lane: DecodeLane) -> None:
        self._lane = lane

    def settle(self) -> None:
        """Take what is carried off a lane, or copy a row of a batch out of it."""
        if self._lane is not None:
            self.states = self._lane.settled()
        states, row = self._held
        if row is not None:
            only = slice(row, row + 1)
            self._held = [map_tensors(state, lambda t: t[only].clone()) for state in states], None

    @property
    def held(self) -> tuple[list[LayerState], int | None]:
        """The states as they lie: its own and None, or those of a batch and the row that is this cache's."""
        if self._lane is not None:
            self.settle()
        return self._held

    def read_in_row(self, states: list[LayerState], row: int) -> None:
        """Move on by one token, which was read in a row of a batch."""
        self._held = states, row
        self.position += 1

    @property
    def chooses_next(self) -> bool:
        """True if the next token brings more than itself: a boundary or a mark, a sink, or a span of another size."""
        settings, at = self.settings, self.position
        if at == next_boundary(settings, self.boundary) or at in self.marks or at < settings.sink_tokens:
            return True
        return not self.has_plain_spans

    @property
    def has_plain_spans(self) -> bool:
        """True if every layer carries a span of the size that the settings ask for."""
        spans = (self._held[0][layer] for layer in self.settings.memory_layers)
        return all(
            not isinstance(state, MixerState) or state.attention.span_ids.shape[1] == self.settings.span_blocks
            for state in spans
        )

    # what the model calls

    def plan(self, tokens: int, marks: Collection[int], device: torch.device) -> StepPlan:
        """The plan of the next step."""
        return make_plan(self.settings, self.position, tokens, self.marks | set(marks), self.boundary, device)

    def advance(self, plan: StepPlan, states: list[LayerState]) -> None:
        """Take the states after a step that every layer has finished."""
        self.states = states
        self.position = plan.start + plan.tokens
        self.boundary = plan.boundaries[-1]
        self.marks = {m for m in self.marks if m >= self.position}

    def seal(
        self, layer: int, first_block: int, keys: torch.Tensor, values: torch.Tensor, marks: torch.Tensor,
        innovation: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """Take blocks that left the window: K, V (B, n, S, G, D), landmarks (B, n, C), innovation (B, n, S) or None.

        Raises:
            ModelError: a key or a value is not finite in the storage dtype.
        """
        if not (is_finite(keys) and is_finite(values)):
            raise ModelError(
                f"layer {layer} made non-finite keys or values near block {first_block} in "
                f"{self.settings.storage_dtype}. Check the weights, or open with a wider storage_dtype."
            )
        self.selector.append(layer, first_block, keys, values, marks)
        if self._collect:
            self._sealed.setdefault(layer, []).append((first_block, keys, values, marks, innovation))

    def select(
        self, layer: int, queries: torch.Tensor, boundaries: torch.Tensor, visible: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SpanSelector.select`."""
        return self.selector.select(layer, queries, boundaries, visible, k)

    def fetch(self, layer: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SpanSelector.fetch`."""
        return self.selector.fetch(layer, ids)

    def resident(self, layer: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """See `SpanSelector.resident`."""
        return self.selector.resident(layer, ids)

    # what a session calls

    def mark(self, position: int) -> None:
        """Choose the span anew at `position`, which must not have been read yet."""
        assert position >= self.position, (position, self.position)
        self.marks.add(position)

    def take_sealed(self) -> list[MemoryBlock]:
        """The blocks sealed since the last call, in order; they own their memory."""
        sealed, self._sealed = self._sealed, {}
        layers = [sealed[layer] for layer in self.settings.memory_layers if layer in sealed]
        block, blocks = self.settings.span_block_tokens, []
        for parts in zip(*layers, strict=True):
            first, count = parts[0][0], parts[0][1].shape[1]
            surprise = [part[4] for part in parts if part[4] is not None]
            label = torch.stack(surprise).mean(0)[0] if surprise else torch.full((count, block), float("nan"))
            for i in range(count):
                index = first + i
                blocks.append(
                    MemoryBlock(
                        index,
                        index * block,
                        (index + 1) * block,
                        tuple(p[1][0, i] for p in parts),
                        tuple(p[2][0, i] for p in parts),
                        tuple(p[3][0, i] for p in parts),
                        label[i],
                    )
                )  # fmt: skip
        return blocks

    def clone(self, selector: SpanSelector) -> TieredCache:
        """A copy that shares no tensor with this one, on a selector of its own."""
        copy = object.__new__(TieredCache)
        copy.__dict__.update(self.__dict__)
        copy.selector, copy.marks, copy._sealed, copy._collect = selector, set(self.marks), {}, True
        copy.states = [map_tensors(state, torch.clone) for state in self.states]
        return copy

    def detach(self) -> None:
        """Let no gradient go back beyond this moment: between two pieces of truncated back-propagation."""
        self.states = [map_tensors(state, torch.Tensor.detach) for state in self.states]
        if isinstance(self.selector, HostSpanSelector):
            self.selector.detach()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Everything carried, by name. The tensors are the live ones: copy before the next step."""
        out: dict[str, torch.Tensor] = {}
        for i, state in enumerate(self.states):
            out.update({f"layers.{i}.{name}": value for name, value in flatten(state)})
        out["position"] = torch.tensor(self.position)
        out["boundary"] = torch.tensor(self.boundary)
        out["marks"] = torch.tensor(sorted(self.marks), dtype=torch.int64)
        return out

    def load_state_dict(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take what `state_dict` gave; tensors are copied.

        Raises:
            IncompatibleMemoryError: names, shapes or dtypes are not those of this model under these settings.
        """
        mine = self.state_dict()
        if missing := sorted(set(mine) ^ set(tensors)):
            raise IncompatibleMemoryError(
                f"the saved state and this model differ in {len(missing)} tensors, first {missing[0]!r}. "
                "It was saved by another model or memory config."
            )
        for name, value in mine.items():
            other = tensors[name]
            # the span of the current group may be of another size: span_blocks may change between two openings
            flexible = 0 if name == "marks" else 1 if ".span_" in name else None
            fits = other.dim() == value.dim() and all(
                one == two or axis == flexible
                for axis, (one, two) in enumerate(zip(other.shape, value.shape, strict=True))
            )
            if other.dtype != value.dtype or not fits:
                raise IncompatibleMemoryError(
                    f"saved tensor {name!r} is {tuple(other.shape)} {other.dtype}; this model needs "
                    f"{tuple(value.shape)} {value.dtype}. It was saved by another model, memory config or dtype."
                )
        self.states = [unflatten(state, f"layers.{i}.", tensors, self.device) for i, state in enumerate(self.states)]
        self.position, self.boundary = int(tensors["position"]), int(tensors["boundary"])
        self.marks = set(tensors["marks"].tolist())
        self._sealed = {}

    # what a report reads

    @property
    def sealed_blocks(self) -> int:
        """Blocks that have left the window."""
        if self.boundary < 0 or not self.settings.memory_layers:
            return 0
        return window_start(self.settings, self.boundary) // self.settings.span_block_tokens

    @property
    def device(self) -> torch.device:
        """Where the carried tensors are."""
        return next(value for _, value in flatten(self._held[0][0])).device

    def device_bytes(self) -> int:
        """Bytes of the distinct storages reachable from the carried states; constant in the length of the stream.

        Of states that are shared, the part that is this cache's. May be called from any thread.
        """
        storages, rows = {}, 1
        states, row = self._held
        for state in states:
            for _, value in flatten(state, numbers=False):
                storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
                rows = 1 if row is None else value.shape[0]
        lane = self._lane
        return sum(storages.values()) // rows + (0 if lane is None else lane.nbytes)

    def window(self) -> tuple[int, int]:
        """Positions [start, end) that the newest token sees in its window."""
        if not self.settings.widened:
            return max(0, self.position - self.settings.window_tokens), self.position
        return window_start(self.settings, max(self.boundary, 0)), self.position

    def eidetic(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (n,) int64 and innovation (n,) of the eidetic tokens of a layer, on the CPU; maybe none."""
        state = self.states[layer]
        if not isinstance(state, MixerState):
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        kept = state.attention.eidetic_positions[0] >= 0
        return state.attention.eidetic_positions[0][kept].cpu(), state.attention.eidetic_innovation[0][kept].cpu()

    def layer_state(self, layer: int) -> dict[str, torch.Tensor]:
        """Copies on the CPU of all that a layer carries, by name."""
        return {name: value.detach().to("cpu", copy=True) for name, value in flatten(self.states[layer])}

    def half_life(self, layer: int) -> float | None:
        """Tokens in which the fading memory of a layer halves, by the mean decay of the last step; None without one."""
        state = self.states[layer]
        fading = state if isinstance(state, Mamba2State) else state.fading
        if fading is None or not fading.log_decay_tokens:
            return None
        rate = -float(fading.log_decay.mean()) / fading.log_decay_tokens
        return float("inf") if rate <= 0 else float(torch.log(torch.tensor(2.0))) / rate

    def last_selection(self) -> list[SpanSelection]:
        """What each memory layer retrieved at its last boundary, with the attention it got from the newest token."""
        out = []
        block = self.settings.span_block_tokens
        for layer in self.settings.memory_layers:
            state = self.states[layer]
            assert isinstance(state, MixerState)
            ids = state.attention.span_ids[0].tolist()
            mass = state.attention.span_mass[0].tolist()
            kept = [i for i, b in enumerate(ids) if b >= 0]
            scores = state.attention.span_scores[0].tolist()
            out.append(
                SpanSelection(
                    layer,
                    self.boundary,
                    tuple(ids[i] for i in kept),
                    tuple(scores[i] for i in kept),
                    tuple((ids[i] * block, (ids[i] + 1) * block) for i in kept),
                    tuple(mass[i] for i in kept),
                )
            )  # fmt: skip
        return out

    def attention_mass(self) -> dict[int, dict[str, float]]:
        """Share of each source in the softmax of the last step, by layer: mean over tokens and heads."""
        return {
            i: dict(zip(SOURCES, state.attention.mass.mean(0).tolist(), strict=True))
            for i, state in enumerate(self.states)
            if isinstance(state, MixerState)
        }

    # what transformers calls

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read."""
        return self.position

    @property
    def batch_size(self) -> int:
        """Rows of the batch."""
        return self._rows

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Key length and offset, for mask builders."""
        return self.position + query_length, 0

    @property
    def is_compileable(self) -> bool:
        """False: a step reads sizes on the host."""
        return False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the rows named by `beam_idx`, as beam search asks."""
        self.__dict__.update(self.rows(beam_idx).__dict__)

    def rows(self, order: torch.Tensor) -> TieredCache:
        """A copy with the rows named by `order` (n,) int64, one or several times.

        Raises:
            ModelError: the blocks are a session's, which has one line of tokens.
        """
        if not isinstance(self.selector, HostSpanSelector):
            raise ModelError("beam search needs a cache without a selector: a session has one line of tokens.")
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.selector, copy.marks, copy._rows = self.selector.rows(order), set(self.marks), order.numel()
        copy.states = [map_tensors(state, lambda t: t.index_select(0, order.to(t.device))) for state in self.states]
        return copy

    def reset(self) -> None:
        """Back to position 0, with an empty store of its own."""
        fresh = TieredCache(
            self.config, settings=self.settings, batch_size=self._rows, device=self.device, dtype=self._dtype()
        )
        self.__dict__.update(fresh.__dict__)

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a recurrent state cannot be cut."""
        raise ModelError(
            "a TieredCache cannot be cropped: a recurrent state has no way back. Clone it before the step."
        )

    def _dtype(self) -> torch.dtype:
        state = self.states[0]
        return state.conv.dtype if isinstance(state, Mamba2State) else state.attention.keys.dtype


def _model_dtype(config: ReadableConfig) -> torch.dtype:
    named = config.dtype or torch.float32
    return getattr(torch, named) if isinstance(named, str) else named
