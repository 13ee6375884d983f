"""B'MOJO models with the weights of attention models: names, configuration, and what a converted layer begins with.

A source is a causal language model of the common layout (Llama, Mistral, Qwen3 and their kin). That ours computes what
it does, as long as all is inside the window, is not assumed but tried. Sources: algorithms of "priming" as published
with awslabs/hybrid-model-factory; for the weights, Wang et al. 2024 (The Mamba in the Llama).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from memtier.blocks import MemorySettings
from memtier.errors import ConfigError
from memtier.layers.bmojo import BMojoMixer
from memtier.layers.grouped import GroupedGatedDeltaNet, GroupedMamba2
from memtier.models.bmojo import BMojoConfig, BMojoForCausalLM

__all__ = [
    "LONGEST_WINDOW",
    "attention_config",
    "plain_copy",
    "prime_layer",
    "primed_model",
    "primed_sizes",
    "trained_tokens",
    "translate",
]

# parts of a layer, and where they go; what stands under another name is refused
_PARTS = (
    ("input_layernorm", "norm"),
    ("post_attention_layernorm", "mlp_norm"),
    ("mlp.down_proj", "mlp.down_proj"),
    ("mlp.gate_proj", "mlp.gate_proj"),
    ("mlp.up_proj", "mlp.up_proj"),
    ("self_attn", "mixer"),
    ("swa", "mixer"),
    ("bmojo_f.bmojo_attn", "mixer"),
    ("bmojo_f.mamba", "mixer.fading"),
    ("bmojo_f.gdn", "mixer.fading"),
    ("mamba", "mixer"),
    ("gdn", "mixer"),
)
_WHOLE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_LAYER = re.compile(r"(model\.layers\.\d+\.)(.+)")
PROBE_TOKENS = 24
# the published models have it too
LONGEST_WINDOW = 2048


def translate(tensors: Mapping[str, torch.Tensor], what: str) -> dict[str, torch.Tensor]:
    """Tensors under the names of `BMojoForCausalLM`.

    Args:
        tensors: by their names in a model of the common layout, or in a primed hybrid of awslabs/hybrid-model-factory.
        what: the model, for errors.

    Raises:
        ConfigError: a tensor has no place in a B'MOJO model.
    """
    named: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        place = name if name in _WHOLE else None
        if layer := _LAYER.fullmatch(name):
            rest = layer[2]
            for theirs, ours in _PARTS:
                if rest.startswith(f"{theirs}."):
                    place = f"{layer[1]}{ours}{rest.removeprefix(theirs)}"
                    break
        if place is None:
            raise ConfigError(f"{what} has a tensor {name!r}, for which a B'MOJO model has no place.")
        named[place] = tensor
    for name in [name for name in named if name.endswith(".mlp.gate_proj.weight")]:
        up = named.pop(name.replace("gate_proj", "up_proj"))
        named[name.replace("gate_proj", "gate_up_proj")] = torch.cat([named.pop(name), up])
    return named


def attention_config(config: Any, *, layer_types: list[str], **sizes: Any) -> BMojoConfig:
    """The configuration of a B'MOJO model with the sizes of an attention model.

    Args:
        config: of the attention model.
        layer_types: of the B'MOJO model.
        sizes: further fields of BMojoConfig.

    Raises:
        ConfigError: the attention model has something that a B'MOJO model cannot have.
    """
    name, rope = config.model_type, getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" or "rope_theta" not in rope:
        raise ConfigError(f"{name} has rotary positions {rope}; rope_type 'default' is what a B'MOJO model has.")
    if config.hidden_act not in ("silu", "swish"):
        raise ConfigError(f"{name} has hidden_act {config.hidden_act!r}; 'silu' is what a B'MOJO model has.")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fields = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "head_dim": head_dim,
        "num_hidden_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads, "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.rms_norm_eps, "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": float(rope["rope_theta"]), "kv_conv_size": 0, "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id,
        "initializer_range": config.initializer_range,
    }  # fmt: skip
    return BMojoConfig(**{**fields, "layer_types": layer_types, **sizes})


def trained_tokens(config: Any) -> int:
    """The longest distance an attention model knows."""
    sliding = getattr(config, "sliding_window", None)
    used = sliding if getattr(config, "use_sliding_window", True) else None
    return min(config.max_position_embeddings, used or config.max_position_embeddings)


@torch.no_grad()
def plain_copy(source: PreTrainedModel) -> BMojoForCausalLM:
    """An attention model as a B'MOJO model of window attention alone; the two share their tensors where they can.

    Raises:
        ConfigError: the source cannot be one; the message says why.
    """
    config, name = source.config, source.config.model_type
    tensors = translate(source.state_dict(), name)
    qk_norm = any(key.endswith("mixer.q_norm.weight") for key in tensors)
    ours = attention_config(
        config, layer_types=["sliding_attention"] * config.num_hidden_layers, qk_norm=qk_norm, fading="none",
        window_tokens=trained_tokens(config), eidetic_tokens=0, memory_layers=[],
    )  # fmt: skip
    with torch.device("meta"):
        model = BMojoForCausalLM(ours)
    wanted = set(model.state_dict())
    if odd := sorted(wanted ^ set(tensors)):
        raise ConfigError(f"{name} is of another layout: {odd[0]!r} is missing or has no place in a B'MOJO model.")
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.eval()
    tokens = min(PROBE_TOKENS, trained_tokens(config))
    ids = (torch.arange(tokens, device=source.device) * 7 + 3)[None] % config.vocab_size
    was_training = source.training
    source.eval()
    right, got = source(input_ids=ids, use_cache=False).logits.float(), model(ids).logits.float()
    source.train(was_training)
    off = float((got - right).abs().max() / right.abs().max().clamp(min=1e-6))
    if not off <= 2e-3:
        raise ConfigError(
            f"{name} gives other logits as a B'MOJO model of window attention (off by {off:.1e} of the largest): it "
            f"does something that this layout does not show, and cannot be primed."
        )
    return model


def primed_model(plain: BMojoForCausalLM, layers: list[int], fading: str, sizes: MemorySettings) -> BMojoForCausalLM:
    """A hybrid: some layers of an attention model become B'MOJO layers, whose fading memory begins with their weights.

    Args:
        plain: of `plain_copy`.
        layers: those to convert.
        fading: "grouped_mamba2" or "grouped_gated_deltanet".
        sizes: what the model is made for.
    """
    config = plain.config.to_dict()
    for name in ("architectures", "dtype", "model_type", "transformers_version", "_name_or_path"):
        config.pop(name, None)
    kinds = ["bmojo" if layer in layers else "sliding_attention" for layer in range(plain.config.num_hidden_layers)]
    fields = {name: getattr(sizes, name) for name in MemorySettings.__dataclass_fields__}
    fields |= {"layer_types": kinds, "fading": fading, "memory_layers": list(sizes.memory_layers)}
    model = BMojoForCausalLM(BMojoConfig(**{**config, **fields}))
    given = plain.state_dict()
    missing = model.load_state_dict(given, strict=False).missing_keys
    assert all(".fading." in name or ".predictor" in name for name in missing), missing
    for layer in layers:
        mixer = model.model.layers[layer].mixer
        assert isinstance(mixer, BMojoMixer)
        prime_layer(mixer)
    return model


@torch.no_grad()
def prime_layer(mixer: BMojoMixer) -> None:
    """Begin a fading memory with the weights of the attention that it belongs to.

    W_Q reads the state, W_K and W_V are written into it, W_O is the output, and the gate is half (W_O^T + W_V of each
    head's group). Convolutions begin near the identity; decays and step sizes as in Mamba-2.
    """
    fading = mixer.fading
    q, k, v, o = (getattr(mixer, name).weight for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    repeated = (
        v.unflatten(0, (mixer.kv_heads, -1)).repeat_interleave(mixer.heads // mixer.kv_heads, dim=0).flatten(0, 1)
    )
    gate = 0.5 * (o.T + repeated)
    if isinstance(fading, GroupedMamba2):
        fading.in_proj.weight[: -fading.heads] = torch.cat([gate, v, k, q])
        fading.out_proj.weight.copy_(o)
        if fading.B_norm is not None and fading.C_norm is not None:
            assert mixer.q_norm is not None and mixer.k_norm is not None
            fading.B_norm.weight.copy_(mixer.k_norm.weight)
            fading.C_norm.weight.copy_(mixer.q_norm.weight)
        convolutions = [fading.conv1d]
    else:
        assert isinstance(fading, GroupedGatedDeltaNet)
        pairs = {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": o, "g_proj": gate}
        for name, weight in pairs.items():
            getattr(fading, name).weight.copy_(weight)
        convolutions = [fading.q_conv1d, fading.k_conv1d, fading.v_conv1d]
    for convolution in convolutions:
        convolution.weight.copy_(torch.randn_like(convolution.weight) * 0.1)
        convolution.weight[..., -1] += 1.0
        if convolution.bias is not None:
            convolution.bias.zero_()


def primed_sizes(trained: int, attention_layers: tuple[int, ...], given: Mapping[str, Any]) -> MemorySettings:
    """Sizes under which no distance exceeds `trained` tokens, and a sequence of so many is four windows long or more.

    Args:
        attention_layers: those that are not converted; they get the expansion span.
        given: sizes that are set, by their names in MemorySettings.

    Raises:
        ConfigError: what is given spreads over more than `trained` tokens, or names no size.
    """
    block, most = 32, min(trained // 8, given.get("window_tokens", trained))
    while block > max(1, most):
        block //= 2
    window = given.get("window_tokens", max(block, min(LONGEST_WINDOW, trained // 4) // block * block))
    sizes: dict[str, Any] = {
        "window_tokens": window, "sink_tokens": min(4, block), "eidetic_tokens": window // 4,
        "span_block_tokens": block, "span_refresh_tokens": min(16, block), "span_blocks": 0, "memory_layers": (),
        "far_positions": "compact", "storage_dtype": "float16", **given,
    }  # fmt: skip
    try:
        settings = MemorySettings(**sizes)
    except TypeError as error:
        raise ConfigError(f"the sizes cannot be set: {error}. Give fields of MemorySettings.") from error
    if "span_blocks" not in given:
        room = trained - _reach(settings)
        most = min(16, trained // 4 // settings.span_block_tokens, room // settings.span_block_tokens)
        settings = replace(settings, span_blocks=max(0, most))
    if "memory_layers" not in given and settings.span_blocks:
        settings = replace(settings, memory_layers=attention_layers)
    if _reach(settings) > trained:
        raise ConfigError(
            f"windows, block, stride, eidetic tokens, sinks and span spread over {_reach(settings)} tokens, and the "
            f"model knows distances up to {trained}. Take a smaller window_tokens ({settings.window_tokens}), "
            f"eidetic_tokens ({settings.eidetic_tokens}) or span_blocks ({settings.span_blocks})."
        )
    return settings


def _reach(settings: MemorySettings) -> int:
    far = settings.sink_tokens + settings.eidetic_tokens
    if settings.memory_layers:
        far += settings.span_blocks * settings.span_block_tokens
    return settings.window_tokens + settings.ring_tokens + far
