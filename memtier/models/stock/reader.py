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

import copy
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from memtier.cache import LayerState, TieredCache
from memtier.decode_cache import DecodeCache
from memtier.errors import ConfigError, ModelError
from memtier.layers.attention import attend
from memtier.layers.bmojo import MixerState
from memtier.layers.plan import StepPlan
from memtier.models.stock.layout import StockLayout
from memtier.models.stock.rotary import StockRotary, find_rotary

__all__ = ["IMPLEMENTATION", "StockReader"]

IMPLEMENTATION = "memtier"
# arguments by which a model changes its scores; None or 0 where it does not
REFUSED = ("softcap", "s_aux", "position_bias", "alibi", "head_mask")
PROBE_TOKENS = 12


class StockReader:
    """Reads a model with memory, and gives it back as it came.

    Args:
        model: a causal language model whose layers are attention with rotary positions.

    Raises:
        ConfigError: a model that cannot be read so; the message says why.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        config: Any = model.config.get_text_config()
        modules = _attention_modules(model)
        if not getattr(model, "_supports_attention_backend", False) or len(modules) != config.num_hidden_layers:
            raise ConfigError(
                f"{config.model_type} does not take an attention function for each of its layers (transformers' "
                f"attention interface), so it cannot be given a memory. Use a causal language model that does."
            )
        head_dim: set[Any] = {m.head_dim for m in modules if hasattr(m, "head_dim")}
        if len(head_dim) != 1:
            found = ", ".join(map(str, sorted(head_dim))) or "unknown"
            raise ConfigError(f"{config.model_type} has heads of size {found}; one size for all layers is supported.")
        size = head_dim.pop()
        self.rotary = find_rotary(model, config, size)
        kv_heads = config.num_attention_heads // getattr(modules[0], "num_key_value_groups", 1)
        self.layout = StockLayout.of(config, self.rotary, kv_heads, size, model.dtype)
        self._probe(modules)

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
        plan = cache.plan(input_ids.shape[1], marks, input_ids.device)
        step = _Step(plan, cache, self.rotary)
        with self._our_attention():
            output = self.model(
                input_ids=input_ids, position_ids=torch.zeros_like(input_ids), use_cache=False,
                logits_to_keep=logits_to_keep, memtier_step=step,
            )  # fmt: skip
        if not bool(output.logits.isfinite().all()):
            raise ModelError(
                f"the model gave non-finite logits in the {input_ids.shape[1]} tokens from {plan.start} on. "
                "Its weights or its input overflow; the cache must not be used further."
            )
        cache.advance(plan, step.finished())
        output.past_key_values = cache
        return output

    @contextmanager
    def _our_attention(self) -> Iterator[None]:
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(IMPLEMENTATION)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before or "eager")

    @torch.no_grad()
    def _probe(self, modules: list[nn.Module]) -> None:
        """Compare with the model's own attention on a few tokens: the logits, and in 16 bits each layer by itself."""
        was_training = self.model.training
        self.model.eval()
        settings = self.layout.memory_settings()
        tokens = min(PROBE_TOKENS, settings.window_tokens)
        ids = (torch.arange(tokens, device=self.model.device) * 7 + 3)[None] % self.layout.vocab_size
        window = replace(settings, memory_layers=())

        def cache(dtype: torch.dtype) -> TieredCache:
            return TieredCache(self.layout, settings=window, device=self.model.device, dtype=dtype)

        try:
            with _calls(modules) as own:
                wanted = self.model(input_ids=ids, use_cache=False).logits
            with _calls(modules) as ours:
                got = self(ids, cache(self.layout.dtype)).logits
            full = self.layout.dtype in (torch.float32, torch.float64)
            # rounding, which grows with depth
            self._expect(got, wanted, 2e-3 if full else 0.1)
            if full:
                return
            # 16 bits round so much that a mistake could hide: each attention alone, on the same input, in float32; what
            # is left is that the model's own cosines come in its dtype
            allowed = 1e-2 if self.layout.dtype == torch.bfloat16 else 2e-3
            plan = cache(torch.float32).plan(tokens, (), ids.device)
            for layer, module in enumerate(modules):
                alone: Any = copy.deepcopy(module).float()
                wanted = alone(*own[layer][0], **own[layer][1])[0]
                alone.config._attn_implementation = IMPLEMENTATION
                args, named = ours[layer]
                named = {**named, "memtier_step": _Step(plan, cache(torch.float32), self.rotary)}
                if "hidden_states" in named:
                    named["hidden_states"] = own[layer][1]["hidden_states"]
                else:
                    args = own[layer][0][:1] + args[1:]
                self._expect(alone(*args, **named)[0], wanted, allowed)
        except ModelError as error:
            raise ConfigError(f"{self.layout.model_type} cannot be given a memory: {error}") from error
        finally:
            self.model.train(was_training)

    def _expect(self, got: torch.Tensor, wanted: torch.Tensor, allowed: float) -> None:
        off = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
        if not off <= allowed:
            raise ConfigError(
                f"{self.layout.model_type} gives other logits when its keys are rotated at attention (off by "
                f"{off:.1e} of the largest in {got.shape[1]} tokens, at most {allowed:.0e} expected): it does more to "
                f"queries or keys than this way of reading can repeat. This model cannot be given a memory."
            )


@contextmanager
def _calls(modules: list[nn.Module]) -> Iterator[dict[int, tuple[tuple, dict[str, Any]]]]:
    """The arguments that each module is called with, by its place in the list, tensors in float32."""
    calls: dict[int, tuple[tuple, dict[str, Any]]] = {}

    def note(place: int) -> Any:
        def hook(_: nn.Module, args: tuple, named: dict[str, Any]) -> None:
            calls[place] = _widened(args), _widened(named)

        return hook

    hooks = [m.register_forward_pre_hook(note(i), with_kwargs=True) for i, m in enumerate(modules)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _widened(v) for name, v in value.items()}
    return tuple(_widened(v) for v in value) if isinstance(value, tuple) else value


class _Step:
    """One forward pass: what the attention function finds among its arguments."""

    def __init__(self, plan: StepPlan, cache: TieredCache | DecodeCache, rotary: StockRotary) -> None:
        self._plan, self._cache, self._rotary = plan, cache, rotary
        self._states = cache.states
        self._after: dict[int, LayerState] = {}
        self._order = rotary.channel_order

    def attend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float,
        local_tokens: int | None, rotated: bool,
    ) -> torch.Tensor:  # fmt: skip
        """(B, T, H, D), from q (B, T, H, D) and k, v (B, T, G, D)."""
        state = self._states[layer]
        assert isinstance(state, MixerState)
        if self._order is not None:
            order = self._order.to(q.device)
            q, k = q[..., order], k[..., order]
        out, after = attend(
            q, k, v, self._plan, state.attention, self._cache, layer=layer,
            rotary=self._rotary if rotated else None, scale=scale, local_tokens=local_tokens,
        )  # fmt: skip
        self._after[layer] = MixerState(after, None)
        return out

    def finished(self) -> list[LayerState]:
        """The states of all layers after the pass."""
        missing = [layer for layer in range(len(self._states)) if layer not in self._after]
        if missing:
            raise ModelError(f"layers {missing} did not call the attention function; the model has an unknown layout.")
        return [self._after[layer] for layer in range(len(self._states))]


def memory_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    memtier_step: _Step | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function "memtier" of transformers' interface.

    Args:
        query: (B, H, T, D); key, value: (B, G, T, D): after the rotation of position 0.

    Returns:
        (B, T, H, D), and no attention weights.

    Raises:
        ModelError: it was called by something else than a `StockReader`, or with a mask or dropout.
        ConfigError: the model changes its scores in a way that is not supported.
    """
    if memtier_step is None:
        raise ModelError(
            "the attention implementation 'memtier' works in memtier's own forward pass only. Read through memtier, or "
            "call model.set_attn_implementation('sdpa')."
        )
    if attention_mask is not None or dropout:
        raise ModelError("attention with memory takes no mask (no padding) and no dropout: put the model in eval mode.")
    if used := [name for name in REFUSED if kwargs.get(name) is not None]:
        raise ConfigError(f"the model changes its attention scores by {', '.join(used)}, which is not supported.")
    if key.shape[-1] != value.shape[-1] or key.shape[-1] != query.shape[-1]:
        raise ConfigError("the model has values of another size than its keys, which is not supported.")
    out = memtier_step.attend(
        module.layer_idx,  # pyright: ignore[reportArgumentType]
        *(x.transpose(1, 2) for x in (query, key, value)),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        local_tokens=sliding_window,
        rotated=bool(getattr(module, "use_rope", True)),
    )
    return out, None


def _attention_modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")]


AttentionInterface.register(IMPLEMENTATION, memory_attention)
