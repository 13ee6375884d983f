"""`TieredCache` for plain transformers: ``model.generate(..., past_key_values=memtier.TieredCache(model.config))``.

Nothing of the model is changed: for the moment of each layer's attention, the attention implementation of its config is
"memtier", and then again what it was.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Cache, PreTrainedConfig

from memtier import cache as carried
from memtier.blocks import RetrievalMode, SpanSelection
from memtier.config import MemoryConfig, resolve_settings
from memtier.errors import ConfigError, ModelError
from memtier.layers.host_selector import HostSpanSelector
from memtier.layers.landmarks import recent_blocks
from memtier.models.stock.interface import IMPLEMENTATION, AttentionCall, announce, outside_graphs
from memtier.models.stock.layout import StockLayout
from memtier.models.stock.plain import PlainLines
from memtier.models.stock.trial import try_classes
from memtier.retriever import random_blocks

__all__ = ["TieredCache"]


class TieredCache(Cache):
    """A cache of transformers that remembers: window, sinks and retrieved blocks instead of all keys.

    For stock attention models in `generate` and in forward passes of your own: greedy, sampling and beam search,
    assisted decoding, batches with padding, streamers, compiled models. Device memory stays constant; blocks that left
    the window stay in host memory, and nothing is written to disk (`memtier.open` does that). Inside the window logits
    are the model's own. Rows of a padded batch give what they give alone.

    Args:
        config: of the model that will read: ``model.config`` itself, not a copy.
        memory: sizes and how to retrieve; `window_tokens` to `span_blocks` and `retrieval` count, the other fields are
            those of a store. None for what fits the model's trained context.

    Raises:
        ConfigError: the model cannot be given a memory, or the sizes contradict it; the message says why.
    """

    def __init__(self, config: PreTrainedConfig, *, memory: MemoryConfig | None = None) -> None:
        super().__init__(layers=[])
        if not isinstance(config, PreTrainedConfig):
            raise ConfigError(f"config is {type(config).__name__}; give the config of the model: model.config.")
        if memory is not None and not isinstance(memory, MemoryConfig):
            raise ConfigError(f"memory is {type(memory).__name__}; it must be a memtier.MemoryConfig.")
        memory = memory or MemoryConfig()
        self._text: Any = config.get_text_config()
        skeleton = _skeleton(self._text)
        self._layout = StockLayout.of(skeleton)
        try_classes(self._layout, skeleton)
        layout = self._layout
        self._settings = resolve_settings(
            memory, layout.memory_settings(), layout.layer_types,
            kv_channels=layout.num_key_value_heads * layout.head_dim,
        )  # fmt: skip
        self._layout.check(self._settings)
        self._mode: RetrievalMode = memory.retrieval
        self._before: str | None = None
        self.reset()

    # -- what the model calls

    @outside_graphs
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Announce that the attention of this layer, which follows, reads with this memory.

        Args:
            key_states, value_states: (B, G, T, D), of this pass; returned as they are.
            layer_idx: of the layer.
        """
        if self._before is None:
            self._before = self._text._attn_implementation or "eager"
        self._text._attn_implementation = IMPLEMENTATION
        announce(self)
        return key_states, value_states

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """One layer of one forward pass. Called by the attention function.

        Raises:
            ModelError: keys, values or results that are not finite, or a batch of another size.
            ConfigError: the model does something to its keys or masks that is not supported.
        """
        before, self._before = self._before, None
        self._text._attn_implementation = before
        return self._lines.attend(call)

    @outside_graphs
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read, padding included."""
        return self._lines.columns

    @outside_graphs
    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """A mask need say nothing but which of the new tokens are padding."""
        return query_length, self._lines.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no end."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """False: a step reads numbers on the host. A compiled model reads each layer's attention between two graphs."""
        return False

    @property
    def is_initialized(self) -> bool:
        """True once something was read."""
        return bool(self._lines.caches)

    @property
    def is_croppable(self) -> bool:
        """False: only the last pass can be taken back."""
        return False

    # -- what generate calls

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the rows named by `beam_idx`, as beam search asks. Copies the blocks of rows that move."""
        self._lines.reorder(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows named by `indices`."""
        self._lines.reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        rows = sum(cache.batch_size for cache in self._lines.caches)
        self._lines.reorder(torch.arange(rows).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Keep what is needed to take the last pass back, as assisted decoding asks."""
        self._lines.records = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of the last forward pass.

        Args:
            tokens_to_remove: as in transformers, 0 or minus the number of tokens.

        Raises:
            ModelError: more than the last pass, or `activate_past_recording` was not called before it.
        """
        if tokens_to_remove > 0:
            raise ModelError(f"crop({tokens_to_remove}): give minus the number of tokens to take back.")
        self._lines.crop(-tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        self._lines = PlainLines(self._make, self._layout.rotaries, self._layout.local_tokens)

    # -- looking

    def device_bytes(self) -> int:
        """Bytes that the rows carry on the device; constant in the length of the text."""
        return sum(cache.device_bytes() for cache in self._lines.caches)

    def attention_mass(self, row: int = 0) -> dict[int, dict[str, float]]:
        """Share of sinks, span and window in the softmax of the last pass, by layer; rows read together are averaged.

        Raises:
            ModelError: nothing was read yet.
        """
        return self._cache_of(row).attention_mass()

    def last_selection(self) -> list[SpanSelection]:
        """What each memory layer of the first row retrieved last.

        Raises:
            ModelError: nothing was read yet.
        """
        return self._cache_of(0).last_selection()

    # -- private

    def _cache_of(self, row: int) -> carried.TieredCache:
        caches = self._lines.caches
        if not caches:
            raise ModelError("the cache is empty: nothing was read yet.")
        return caches[0 if self._lines.together else row]

    def _make(self, rows: int, device: torch.device, dtype: torch.dtype) -> carried.TieredCache:
        # collecting sealed blocks is for sessions; here they stay with the selector
        cache = carried.TieredCache(self._layout, settings=self._settings, batch_size=rows, device=device, dtype=dtype)
        cache.selector = _ModeSelector(self._mode, cache.settings.recency_share)
        return cache


class _ModeSelector(HostSpanSelector):
    """Every block in host memory, chosen in one of the modes of `memtier.retriever`."""

    def __init__(self, mode: RetrievalMode, recency_share: float) -> None:
        super().__init__(recency_share)
        self._mode: RetrievalMode = mode

    def select(
        self, layer: int, queries: torch.Tensor, boundaries: torch.Tensor, visible: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SpanSelector.select`."""
        if self._mode == "on":
            return super().select(layer, queries, boundaries, visible, k)
        rows = queries.shape[0]
        if self._mode == "off" or not int(visible.max()):
            shape = rows, boundaries.numel(), k
            return torch.full(shape, -1), torch.full(shape, float("-inf"))
        some = recent_blocks(visible, k) if self._mode == "recent" else random_blocks(layer, boundaries, visible, k)
        return some[0].expand(rows, -1, -1), some[1].expand(rows, -1, -1)


def _skeleton(config: Any) -> Any:
    """The model of a config without its weights."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except ValueError as error:
        raise ConfigError(
            f"{type(config).__name__} is not of a causal language model that transformers knows: {error}."
        ) from error
