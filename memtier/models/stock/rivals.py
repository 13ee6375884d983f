"""What stock models are measured against: models of random weights, and transformers' own caches."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, Cache, DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

__all__ = ["cache_bytes", "full_cache", "random_model", "sliding_cache"]


def random_model(classes: str, **sizes: Any) -> Any:
    """A model of the classes with that prefix, with the same weights each time, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(getattr(transformers, f"{classes}Config")(**sizes)).eval()


def full_cache() -> Cache:
    """All keys and values."""
    return DynamicCache()


def sliding_cache(layers: int, window_tokens: int) -> Cache:
    """Those of the window, in every layer."""
    windows: list[Any] = [DynamicSlidingWindowLayer(window_tokens) for _ in range(layers)]
    return Cache(layers=windows)


def cache_bytes(cache: Any) -> int:
    """Bytes that one of these holds."""
    pairs = ((layer.keys, layer.values) for layer in cache.layers)
    return sum(t.untyped_storage().nbytes() for pair in pairs for t in pair if t is not None)
