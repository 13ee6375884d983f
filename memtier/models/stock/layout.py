"""What the runtime has to know of a stock model: its sizes, which layers can remember, and default memory sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from memtier.blocks import MemorySettings
from memtier.errors import ConfigError
from memtier.layers.attention import reach
from memtier.layers.bmojo import MixerState
from memtier.layers.mamba2 import Mamba2State
from memtier.layers.state import empty_attention_state
from memtier.models.stock.interface import attention_modules
from memtier.models.stock.rotary import StockRotary, find_rotaries

__all__ = ["StockLayout"]

# defaults, for a model that was trained on long sequences; a short context takes less
LONGEST_WINDOW, BLOCK_TOKENS, REFRESH_TOKENS, SINK_TOKENS, SPAN_BLOCKS = 2048, 32, 16, 4, 16


@dataclass(frozen=True)
class StockLayout:
    """Stands where a B'MOJO model has its config.

    Args:
        local_tokens: the sliding window of each layer, None for a layer that attends to everything.
        kinds: the type of each layer.
        rotaries: of each layer, None for a layer without positions.
    """

    model_type: str
    vocab_size: int
    num_key_value_heads: int
    head_dim: int
    local_tokens: tuple[int | None, ...]
    kinds: tuple[str, ...]
    rotaries: tuple[StockRotary | None, ...]
    dtype: torch.dtype
    bos_token_id: int | None
    eos_token_id: int | list[int] | None

    @classmethod
    def of(cls, model: nn.Module) -> StockLayout:
        """Read off a model of transformers; one on the meta device will do.

        Raises:
            ConfigError: it is no model that can be given a memory; the message says why.
        """
        config: Any = model.config.get_text_config()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        modules = attention_modules(model)
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
        kv_heads = config.num_attention_heads // getattr(modules[0], "num_key_value_groups", 1)
        layers, sliding = config.num_hidden_layers, getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            kinds = ["sliding_attention" if sliding else "full_attention"] * layers
        if other := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
            raise ConfigError(
                f"{config.model_type} has layers of type {', '.join(other)}; a memory can be given to models whose "
                f"layers are all full_attention or sliding_attention."
            )
        rotaries = find_rotaries(model, config, kinds, modules, size)
        local = tuple(sliding if kind == "sliding_attention" else None for kind in kinds)
        return cls(
            config.model_type, config.vocab_size, kv_heads, size, local, tuple(kinds), rotaries, model.dtype,  # pyright: ignore
            config.bos_token_id, config.eos_token_id,
        )  # fmt: skip

    @property
    def num_hidden_layers(self) -> int:
        """Layers, all of them attention."""
        return len(self.local_tokens)

    @property
    def layer_types(self) -> list[str]:
        """As the config of a B'MOJO model names attention without a fading memory."""
        return ["sliding_attention"] * self.num_hidden_layers

    @property
    def trained_tokens(self) -> int | None:
        """No distance may reach this; None if nothing is known."""
        known = [r.trained_tokens for r in self.rotaries if r is not None and r.trained_tokens is not None]
        return min(known, default=None)

    def memory_settings(self) -> MemorySettings:
        """Sizes under which no distance exceeds what the model was trained on.

        Raises:
            ConfigError: the trained context is too short for any.
        """
        trained = self.trained_tokens or 2 * LONGEST_WINDOW
        block = BLOCK_TOKENS
        while block > 1 and 8 * block > trained:
            block //= 2
        stride, sinks = min(REFRESH_TOKENS, block), min(SINK_TOKENS, block)
        blocks = max(1, min(SPAN_BLOCKS, trained // 4 // block))
        window = min(LONGEST_WINDOW, (trained - blocks * block - block - stride - sinks) // block * block)
        if window < block:
            raise ConfigError(
                f"{self.model_type} was trained on sequences of {trained} tokens, too short for a window and a span."
            )
        dtype = {torch.float64: "float64", torch.bfloat16: "bfloat16"}.get(self.dtype, "float16")
        spread = window + block + stride + sinks + blocks * block
        return MemorySettings(
            window_tokens=window, sink_tokens=sinks, eidetic_tokens=0, span_block_tokens=block,
            span_refresh_tokens=stride, span_blocks=blocks,
            memory_layers=tuple(i for i, w in enumerate(self.local_tokens) if w is None or w >= spread),
            far_positions="compact", storage_dtype=dtype,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip

    def check(self, settings: MemorySettings) -> None:
        """Refuse sizes that this model cannot be read under.

        Raises:
            ConfigError
        """
        if settings.eidetic_tokens:
            raise ConfigError(
                f"eidetic_tokens is {settings.eidetic_tokens}; {self.model_type} has no fading memory to find "
                f"surprising tokens with. Set eidetic_tokens=0."
            )
        if settings.far_positions != "compact":
            raise ConfigError(
                f'far_positions is "{settings.far_positions}"; {self.model_type} was trained on rotated keys at '
                f'distances of its context, and must see no others. Use "compact".'
            )
        spread, trained = reach(settings), self.trained_tokens
        if trained is not None and spread > trained:
            raise ConfigError(
                f"window, block, refresh stride, sinks and span spread over {spread} tokens, and {self.model_type} "
                f"knows distances up to {trained}. Take a smaller window_tokens ({settings.window_tokens}) or fewer "
                f"span_blocks ({settings.span_blocks})."
            )
        for layer in settings.memory_layers:
            local = self.local_tokens[layer]
            if local is not None and local < spread:
                raise ConfigError(
                    f"memory_layers names layer {layer}, whose sliding window of {local} tokens is smaller than what "
                    f"memory spreads over ({spread}). Leave the layer out, or take a smaller window and span."
                )

    def empty_states(
        self, settings: MemorySettings, batch: int, device: torch.device, dtype: torch.dtype
    ) -> list[MixerState | Mamba2State]:
        """Fresh states of every layer."""
        self.check(settings)
        return [
            MixerState(
                empty_attention_state(
                    batch, settings=settings, kv_heads=self.num_key_value_heads, head_dim=self.head_dim,
                    hidden_size=0, conv_size=0, predictor_tokens=1, fading=False,
                    memory=layer in settings.memory_layers, device=device, dtype=dtype,
                ),
                None,
            )
            for layer in range(self.num_hidden_layers)
        ]  # fmt: skip
