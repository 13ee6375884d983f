"""What the runtime has to know of a hybrid of transformers: which layers attend, and what each carries.

Read off what transformers' own cache holds after a few tokens, so no family is named here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from memtier.blocks import MemorySettings
from memtier.cache import LayerState
from memtier.errors import ConfigError
from memtier.layers.bmojo import MixerState
from memtier.layers.mamba2 import Mamba2State
from memtier.layers.state import empty_attention_state
from memtier.models.stock.interface import attention_modules
from memtier.models.stock.layout import StockLayout
from memtier.models.stock.recurrent_trial import CACHE_NAMES
from memtier.models.stock.rotary import StockRotary, find_rotaries

__all__ = ["HybridLayout", "is_hybrid", "probe_ids"]

PROBE_TOKENS = 12


def is_hybrid(model: PreTrainedModel) -> bool:
    """True if some layer of a model carries a recurrent state, as transformers' own cache for it says."""
    layers = DynamicCache(config=model.config).layers
    return any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)


@dataclass(frozen=True)
class HybridLayout(StockLayout):
    """Stands where a B'MOJO model has its config.

    Args:
        attends: which layers have attention.
        carries: what each layer carries besides: convolution tail and recurrent state of one row, without numbers (on
            the meta device); None for a layer that carries neither.
    """

    attends: tuple[bool, ...] = ()
    carries: tuple[tuple[torch.Tensor, torch.Tensor] | None, ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel) -> HybridLayout:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Read off what transformers' own cache holds after a few tokens.

        Raises:
            ConfigError: the model cannot be given a memory; the message says why.
        """
        config: Any = model.config.get_text_config()
        name = config.model_type
        output = model(input_ids=probe_ids(model), use_cache=True)
        cache = next((c for key in CACHE_NAMES if isinstance(c := getattr(output, key, None), Cache)), None)
        if cache is None:
            raise ConfigError(f"{name} keeps its states in a cache of its own; transformers' Cache was expected.")
        attends, carries, sizes = [], [], set()
        for layer in cache.layers:
            keys = getattr(layer, "keys", None)
            attends.append(keys is not None)
            sizes |= set() if keys is None else {(keys.shape[1], keys.shape[3])}
            carries.append(_carried(name, layer))
        if len(sizes) > 1:
            raise ConfigError(f"{name} has layers of KV heads and head sizes {sorted(sizes)}; one kind is supported.")
        kv_heads, head_dim = sizes.pop() if sizes else (0, 0)
        kinds = getattr(config, "layer_types", None) or []
        sliding = getattr(config, "sliding_window", None)
        local = tuple(sliding if kind in ("sliding_attention", "hybrid_sliding") else None for kind in kinds)
        layers = len(cache.layers)
        return cls(
            model_type=name, vocab_size=config.vocab_size, num_key_value_heads=kv_heads, head_dim=head_dim,
            local_tokens=local if len(local) == layers else (None,) * layers,
            kinds=tuple(kinds), rotaries=_rotaries(model, config, attends, head_dim), dtype=model.dtype,
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, attends=tuple(attends),
            carries=tuple(carries),
        )  # fmt: skip

    @property
    def layer_types(self) -> list[str]:
        """As the config of a B'MOJO model names them, and "parallel" for attention beside a recurrence."""
        named = {(True, False): "sliding_attention", (True, True): "parallel"}
        return [
            named.get((a, c is not None), "recurrent") for a, c in zip(self.attends, self.carries, strict=True)
        ]  # fmt: skip

    def memory_settings(self) -> MemorySettings:
        """As of a model of attention alone, which remembers in the layers that attend."""
        settings = super().memory_settings()
        able = tuple(layer for layer in settings.memory_layers if self.attends[layer])
        return replace(settings, memory_layers=able, span_blocks=settings.span_blocks if able else 0)

    def empty_states(
        self, settings: MemorySettings, batch: int, device: torch.device, dtype: torch.dtype
    ) -> list[LayerState]:
        """Fresh states of every layer."""
        self.check(settings)
        states: list[LayerState] = []
        for layer, (attends, carried) in enumerate(zip(self.attends, self.carries, strict=True)):
            recurrent = None if attends and carried is None else _zeros(carried, batch, device, dtype)
            if not attends:
                assert recurrent is not None
                states.append(recurrent)
                continue
            attention = empty_attention_state(
                batch, settings=settings, kv_heads=self.num_key_value_heads, head_dim=self.head_dim, hidden_size=0,
                conv_size=0, predictor_tokens=1, fading=False, memory=layer in settings.memory_layers, device=device,
                dtype=dtype,
            )  # fmt: skip
            states.append(MixerState(attention, recurrent))
        return states


def _rotaries(
    model: PreTrainedModel, config: Any, attends: list[bool], head_dim: int
) -> tuple[StockRotary | None, ...]:
    """Of each layer. Without rotary positions a key has no place at all; that it has no learned one is tried."""
    modules = attention_modules(model)
    if not any(attends) or not modules or not any(hasattr(m, "rope_type") for m in model.modules()):
        return (None,) * len(attends)
    found = iter(find_rotaries(model, config, ["full_attention"] * len(modules), modules, head_dim))
    if len(modules) == sum(attends):
        return tuple(next(found) if one else None for one in attends)
    # layers that share a module
    shared = next(found)
    return tuple(shared if one else None for one in attends)


def _carried(name: str, layer: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        return None
    if layer.number_of_states != 1:
        raise ConfigError(f"{name} has layers of {layer.number_of_states} recurrent states; one is supported.")
    conv, ssm = layer.conv_states[0], layer.recurrent_states[0]
    if conv is None and ssm is None:
        return None
    return tuple(torch.empty(0, device="meta") if x is None else x[:1].to("meta") for x in (conv, ssm))  # pyright: ignore


def _zeros(
    carried: tuple[torch.Tensor, torch.Tensor] | None, batch: int, device: torch.device, dtype: torch.dtype
) -> Mamba2State:  # fmt: skip
    """An empty state. A convolution tail has the model's dtype, a recurrent state the one the model gave it."""
    conv, ssm = carried or (torch.empty(0), torch.empty(0))
    shapes = [(batch, *x.shape[1:]) if x.numel() else (batch, 0) for x in (conv, ssm)]
    return Mamba2State(
        ssm=torch.zeros(shapes[1], dtype=ssm.dtype, device=device),
        conv=torch.zeros(shapes[0], dtype=dtype, device=device),
        log_decay=torch.zeros(batch, 0, device=device),
    )


def probe_ids(model: PreTrainedModel) -> torch.Tensor:
    """A few tokens (1, PROBE_TOKENS) to try a model with."""
    config: Any = model.config.get_text_config()
    return (torch.arange(PROBE_TOKENS, device=model.device) * 7 + 3)[None] % config.vocab_size
