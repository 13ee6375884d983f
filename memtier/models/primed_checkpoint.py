"""Primed hybrids as awslabs/hybrid-model-factory publishes them (`hybrid_qwen3`), loaded into `BMojoForCausalLM`.

Its config names each layer in `hybrid_override_pattern`, such as "*-BMF-M2": attention, B'MOJO-F, Mamba-2; GDN is Gated
DeltaNet, SWA window attention. Each kind has a config of its own. What of that format has no counterpart here is
refused by name. Full attention becomes a window and retrieved blocks, as with every model that is given a memory.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from memtier.errors import ConfigError
from memtier.models.bmojo import BMojoConfig, BMojoForCausalLM
from memtier.models.primed import LONGEST_WINDOW, attention_config, primed_sizes, translate

__all__ = ["MODEL_TYPE", "load_primed_checkpoint", "primed_checkpoint_config", "stored_config"]

MODEL_TYPE = "hybrid_qwen3"
LAYERS = {
    "*": "sliding_attention",
    "SWA": "sliding_attention",
    "BMF": "bmojo",
    "M2": "grouped_mamba2",
    "GDN": "grouped_gated_deltanet",
}
MIXERS = {"mamba2": "grouped_mamba2", "gdn": "grouped_gated_deltanet", "gated_deltanet": "grouped_gated_deltanet"}
# what each part of the config must say, where it says something
EXPECTED: dict[str, dict[str, Any]] = {
    "bmojo_config": {"tie_attn_weights": True},
    "mamba2_config": {"use_qk_norm": True, "use_pos_emb": False},
    "gdn_config": {
        "use_gate": True, "use_short_conv": True, "allow_neg_eigval": False, "conv_bias": False, "norm_eps": 1e-5,
        "kv_proj_rank": None,
    },
}  # fmt: skip


def stored_config(name: str) -> dict[str, Any]:
    """What the config.json of a folder or an id says; {} if there is none.

    Raises:
        OSError: it cannot be had.
    """
    return PreTrainedConfig.get_config_dict(name)[0]


def primed_checkpoint_config(stored: dict[str, Any]) -> BMojoConfig:
    """The configuration of the B'MOJO model that a published one is.

    Args:
        stored: its config.json.

    Raises:
        ConfigError: it has something that a B'MOJO model cannot have.
    """
    pattern = (stored.get("hybrid_override_pattern") or "-".join(["*"] * stored["num_hidden_layers"])).split("-")
    if odd := sorted(set(pattern) - set(LAYERS)):
        raise ConfigError(f"{MODEL_TYPE} has layers of kind {', '.join(odd)}; memtier reads {', '.join(LAYERS)}.")
    parts = {name: stored.get(name) or {} for name in ("bmojo_config", "mamba2_config", "gdn_config", "swa_config")}
    for name, expected in EXPECTED.items():
        for key, value in expected.items():
            if parts[name].get(key, value) != value:
                raise ConfigError(f"{MODEL_TYPE} has {name}.{key}={parts[name][key]!r}; memtier reads {value!r}.")
    mixer = str(parts["bmojo_config"].get("ssm_mixer", "mamba2")).lower()
    if "BMF" in pattern and mixer not in MIXERS:
        raise ConfigError(f"{MODEL_TYPE} has bmojo_config.ssm_mixer={mixer!r}; memtier reads {', '.join(MIXERS)}.")
    trained = stored["max_position_embeddings"]
    windows = {parts["bmojo_config"].get("window_size", LONGEST_WINDOW)} if "BMF" in pattern else set()
    windows |= {parts["swa_config"]["window_size"]} if "SWA" in pattern else set()
    if len(windows) > 1:
        raise ConfigError(f"{MODEL_TYPE} has windows of {sorted(windows)} tokens; memtier reads one for all layers.")
    kinds = [LAYERS[kind] for kind in pattern]
    recurrent = {MIXERS.get(mixer)} if "BMF" in pattern else set()
    recurrent |= {kind for kind in kinds if kind in MIXERS.values()}
    # Mamba-2 of this format has a convolution of width 4
    widths = {parts["gdn_config"].get("conv_size", 4) if "delta" in str(kind) else 4 for kind in recurrent}
    if len(widths) > 1:
        raise ConfigError(f"{MODEL_TYPE} has convolutions of widths {sorted(widths)}; memtier reads one.")
    given = {"window_tokens": windows.pop()} if windows else {}
    # it was trained with neither, and its innovation test is not trained at all
    sizes = primed_sizes(
        trained, tuple(i for i, kind in enumerate(pattern) if kind == "*"),
        {**given, "sink_tokens": 0, "eidetic_tokens": 0, **({} if "*" in pattern else {"span_blocks": 0})},
    )  # fmt: skip
    rope = stored.get("rope_parameters") or {"rope_type": "default", "rope_theta": stored.get("rope_theta", 10_000.0)}
    plain = SimpleNamespace(**{
        "head_dim": None, "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": None, "initializer_range": 0.02, "rms_norm_eps": 1e-6,
        **stored, "rope_parameters": {**rope, **(stored.get("rope_scaling") or {})},
    })  # fmt: skip
    return attention_config(
        plain, layer_types=kinds, qk_norm=True, fading=MIXERS.get(mixer, "grouped_mamba2"),
        ssm_conv_size=widths.pop() if widths else 4, memory_layers=list(sizes.memory_layers),
        **{name: getattr(sizes, name) for name in (
            "window_tokens", "sink_tokens", "eidetic_tokens", "span_block_tokens", "span_refresh_tokens", "span_blocks",
        )},
    )  # fmt: skip


def load_primed_checkpoint(name: str) -> BMojoForCausalLM:
    """Load a published primed hybrid, in the dtype of its weights.

    Args:
        name: its folder or id.

    Raises:
        ConfigError: its config or its weights are not as this format has them.
        OSError: it cannot be had.
    """
    config = primed_checkpoint_config(stored_config(name))
    tensors = translate(_stored_tensors(name), MODEL_TYPE)
    dtype = next(iter(tensors.values())).dtype
    config.dtype = dtype
    with torch.device("meta"):
        model = BMojoForCausalLM(config)
    wanted = model.state_dict()
    for key, value in wanted.items():
        if ".predictor" in key:
            tensors[key] = torch.zeros(value.shape, dtype=dtype)
        elif key == "lm_head.weight" and config.tie_word_embeddings:
            tensors.setdefault(key, tensors["model.embed_tokens.weight"])
    for key in sorted(set(wanted) ^ set(tensors)):
        raise ConfigError(f"{name} is of another layout: {key!r} is missing or has no place in a B'MOJO model.")
    for key, value in wanted.items():
        if tensors[key].shape != value.shape:
            raise ConfigError(f"{name}: {key!r} is {tuple(tensors[key].shape)}; {tuple(value.shape)} was expected.")
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model.eval()


def _stored_tensors(name: str) -> dict[str, torch.Tensor]:
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    files = {SAFE_WEIGHTS_NAME}
    if index is not None:
        files = set(json.loads(Path(index).read_text())["weight_map"].values())
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(files):
        tensors |= load_file(str(cached_file(name, file)))
    return tensors
