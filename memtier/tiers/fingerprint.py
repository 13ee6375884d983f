"""What a model is known again by: its configuration, the names and shapes of its tensors, values, tokenizer, adapter.

A fingerprint, checked at every open, has a few values of each tensor; neither device nor dtype is part of it: values
are compared after rounding to the coarser of the two dtypes. `hash_tensors` is of all values, as they are.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from memtier.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DTYPES", "NO_ADAPTER", "digest", "fingerprint_of", "hash_tensors", "same_values"]

VALUES_A_TENSOR = 4
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Names, paths and library versions say nothing about what the model computes.
NO_ADAPTER = "none"
NOT_FINGERPRINTED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")


def digest(data: bytes) -> str:
    """Hex BLAKE2b of bytes, 128 bits."""
    return blake2b(data, digest_size=16).hexdigest()


def fingerprint_of(model: PreTrainedModel, tokenizer: Any) -> dict[str, str]:
    """Plain strings, by field."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in NOT_FINGERPRINTED}
    tensors = dict(model.named_parameters())
    picked = [_sample(_held(model, name, tensor)) for name, tensor in tensors.items()]
    return {
        "config": digest(json.dumps(config, sort_keys=True, default=str).encode()),
        "tensors": digest(json.dumps([(name, tuple(t.shape)) for name, t in tensors.items()]).encode()),
        "values": base64.b64encode(torch.cat(picked).numpy().tobytes()).decode(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokenizer": _tokenizer_digest(tokenizer),
        "adapter": NO_ADAPTER,
    }


def _held(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter's values, also where a device map keeps them in host memory or on disk, or they are quantised."""
    if tensor.is_meta:
        module, _, last = name.rpartition(".")
        kept = getattr(getattr(model.get_submodule(module), "_hf_hook", None), "weights_map", None)
        if kept is None:
            raise ConfigError(
                f"parameter {name} is on the meta device and holds nothing. Load the model's weights first."
            )
        return kept[last]
    # a tensor of torchao knows few operations
    return tensor.dequantize() if is_traceable_wrapper_subclass(tensor) else tensor


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    at = torch.linspace(0, flat.numel() - 1, min(VALUES_A_TENSOR, flat.numel())).long()
    return flat[at.to(flat.device)].to("cpu", torch.float64)


def same_values(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """True if the few values that two fingerprints keep agree, in the coarser of their dtypes."""
    a, b = (torch.frombuffer(bytearray(base64.b64decode(f["values"])), dtype=torch.float64) for f in (one, two))
    dtypes = (DTYPES[one["dtype"]], DTYPES[two["dtype"]])
    return a.shape == b.shape and any(torch.equal(a.to(d), b.to(d)) for d in dtypes)


def _tokenizer_digest(tokenizer: Any) -> str:
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        about = tokenizer.get_vocab()
    else:
        about = json.loads(backend.to_str())
        # how it was called last, which changes no token of ours
        about["truncation"] = about["padding"] = None
    return digest(json.dumps(about, sort_keys=True).encode())


def hash_tensors(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Hex BLAKE2b of the bytes of each tensor. Takes about a second a GB and thread: hashing holds no lock."""

    def hashed(name: str) -> str:
        flat = _held(model, name, tensors[name]).detach().to("cpu").contiguous().reshape(-1)
        return blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).hexdigest()

    with ThreadPoolExecutor() as threads:
        return dict(zip(tensors, threads.map(hashed, tensors), strict=True))
