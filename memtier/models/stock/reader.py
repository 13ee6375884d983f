"""A causal language model of transformers that reads with a `TieredCache`.

Extension points of transformers alone: an attention function of ours, registered under the name "memtier"; position
ids, all zero, under which the model's own rotation turns nothing; and the keyword arguments that a model passes down to
its attention function, one of which is the step that is being read. No mask function is registered under the name, so
transformers makes no mask; ours follows from the plan of the step.

What a model does between projections and attention is not assumed but tried: when a reader is made, a few tokens go
through the model once with its own attention and once with ours, and the logits must agree. So a model with learned
positions, an extra bias or a norm after the rotation is refused, not read wrongly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from memtier.cache import LayerState, TieredCache
from memtier.decode_cache import DecodeCache
from memtier.errors import ConfigError, ModelError
from memtier.layers.attention import attend
from memtier.layers.bmojo import MixerState
from memtier.layers.finite import check_logits
from memtier.layers.plan import StepPlan
from memtier.models.stock.interface import IMPLEMENTATION, AttentionCall, LayerReader
from memtier.models.stock.lane import DecodeLane, lane_of
from memtier.models.stock.layout import StockLayout
from memtier.models.stock.rotary import StockRotary
from memtier.models.stock.trial import try_rotations

__all__ = ["StockReader"]

PROBE_TOKENS = 12


class StockReader:
    """Reads a model with memory, and gives it back as it came.

    Args:
        model: a causal language model whose layers are attention with rotary positions.

    Raises:
        ConfigError: a model that cannot be read so; the message says why.
    """

    implementation = IMPLEMENTATION

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._config: Any = model.config.get_text_config()
        self.layout = StockLayout.of(model)
        self._probe()

    @torch.no_grad()
    def __call__(
        self,
        input_ids: torch.Tensor,
        past_key_values: TieredCache | DecodeCache,
        logits_to_keep: int = 0,
        *,
        marks: Collection[int] = (),
    ) -> Any:
        """Read tokens as the continuation of what the cache holds, and move it on.

        Args:
            input_ids: (B, T) int64, without padding.
            past_key_values: made with `layout` for its config.
            logits_to_keep: only the last n positions' logits; 0 for all.
            marks: absolute positions at which the span is chosen anew besides the regular boundaries.

        Returns:
            transformers' CausalLMOutputWithPast, with our cache in it.

        Raises:
            ModelError: keys, values or logits that are not finite; the cache must not be used further.
        """
        cache = past_key_values
        lane = None
        if input_ids.shape[1] == 1 and not marks and isinstance(cache, TieredCache):
            lane = lane_of(cache, self.layout.rotaries, self.layout.local_tokens)
        if lane is not None:
            output = self._forward(input_ids, logits_to_keep, _LaneStep(lane, self.layout.rotaries), cache.position)
            lane.commit()
            output.past_key_values = cache
            return output
        plan = cache.plan(input_ids.shape[1], marks, input_ids.device)
        step = _Step(plan, cache, self.layout.rotaries)
        output = self._forward(input_ids, logits_to_keep, step, plan.start)
        cache.advance(plan, step.finished())
        output.past_key_values = cache
        return output

    def _forward(self, input_ids: torch.Tensor, logits_to_keep: int, step: LayerReader, start: int) -> Any:
        """The model's forward pass, its attention read by `step`.

        Raises:
            ModelError: logits that are not finite.
        """
        with self._our_attention():
            output = self.model(
                input_ids=input_ids, position_ids=torch.zeros_like(input_ids), use_cache=False,
                logits_to_keep=logits_to_keep, memtier_step=step,
            )  # fmt: skip
        check_logits(output.logits, input_ids.shape[1], start)
        return output

    @contextmanager
    def _our_attention(self) -> Iterator[None]:
        # the layers ask their config at each call; model.set_attn_implementation would walk all modules
        before = self._config._attn_implementation
        self._config._attn_implementation = self.implementation
        try:
            yield
        finally:
            self._config._attn_implementation = before or "eager"

    @torch.no_grad()
    def _probe(self) -> None:
        """Compare with the model's own attention on a few tokens: the logits, and each layer's rotation."""
        was_training = self.model.training
        self.model.eval()
        settings = self.layout.memory_settings()
        tokens = min(PROBE_TOKENS, settings.window_tokens)
        ids = (torch.arange(tokens, device=self.model.device) * 7 + 3)[None] % self.layout.vocab_size
        window = replace(settings, memory_layers=())
        held = TieredCache(self.layout, settings=window, device=self.model.device, dtype=self.layout.dtype)
        try:
            # a quantised model rounds its activations by what else is in the step
            quantised = bool(getattr(self.model, "is_quantized", False))
            full = self.layout.dtype in (torch.float32, torch.float64) and not quantised
            # in two pieces, so that what is carried is tried too
            cut = -(-2 * tokens // 3)
            wanted = self.model(input_ids=ids, use_cache=False).logits
            got = torch.cat([self(piece, held).logits for piece in ids.split(cut, dim=1)], dim=1)
            # rounding, which grows with depth
            self._expect(got, wanted, 2e-3 if full else 0.1)
            with self._our_attention():
                # what 16 bits and inner norms could hide from the logits is seen here
                try_rotations(self.layout, self._observed)
        except ModelError as error:
            raise ConfigError(f"{self.layout.model_type} cannot be given a memory: {error}") from error
        finally:
            self.model.train(was_training)

    def _observed(self, positions: torch.Tensor, observer: LayerReader) -> None:
        device = self.model.device
        ids = (torch.arange(positions.shape[1], device=device) * 7 + 3)[None] % self.layout.vocab_size
        self.model(input_ids=ids, position_ids=positions.to(device), use_cache=False, memtier_step=observer)

    def _expect(self, got: torch.Tensor, wanted: torch.Tensor, allowed: float) -> None:
        off = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
        if not off <= allowed:
            raise ConfigError(
                f"{self.layout.model_type} gives other logits when its keys are rotated at attention (off by "
                f"{off:.1e} of the largest in {got.shape[1]} tokens, at most {allowed:.0e} expected): it does more to "
                f"queries or keys than this way of reading can repeat. This model cannot be given a memory."
            )


class _Step:
    """One forward pass: what the attention function finds among its arguments."""

    def __init__(
        self, plan: StepPlan, cache: TieredCache | DecodeCache, rotaries: Sequence[StockRotary | None]
    ) -> None:
        self._plan, self._cache, self._rotaries = plan, cache, rotaries
        self._states = cache.states
        self._after: dict[int, LayerState] = {}

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """(B, T, H, D), from queries and keys that were turned to position 0."""
        if call.mask is not None:
            raise ModelError("attention with memory takes no mask here: give rows of one length, without padding.")
        if call.layer in self._after:
            raise ModelError(f"layer {call.layer} attends twice in one pass, which is not supported.")
        state = self._states[call.layer]
        assert isinstance(state, MixerState)
        rotary = self._rotaries[call.layer]
        q, k = (x if rotary is None else rotary.in_order(x) for x in (call.q, call.k))
        out, after = attend(
            q, k, call.v, self._plan, state.attention, self._cache, layer=call.layer,
            rotary=rotary, scale=call.scale, local_tokens=call.local_tokens, softcap=call.softcap,
            sink_logits=call.sink_logits,
        )  # fmt: skip
        self._after[call.layer] = MixerState(after, None)
        return out

    def finished(self) -> list[LayerState]:
        """The states of all layers after the pass."""
        missing = [layer for layer in range(len(self._states)) if layer not in self._after]
        if missing:
            raise ModelError(f"layers {missing} did not call the attention function; the model has an unknown layout.")
        return [self._after[layer] for layer in range(len(self._states))]


class _LaneStep:
    """One token on the fast lane."""

    def __init__(self, lane: DecodeLane, rotaries: Sequence[StockRotary | None]) -> None:
        self._lane, self._rotaries = lane, rotaries

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """(B, 1, H, D), from queries and keys that were turned to position 0."""
        rotary = self._rotaries[call.layer]
        if rotary is not None and rotary.channel_order is not None:
            call = call.turned(rotary.in_order(call.q), rotary.in_order(call.k))
        return self._lane.attend(call)
