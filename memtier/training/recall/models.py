"""The models that the recall tasks compare, each as large in carried memory as the others.

    window          attention over a window, nothing else
    mamba2          Mamba-2 alone            gated_deltanet  Gated DeltaNet alone
    hybrid          layers of Mamba-2 and of window attention by turns (Lieber et al. 2024, "Jamba")
    bmojo_f         B'MOJO-F: window and fading memory
    bmojo           window, fading and eidetic memory
    span            window, fading memory and the expansion span
    bmojo_span      all of them

What is equal is the bytes that one sequence carries from step to step on the device: K and V of windows, rings, slots
and span, recurrent states and the tails of convolutions, as `TieredCache.device_bytes` counts them. A rival is made as
large as B'MOJO or a little larger, never smaller, by its window or, without attention, by its state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from memtier.cache import TieredCache
from memtier.errors import ConfigError
from memtier.models.bmojo import BMojoConfig

__all__ = ["RIVALS", "VARIANTS", "ModelSize", "Variant", "memory_bytes", "recall_config"]

Variant = Literal["window", "mamba2", "gated_deltanet", "hybrid", "bmojo_f", "bmojo", "span", "bmojo_span"]
VARIANTS: tuple[Variant, ...] = (
    "window", "mamba2", "gated_deltanet", "hybrid", "bmojo_f", "bmojo", "span", "bmojo_span",
)  # fmt: skip
RIVALS: tuple[Variant, ...] = ("window", "mamba2", "gated_deltanet", "hybrid", "bmojo_f")
"""Those without a far memory: they are sized to the bytes of B'MOJO."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Sizes that all variants of a comparison share; a rival's window or state is then enlarged.

    Args:
        width: E.
        heads: of attention, as many for keys and values.
        window_tokens, block_tokens, span_blocks: W, S and K. state_size: N of the recurrent memories.
    """

    width: int = 32
    layers: int = 2
    heads: int = 1
    window_tokens: int = 8
    block_tokens: int = 4
    span_blocks: int = 4
    state_size: int = 16


def recall_config(
    variant: Variant, size: ModelSize, *, vocabulary: int, eidetic_tokens: int, rule: str = "innovation"
) -> BMojoConfig:
    """The model of one variant.

    Args:
        eidetic_tokens: M of B'MOJO; for a rival, of the B'MOJO whose bytes it gets.
        rule: of the eidetic choice.
    """
    if variant not in VARIANTS:
        raise ConfigError(f"variant is {variant!r}; use one of {', '.join(VARIANTS)}.")
    bmojo = _fields(size, vocabulary) | {"eidetic_tokens": eidetic_tokens, "eidetic_rule": rule}
    if variant not in RIVALS:
        changes: dict[str, Any] = {}
        if variant != "bmojo":
            # a boundary at each token, so that a question is served by its own query
            changes = {"memory_layers": list(range(size.layers)), "span_refresh_tokens": 1}
        if variant == "span":
            changes["eidetic_tokens"] = 0
        return BMojoConfig(**(bmojo | changes))
    # an exact window, without the room that whole blocks need
    plain = _fields(size, vocabulary) | {"eidetic_tokens": 0, "span_block_tokens": 1, "span_refresh_tokens": 1}
    recurrent = variant in ("mamba2", "gated_deltanet")
    if recurrent:
        plain["layer_types"] = [variant] * size.layers
    elif variant == "hybrid":
        plain["layer_types"] = [("mamba2", "sliding_attention")[i % 2] for i in range(size.layers)]
    elif variant == "window":
        plain["layer_types"] = ["sliding_attention"] * size.layers
    field = "ssm_state_size" if recurrent else "window_tokens"
    return _least(plain, field, memory_bytes(BMojoConfig(**bmojo)))


def memory_bytes(config: BMojoConfig) -> int:
    """Bytes of float32 that one sequence carries on the device, whatever its length."""
    return TieredCache(config).device_bytes()


def _least(fields: dict[str, Any], name: str, wanted: int) -> BMojoConfig:
    """The config of the smallest value of one field that carries at least so many bytes."""

    def config(value: int) -> BMojoConfig:
        sized: dict[str, Any] = {**fields, name: value}
        return BMojoConfig(**sized)

    high = fields[name]
    while memory_bytes(config(high)) < wanted:
        high *= 2
    low = fields[name]
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if memory_bytes(config(middle)) >= wanted else (middle + 1, high)
    return config(low)


def _fields(size: ModelSize, vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": size.width, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.heads, "head_dim": size.width // size.heads,
        # mixers alone, as in Zoology, and no positions: what lies far is found by content
        "intermediate_size": 0, "rope_theta": None, "far_positions": "none",
        "window_tokens": size.window_tokens, "span_block_tokens": size.block_tokens,
        "span_refresh_tokens": size.block_tokens, "span_blocks": size.span_blocks, "memory_layers": [],
        "storage_dtype": "float32", "kv_conv_size": 4, "ssm_expand": 1, "ssm_head_dim": size.width // 2,
        "ssm_state_size": size.state_size, "ssm_chunk_size": 32,
        # 0.1 at width 32: at the usual 0.02 such models stand still for hundreds of steps, and some seeds never start
        "initializer_range": (0.32 / size.width) ** 0.5,
    }  # fmt: skip
