"""Configuration of B'MOJO models."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from memtier.blocks import MemorySettings
from memtier.errors import ConfigError
from memtier.layers.bmojo import PREDICTOR_TOKENS, BMojoMixer, MixerState
from memtier.layers.gated_deltanet import GatedDeltaNet
from memtier.layers.grouped import GroupedGatedDeltaNet, GroupedMamba2
from memtier.layers.mamba2 import Mamba2, Mamba2State
from memtier.layers.rules import EIDETIC_RULES

__all__ = ["FADING", "LAYER_TYPES", "BMojoConfig", "Recurrence"]

Recurrence = Mamba2 | GatedDeltaNet | GroupedMamba2 | GroupedGatedDeltaNet
_SIZED = {"mamba2": Mamba2, "gated_deltanet": GatedDeltaNet}
_GROUPED = {"grouped_mamba2": GroupedMamba2, "grouped_gated_deltanet": GroupedGatedDeltaNet}
FADING = (*_SIZED, *_GROUPED)
LAYER_TYPES = ("bmojo", *FADING, "sliding_attention")
# layers that keep keys; "parallel" is a stock model's, attention beside a recurrence
_ATTENDING = ("bmojo", "sliding_attention", "parallel")


@strict
class BMojoConfig(PreTrainedConfig):
    """Sizes and choices of a B'MOJO model.

    Args:
        layer_types: the mixer of each layer: "bmojo" (attention with fading memory), "sliding_attention" (attention
            alone), or fading memory alone: one of the names of `fading`. None: all "bmojo".
        window_tokens: W, the tokens that attention sees exactly; with far memories on it is widened to whole blocks.
        sink_tokens: first tokens of a session that stay visible.
        eidetic_tokens: M, surprising old tokens kept verbatim a bmojo layer; 0 turns eidetic memory off.
        span_block_tokens, span_refresh_tokens, span_blocks: S, r and K of the expansion span.
        memory_layers: attention layers with an expansion span. None: the bmojo layers; []: no span.
        far_positions: "compact", "none" or "true"; see `memtier.layers.positions`.
        landmark_keys: keys of a block that it is found by; 0: their mean. See `memtier.layers.landmarks`.
        recency_share: with landmark_keys, the share at which the newest blocks compete for a place in the span, in
            [0, 1); 0: they do not. See `memtier.layers.landmarks.extend_window`.
        landmark_kind, query_kind: with landmark_keys 0, "mean" or "bounds", and "mean" or "max"; see there.
        storage_dtype: dtype that K and V of a sealed block are rounded to.
        rope_theta: base of the rotary embedding; None for none.
        kv_conv_size: width of the causal depthwise convolution on k and v; 0 for none.
        fading: mixer of the fading memory: "mamba2" or "gated_deltanet", of the ssm sizes; "grouped_mamba2" or
            "grouped_gated_deltanet", with the heads of the attention (see `memtier.layers.grouped`); or "none".
        eidetic_rule: which old tokens are kept verbatim; see `memtier.layers.rules`.
        eidetic_threshold: the least innovation that rule "threshold" keeps.
        innovation_predictor: what foresees a token: "linear", a map of the newest output of the fading memory, or
            "conv", the same of a short convolution over the newest four.
        ssm_expand, ssm_head_dim, ssm_state_size, ssm_groups, ssm_conv_size, ssm_chunk_size: sizes of the fading memory
            (of a Gated DeltaNet: heads of the values, size of a key, number of key heads)
        innovation_loss_weight, span_loss_weight: of the auxiliary training losses.

    Raises:
        ConfigError: a choice contradicts another.
    """

    model_type = "bmojo"
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    vocab_size: int = 260
    hidden_size: int = 192
    num_hidden_layers: int = 4
    layer_types: list[str] | None = None
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 48
    intermediate_size: int = 512
    window_tokens: int = 128
    sink_tokens: int = 0
    eidetic_tokens: int = 32
    span_block_tokens: int = 32
    span_refresh_tokens: int = 16
    span_blocks: int = 8
    memory_layers: list[int] | None = None
    far_positions: str = "compact"
    storage_dtype: str = "float16"
    landmark_keys: int = 0
    landmark_kind: str = "mean"
    query_kind: str = "mean"
    recency_share: float = 0.0
    rope_theta: float | None = 10_000.0
    kv_conv_size: int = 4
    qk_norm: bool = False
    fading: str = "mamba2"
    eidetic_rule: str = "innovation"
    eidetic_threshold: float = 0.5
    innovation_predictor: str = "linear"
    ssm_state_size: int = 32
    ssm_head_dim: int = 48
    ssm_expand: int = 2
    ssm_conv_size: int = 4
    ssm_groups: int = 1
    ssm_chunk_size: int = 64
    innovation_loss_weight: float = 0.01
    span_loss_weight: float = 0.3
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs) -> None:
        if self.layer_types is None:
            self.layer_types = ["bmojo"] * self.num_hidden_layers
        if self.memory_layers is None:
            self.memory_layers = [i for i, kind in enumerate(self.layer_types) if kind == "bmojo"]
        super().__post_init__(**kwargs)
        self._check()

    def validate_layer_type(self) -> None:
        """Our layer types are our own; `_check` validates them."""

    def _check(self) -> None:
        types = self.layer_types or []
        if len(types) != self.num_hidden_layers or any(kind not in LAYER_TYPES for kind in types):
            raise ConfigError(
                f"layer_types is {types}; it must name one of {LAYER_TYPES} for each of the "
                f"{self.num_hidden_layers} layers."
            )
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads is {self.num_attention_heads}; it must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})."
            )
        sized = any(kind in _SIZED for kind in types) or ("bmojo" in types and self.fading in _SIZED)
        if sized and (self.ssm_expand * self.hidden_size) % self.ssm_head_dim:
            raise ConfigError(
                f"ssm_head_dim is {self.ssm_head_dim}; it must divide ssm_expand * hidden_size "
                f"({self.ssm_expand * self.hidden_size})."
            )
        if sized and (self.ssm_expand * self.hidden_size // self.ssm_head_dim) % self.ssm_groups:
            raise ConfigError(f"ssm_groups is {self.ssm_groups}; it must divide the number of scan heads.")
        if self.rope_theta is not None and self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary embedding needs an even one, or rope_theta=None.")
        for name, choices in (
            ("fading", (*FADING, "none")), ("eidetic_rule", EIDETIC_RULES), ("innovation_predictor", PREDICTOR_TOKENS),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}.")
        check_settings(self.memory_settings(), types)

    def memory_settings(self) -> MemorySettings:
        """The memory sizes this model was made for."""
        return MemorySettings(
            window_tokens=self.window_tokens, sink_tokens=self.sink_tokens, eidetic_tokens=self.eidetic_tokens,
            span_block_tokens=self.span_block_tokens, span_refresh_tokens=self.span_refresh_tokens,
            span_blocks=self.span_blocks, memory_layers=tuple(self.memory_layers or ()),
            far_positions=self.far_positions, storage_dtype=self.storage_dtype,  # pyright: ignore[reportArgumentType]
            landmark_keys=self.landmark_keys, landmark_kind=self.landmark_kind, query_kind=self.query_kind,  # pyright: ignore[reportArgumentType]
            recency_share=self.recency_share,
        )  # fmt: skip

    def has_fading(self, layer: int) -> bool:
        """True if the attention of this layer has a fading memory (and with it innovation)."""
        return self.fading != "none" and (self.layer_types or [])[layer] == "bmojo"

    def make_mixer(self, layer: int) -> BMojoMixer | Recurrence:
        """A new mixer for this layer: the one place where a layer type becomes a module."""
        kind = (self.layer_types or [])[layer]
        return (
            self.make_fading_memory(kind) if kind in FADING else BMojoMixer(self, layer, fading=self.has_fading(layer))
        )

    def empty_states(
        self, settings: MemorySettings, batch: int, device: torch.device, dtype: torch.dtype
    ) -> list[MixerState | Mamba2State]:
        """Fresh states of every layer; no weights are needed."""
        states: list[MixerState | Mamba2State] = []
        for mixer in _mixers_of_no_memory(json.dumps(self.to_dict(), sort_keys=True, default=str)):
            if isinstance(mixer, BMojoMixer):
                states.append(mixer.empty_state(settings, batch, device, dtype))
            else:
                states.append(mixer.empty_state(batch, device, dtype))
        return states

    def make_fading_memory(self, kind: str | None = None) -> Recurrence:
        """A new recurrent mixer of this model's sizes: the attention layers' fading memory, or one of that kind."""
        kind = kind or self.fading
        if kind in _SIZED:
            return _SIZED[kind](
                self.hidden_size, expand=self.ssm_expand, head_dim=self.ssm_head_dim, state_size=self.ssm_state_size,
                groups=self.ssm_groups, conv_size=self.ssm_conv_size, chunk_tokens=self.ssm_chunk_size,
                eps=self.rms_norm_eps,
            )  # fmt: skip
        normed = {"qk_norm": self.qk_norm} if kind == "grouped_mamba2" else {}
        return _GROUPED[kind](
            self.hidden_size, heads=self.num_attention_heads, groups=self.num_key_value_heads, head_dim=self.head_dim,
            conv_size=self.ssm_conv_size, chunk_tokens=self.ssm_chunk_size, **normed,
        )  # fmt: skip


@lru_cache(maxsize=8)
def _mixers_of_no_memory(config: str) -> list[BMojoMixer | Recurrence]:
    """Mixers of every layer on the meta device. Kept, since a session that is opened would wait for them each time."""
    sizes = BMojoConfig.from_dict(json.loads(config))
    with torch.device("meta"):
        return [sizes.make_mixer(layer) for layer in range(sizes.num_hidden_layers)]


def check_settings(settings: MemorySettings, layer_types: list[str]) -> None:
    """Refuse sizes that contradict each other or the model.

    Raises:
        ConfigError
    """
    for name in ("window_tokens", "span_block_tokens", "span_refresh_tokens"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name} is {getattr(settings, name)}; it must be at least 1.")
    for name in ("sink_tokens", "eidetic_tokens", "span_blocks"):
        if getattr(settings, name) < 0:
            raise ConfigError(f"{name} is {getattr(settings, name)}; it must be 0 (off) or more.")
    if not 0 <= settings.landmark_keys <= settings.span_block_tokens:
        raise ConfigError(
            f"landmark_keys is {settings.landmark_keys}; it must be 0 (the mean) or up to span_block_tokens "
            f"({settings.span_block_tokens})."
        )
    if settings.landmark_kind not in ("mean", "bounds"):
        raise ConfigError(f'landmark_kind is {settings.landmark_kind!r}; it must be "mean" or "bounds".')
    if settings.query_kind not in ("mean", "max"):
        raise ConfigError(f'query_kind is {settings.query_kind!r}; it must be "mean" or "max".')
    if settings.landmark_keys and (settings.landmark_kind, settings.query_kind) != ("mean", "mean"):
        raise ConfigError(
            f"landmark_keys is {settings.landmark_keys}, landmark_kind {settings.landmark_kind!r} and query_kind "
            f"{settings.query_kind!r}; the last two need landmark_keys=0."
        )
    if not 0.0 <= settings.recency_share < 1.0 or (settings.recency_share and not settings.landmark_keys):
        raise ConfigError(
            f"recency_share is {settings.recency_share} and landmark_keys {settings.landmark_keys}; the first must be "
            "in [0, 1), and other than 0 it needs the second: only then do blocks count by shares."
        )
    if settings.sink_tokens > settings.window_tokens:
        raise ConfigError(
            f"sink_tokens is {settings.sink_tokens}; it must not exceed window_tokens ({settings.window_tokens})."
        )
    for layer in settings.memory_layers:
        if not 0 <= layer < len(layer_types) or layer_types[layer] not in _ATTENDING:
            able = [i for i, kind in enumerate(layer_types) if kind in _ATTENDING]
            raise ConfigError(f"memory_layers names layer {layer}; layers with attention are {able}.")
    if list(settings.memory_layers) != sorted(set(settings.memory_layers)):
        raise ConfigError(f"memory_layers is {settings.memory_layers}; it must be ascending, each layer once.")
    if settings.far_positions not in ("compact", "none", "true"):
        raise ConfigError(f'far_positions is {settings.far_positions!r}; it must be "compact", "none" or "true".')
    if settings.storage_dtype not in ("float16", "bfloat16", "float32", "float64"):
        raise ConfigError(f"storage_dtype is {settings.storage_dtype!r}; use float16, bfloat16, float32 or float64.")
