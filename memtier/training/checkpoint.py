"""One file that holds a training run: weights, optimizer, generator state and the loop's own numbers.

The file is safetensors with JSON in its metadata, no pickle, and is replaced whole or not at all.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from memtier.errors import CorruptMemoryError, IncompatibleMemoryError

__all__ = ["load_checkpoint", "load_weights", "save_checkpoint"]

_FORMAT = "memtier-training-1"


def save_checkpoint(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write a checkpoint and make it durable before the one it replaces is gone.

    Args:
        state: numbers and strings of the loop; must survive JSON.
    """
    tensors = {f"model.{name}": tensor.detach() for name, tensor in _model_tensors(model).items()}
    for index, moments in optimizer.state_dict()["state"].items():
        for name, value in moments.items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    owned = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(owned, str(temporary), metadata={"format": _FORMAT, "state": json.dumps(state, sort_keys=True)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint into model, optimizer and torch's generators; returns the loop's state.

    Raises:
        CorruptMemoryError: the file is not a checkpoint.
        IncompatibleMemoryError: it is one of another model.
    """
    tensors, state = _read(path)
    _copy_weights(path, tensors, model)
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, moment = name.split(".", 2)
            moments.setdefault(int(index), {})[moment] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    return state


def load_weights(path: Path, model: torch.nn.Module) -> dict[str, Any]:
    """Put only the weights of a checkpoint into a model; returns the loop's state. Raises as `load_checkpoint`."""
    tensors, state = _read(path)
    _copy_weights(path, tensors, model)
    return state


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import SafetensorError

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CorruptMemoryError(
            f"{path} cannot be read as safetensors: {error}. Start again with --no-resume, or restore the file."
        ) from error
    if metadata.get("format") != _FORMAT:
        raise IncompatibleMemoryError(
            f"{path} has format {metadata.get('format')!r}; {_FORMAT!r} was expected. Start again with --no-resume."
        )
    return tensors, json.loads(metadata["state"])


def _copy_weights(path: Path, tensors: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    ours = _model_tensors(model)
    theirs = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    wrong = sorted(ours.keys() ^ theirs.keys())
    wrong += [name for name in ours.keys() & theirs.keys() if ours[name].shape != theirs[name].shape]
    if wrong:
        raise IncompatibleMemoryError(
            f"{path} holds another model: {len(wrong)} tensors differ in name or shape, the first is {wrong[0]!r}."
            " Start again with --no-resume, or in another folder."
        )
    with torch.no_grad():
        for name, tensor in ours.items():
            tensor.copy_(theirs[name])


def _model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters that are trained and lasting buffers, tied ones once."""
    lasting = model.state_dict().keys()
    tensors: dict[str, torch.Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in lasting}
    return tensors
