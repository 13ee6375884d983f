"""Hybrids of transformers, whose layers are recurrent, attention or both at once, read with a `TieredCache`.

Attention as in `memtier.models.stock.reader`. A recurrent layer asks the cache of a forward pass for its states and
gives it new ones: through transformers' own cache layers, which begin each pass with copies of what is carried.

Not every model goes on rightly from a state with several tokens at once (Jamba's scan begins anew, and says nothing).
So each recurrent layer is tried when a reader is made: pieces against the whole. A model that goes on rightly with one
token only is read one by one beyond its first step; one that does not at all is refused.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from memtier.cache import LayerState, TieredCache
from memtier.decode_cache import DecodeCache
from memtier.errors import ConfigError, ModelError
from memtier.layers.attention import attend
from memtier.layers.bmojo import MixerState
from memtier.layers.finite import check_logits
from memtier.layers.mamba2 import Mamba2State
from memtier.layers.plan import StepPlan
from memtier.models.stock.interface import AttentionCall, memory_attention
from memtier.models.stock.reader import StockReader
from memtier.models.stock.recurrent_layout import HybridLayout, probe_ids
from memtier.models.stock.recurrent_trial import CACHE_NAMES, attention_off, needs_single_tokens

__all__ = ["HybridReader"]

IMPLEMENTATION = "memtier-hybrid"


class HybridReader(StockReader):
    """Reads a hybrid with memory, and gives it back as it came.

    Args:
        model: a causal language model some of whose layers are recurrent.

    Raises:
        ConfigError: a model that cannot be read so; the message says why.
    """

    layout: HybridLayout
    implementation = IMPLEMENTATION

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._config: Any = model.config.get_text_config()
        was_training = model.training
        model.eval()
        try:
            takes = inspect.signature(model.forward).parameters
            self._cache_name = next(name for name in CACHE_NAMES if name in takes)
            self._takes_positions, self._keeps = "position_ids" in takes, "logits_to_keep" in takes
            self.layout = HybridLayout.of(model)
            # one token at a time beyond the first step, where the model's own path for several is wrong
            carrying = sum(c is not None for c in self.layout.carries)
            self.stepwise = needs_single_tokens(model, self.layout.model_type, carrying)
            self._try()
        except ConfigError:
            raise
        except (ValueError, TypeError, NotImplementedError) as error:
            # transformers' own words for a cache that it cannot use
            raise ConfigError(
                f"{model.config.get_text_config().model_type} cannot be given a memory: {error} Its states do not lie "
                f"in transformers' common cache."
            ) from error
        finally:
            model.train(was_training)

    @torch.no_grad()
    def __call__(
        self,
        input_ids: torch.Tensor,
        past_key_values: TieredCache | DecodeCache,
        logits_to_keep: int = 0,
        *,
        marks: Collection[int] = (),
    ) -> Any:
        """See `StockReader`."""
        cache = past_key_values
        pieces = [input_ids]
        if self.stepwise and input_ids.shape[1] > 1 and cache.position:
            pieces = list(input_ids.split(1, dim=1))
        logits = torch.cat([self._read(piece, cache, marks, logits_to_keep) for piece in pieces], dim=1)
        return SimpleNamespace(
            logits=logits[:, -logits_to_keep:] if logits_to_keep else logits, past_key_values=cache
        )  # fmt: skip

    def _read(
        self, ids: torch.Tensor, cache: TieredCache | DecodeCache, marks: Collection[int], keep: int
    ) -> torch.Tensor:  # fmt: skip
        plan = cache.plan(ids.shape[1], marks, ids.device)
        step = HybridStep(plan, cache, self.layout)
        options: dict[str, Any] = {self._cache_name: step.carried, "use_cache": True}
        if self._takes_positions:
            options["position_ids"] = torch.zeros_like(ids)
        if self._keeps:
            options["logits_to_keep"] = keep
        with self._our_attention():
            logits = self.model(input_ids=ids, **options).logits
        check_logits(logits, ids.shape[1], plan.start)
        cache.advance(plan, step.finished())
        return logits

    def _try(self) -> None:
        """Logits of a few tokens, in pieces, against the model's own."""
        ids = probe_ids(self.model)
        settings = self.layout.memory_settings()
        cache = TieredCache(
            self.layout, settings=replace(settings, memory_layers=()), device=self.model.device, dtype=self.layout.dtype
        )
        pieces = ids.split([ids.shape[1] - 5, 1, 4] if ids.shape[1] > 5 else 1, dim=1)
        wanted = self.model(input_ids=ids, use_cache=False).logits
        try:
            got = torch.cat([self(piece, cache).logits for piece in pieces], dim=1)
        except ModelError as error:
            raise ConfigError(f"{self.layout.model_type} cannot be given a memory: {error}") from error
        self._expect(got, wanted, 2e-3 if self.layout.dtype in (torch.float32, torch.float64) else 0.1)
        # rounding could hide a mistake in 16 bits: each attention alone, in float32
        cache = TieredCache(
            self.layout, settings=replace(settings, memory_layers=()), device=self.model.device, dtype=torch.float32
        )  # fmt: skip
        for layer, name, off in attention_off(self.model, IMPLEMENTATION, lambda: self._step(cache, ids)):
            if not off <= 1e-3:
                raise ConfigError(
                    f"{self.layout.model_type} gives other outputs when its keys are rotated at attention (layer "
                    f"{layer}, {name}, off by {off:.1e}). This model cannot be given a memory."
                )

    def _step(self, cache: TieredCache, ids: torch.Tensor) -> Cache:
        """The cache of a pass of so many tokens from the beginning, for one attention alone."""
        return HybridStep(cache.plan(ids.shape[1], (), ids.device), cache, self.layout).carried


class HybridStep:
    """One forward pass of a hybrid: what its attention calls, and the cache it is given."""

    def __init__(self, plan: StepPlan, cache: TieredCache | DecodeCache, layout: HybridLayout) -> None:
        self._plan, self._cache, self._layout = plan, cache, layout
        self._states = cache.states
        self._after: dict[int, LayerState] = {}
        self.carried = _Carried(self, layout.carries, self._states if plan.start else None)
        self.layer = -1

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """(B, T, H, D), from queries and keys that were turned to position 0.

        The layer is the one whose keys came last, since layers may share a module.
        """
        if call.mask is not None:
            raise ModelError("attention with memory takes no mask here: give rows of one length, without padding.")
        state, rotary = self._states[self.layer], self._layout.rotaries[self.layer]
        if not isinstance(state, MixerState) or self.layer in self._after:
            raise ModelError(f"layer {self.layer} attends where no attention was expected; its layout is unknown.")
        q, k = (x if rotary is None else rotary.in_order(x) for x in (call.q, call.k))
        out, after = attend(
            q, k, call.v, self._plan, state.attention, self._cache, layer=self.layer, rotary=rotary, scale=call.scale,
            local_tokens=call.local_tokens, softcap=call.softcap, sink_logits=call.sink_logits,
        )  # fmt: skip
        self._after[self.layer] = MixerState(after, None)
        return out

    def finished(self) -> list[LayerState]:
        """The states of all layers after the pass."""
        after: list[LayerState] = []
        for layer, (attends, carries) in enumerate(zip(self._layout.attends, self._layout.carries, strict=True)):
            before = self._states[layer]
            fading = before if isinstance(before, Mamba2State) else before.fading
            if carries is not None:
                fading = self.carried.after(layer, fading)
            if not attends:
                assert fading is not None
                after.append(fading)
                continue
            if layer not in self._after:
                raise ModelError(f"layer {layer} did not call the attention function; the model has an unknown layout.")
            read = self._after[layer]
            assert isinstance(read, MixerState)
            after.append(MixerState(read.attention, fading))
        return after


_announced = threading.local()


def hybrid_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The attention function "memtier-hybrid": that of `memtier.models.stock.reader`, for the step that was announced.

    A hybrid passes keyword arguments down to its recurrent layers too, which take none of ours. But right before its
    attention a layer hands its keys to the cache of the pass, on this thread.
    """
    step, _announced.step = getattr(_announced, "step", None), None
    return memory_attention(module, query, key, value, attention_mask, memtier_step=step, **kwargs)


AttentionInterface.register(IMPLEMENTATION, hybrid_attention)


class _Carried(Cache):
    """The cache that a pass is given: copies of the carried recurrent states, and the way to our attention."""

    def __init__(self, step: HybridStep, carries: tuple[Any, ...], states: list[LayerState] | None) -> None:
        super().__init__(layers=[DynamicLayer() if c is None else LinearAttentionLayer() for c in carries])
        self._step = step
        if states is None:
            return
        for layer, state in zip(self.layers, states, strict=True):
            if not isinstance(layer, LinearAttentionLayer):
                continue
            fading = state if isinstance(state, Mamba2State) else state.fading
            assert fading is not None
            if fading.conv.numel():
                layer.update_conv_state(fading.conv)
            if fading.ssm.numel():
                layer.update_recurrent_state(fading.ssm)
            layer.has_previous_state[0] = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Announce that the attention of this layer follows."""
        self._step.layer = layer_idx
        _announced.step = self._step
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read before this pass, as far as a model may know: positions are ours."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Of the pass alone."""
        return query_length, 0

    def after(self, layer: int, before: Mamba2State | None) -> Mamba2State:
        """What a layer carries on."""
        held: Any = self.layers[layer]
        assert before is not None
        conv, ssm = held.conv_states[0], held.recurrent_states[0]
        if not held.has_previous_state[0] and conv is None and ssm is None:
            raise ModelError(f"layer {layer} gave no state; the model has an unknown layout.")
        return replace(
            before,
            conv=before.conv if conv is None else conv.to(before.conv.dtype),
            ssm=before.ssm if ssm is None else ssm.to(before.ssm.dtype),
        )
