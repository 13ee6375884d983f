"""Tiny models for tests, yours and ours: seconds to make, every memory on."""

from __future__ import annotations

from typing import Any

import torch

from memtier.models.bmojo import BMojoConfig, BMojoForCausalLM

__all__ = ["tiny_config", "tiny_model"]


def tiny_config(**overrides: Any) -> BMojoConfig:
    """A three-layer configuration with all memories and windows small enough to leave within a hundred tokens."""
    sizes: dict[str, Any] = {
        "vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 3, "layer_types": ["mamba2", "bmojo", "bmojo"],
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24,
        "window_tokens": 16, "sink_tokens": 0, "eidetic_tokens": 6, "span_block_tokens": 4, "span_refresh_tokens": 4,
        "span_blocks": 2, "memory_layers": [1, 2], "ssm_state_size": 8, "ssm_head_dim": 8, "ssm_chunk_size": 8,
        "initializer_range": 0.3, "bos_token_id": 256, "eos_token_id": 257,
    }  # fmt: skip
    return BMojoConfig(**{**sizes, **overrides})


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> BMojoForCausalLM:
    """A model of `tiny_config` with random weights, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BMojoForCausalLM(tiny_config(**overrides))
    torch.nn.Module.to(model, dtype)
    return model.eval()
