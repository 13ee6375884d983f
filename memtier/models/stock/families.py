"""Tiny random models of the stock families that are tested; docs/models.md lists them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

__all__ = ["STOCK_FAMILIES", "STOCK_SIZES", "STOCK_TRAINED", "StockFamily", "tiny_stock_model"]


@dataclass(frozen=True)
class StockFamily:
    """A tiny random model of transformers that the tests read with memory; docs/models.md lists them.

    Args:
        classes: the prefix of its classes in transformers.
        special: what in it has to be read rightly.
        overrides: of `STOCK_SIZES`.
        default: tested at every run, not only with ``-m slow``.
    """

    classes: str
    special: str
    overrides: dict[str, Any] = field(default_factory=dict)
    default: bool = True


STOCK_TRAINED = 64
STOCK_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": STOCK_TRAINED, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_ALTERNATING = {"sliding_window": 10, "layer_types": ["sliding_attention", "full_attention"]}
_MIXTURE = {"num_local_experts": 2, "num_experts_per_tok": 1}


def _scaled(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **parameters}}


_LONGROPE = _scaled(
    "longrope", factor=4.0, short_factor=[1.0, 1.5, 2.0, 3.0], long_factor=[4.0] * 4,
    original_max_position_embeddings=STOCK_TRAINED,
)  # fmt: skip
STOCK_FAMILIES: dict[str, StockFamily] = {
    "llama": StockFamily("Llama", "grouped heads"),
    "llama-one-kv-head": StockFamily("Llama", "one key/value head", {"num_key_value_heads": 1}, default=False),
    "llama-linear": StockFamily("Llama", "linear rotary scaling", _scaled("linear", factor=2.0)),
    "llama-dynamic": StockFamily("Llama", "dynamic rotary scaling, inside its length", _scaled("dynamic", factor=2.0)),
    "llama-llama3": StockFamily(
        "Llama", "llama3 rotary scaling",
        _scaled("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "llama-yarn": StockFamily(
        "Llama", "yarn rotary scaling", _scaled("yarn", factor=4.0, original_max_position_embeddings=16)
    ),
    "phi3-longrope": StockFamily("Phi3", "longrope rotary scaling, fused projections", _LONGROPE),
    "qwen2": StockFamily("Qwen2", "biases", default=False),
    "qwen2-alternating": StockFamily(
        "Qwen2", "sliding and full layers by turns", {"use_sliding_window": True, **_ALTERNATING}
    ),
    "qwen3": StockFamily("Qwen3", "norms of queries and keys", {"head_dim": 16}),
    "qwen3-moe": StockFamily(
        "Qwen3Moe", "mixture of experts",
        {"head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}, default=False,
    ),
    "mistral": StockFamily("Mistral", "no window", {"sliding_window": None}, default=False),
    "mistral-sliding": StockFamily("Mistral", "sliding window in all layers", {"sliding_window": 10}),
    "mixtral": StockFamily("Mixtral", "mixture of experts", {"sliding_window": None, **_MIXTURE}, default=False),
    "granite": StockFamily("Granite", "its own scales", {"attention_multiplier": 0.2, "logits_scaling": 2.0}),
    "phi-partial": StockFamily("Phi", "partial rotary", {"partial_rotary_factor": 0.5}),
    "smollm3": StockFamily("SmolLM3", "layers without rotary", {"no_rope_layers": [1, 0]}),
    "olmo2": StockFamily("Olmo2", "norms after the layers", default=False),
    "olmo3": StockFamily("Olmo3", "a rotary for each layer type", _ALTERNATING, default=False),
    "gemma2": StockFamily(
        "Gemma2", "soft caps of scores and logits, sliding and full layers by turns",
        {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, **_ALTERNATING},
    ),
    "gemma3": StockFamily(
        "Gemma3Text", "a rotary for each layer type, sliding and full layers by turns",
        {"head_dim": 8, "query_pre_attn_scalar": 8, **_ALTERNATING},
    ),
    "cohere": StockFamily("Cohere", "interleaved rotary, parallel layers", default=False),
    "cohere2": StockFamily("Cohere2", "interleaved rotary in sliding layers, none in full ones", _ALTERNATING),
    "gpt-oss": StockFamily(
        "GptOss", "attention sinks of the model, yarn, mixture of experts",
        {"head_dim": 8, "sliding_window": 10, **_MIXTURE},
    ),
    "glm": StockFamily("Glm", "partial interleaved rotary", {"head_dim": 8}),
    "glm4": StockFamily("Glm4", "partial interleaved rotary", {"head_dim": 8}, default=False),
    "ernie": StockFamily("Ernie4_5", "interleaved rotary", {"head_dim": 8}, default=False),
    "exaone4": StockFamily("Exaone4", "full layers without rotary", _ALTERNATING, default=False),
    "starcoder2": StockFamily("Starcoder2", "biases, plain MLP", {"sliding_window": None}, default=False),
}  # fmt: skip


def tiny_stock_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A model of STOCK_FAMILIES with random weights, in eval mode."""
    family = STOCK_FAMILIES[name]
    config = getattr(transformers, f"{family.classes}Config")(**{**STOCK_SIZES, **family.overrides, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            # biases, norms and sinks away from 0 and 1, where a mistake would not show
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return torch.nn.Module.to(model, dtype).eval()
