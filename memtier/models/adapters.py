"""Adapters: small trained differences to the weights of a B'MOJO model, made and applied through peft.

A folder in peft's own form: adapter_config.json, and adapter_model.safetensors with the low-rank factors (Hu et al.
2021, LoRA) and, under their plain names, the tensors that were trained whole: short convolutions, perhaps norms and
embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from memtier.errors import ConfigError
from memtier.models.bmojo import BMojoForCausalLM

__all__ = ["Adapter", "AdapterSet", "find_peft", "inject", "low_rank_parameters", "read_adapter", "write_adapter"]

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"
# what peft puts before the names of a model's own tensors
_PREFIX = "base_model.model."
# fields of the config that change what is computed
_OF_THE_RESULT = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def find_peft() -> Any:
    """The peft package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return import_module("peft")
    except ImportError as error:
        raise ConfigError('adapters need peft; install it with: pip install "memtier[train]"') from error


@dataclass(frozen=True, eq=False)
class Adapter:
    """What an adapter folder holds.

    Args:
        name: of its folder.
        digest: of the tensors and of what the configuration says about their use.
        config: peft's LoraConfig.
        tensors: by name in the model; a low-rank factor as ``....in_proj.lora_A.weight``.
    """

    name: str
    digest: str
    config: Any
    tensors: Mapping[str, torch.Tensor]

    @property
    def full_rank(self) -> dict[str, torch.Tensor]:
        """The tensors that were trained whole."""
        return {name: tensor for name, tensor in self.tensors.items() if ".lora_" not in name}


def read_adapter(folder: Path | str) -> Adapter:
    """Read an adapter folder.

    Raises:
        ConfigError: it is none, cannot be read, or is of another kind than LoRA.
    """
    folder = Path(folder)
    for name in (CONFIG_NAME, TENSORS_NAME):
        if not (folder / name).is_file():
            raise ConfigError(
                f"adapter {str(folder)!r} has no {name}. Give a folder that `memtier train hylora` or peft wrote."
            )
    try:
        fields = json.loads((folder / CONFIG_NAME).read_text())
        tensors = load_file(str(folder / TENSORS_NAME))
    except (ValueError, SafetensorError) as error:
        raise ConfigError(f"adapter {str(folder)!r} cannot be read: {error}. Write it again.") from error
    if fields.get("peft_type") != "LORA":
        raise ConfigError(f"adapter {str(folder)!r} is of kind {fields.get('peft_type')!r}; 'LORA' was expected.")
    state = blake2b(json.dumps({k: fields.get(k) for k in _OF_THE_RESULT}, sort_keys=True).encode(), digest_size=16)
    named = {name.removeprefix(_PREFIX): tensor for name, tensor in sorted(tensors.items())}
    for name, tensor in named.items():
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        state.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return Adapter(folder.name, state.hexdigest(), find_peft().LoraConfig.from_pretrained(str(folder)), named)


def write_adapter(folder: Path, config: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write an adapter folder.

    Args:
        config: peft's LoraConfig.
        tensors: by name, as in `Adapter`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    owned = {f"{_PREFIX}{name}": tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(owned, str(folder / TENSORS_NAME), metadata={"format": "pt"})


def inject(model: BMojoForCausalLM, config: Any, name: str) -> Any:
    """Put the low-rank factors of a new adapter into a model, in place; peft's LoraModel around it.

    Raises:
        ConfigError: the configuration names no module of this model.
    """
    if hasattr(model, "peft_config"):
        raise ConfigError("this model carries adapters already. Give one without, or load it by name.")
    with _ToldClearly():
        return find_peft().LoraModel(model, config, name)


def low_rank_parameters(model: BMojoForCausalLM, name: str) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The low-rank factors of one adapter in a model, by their names in a file."""
    for path, parameter in model.named_parameters():
        if ".lora_" in path and f".{name}." in path:
            yield path.replace(f".{name}.", "."), parameter


class AdapterSet:
    """The adapters of one model, of which one at a time, or none, is in use. The model is changed in place.

    Args:
        model: nobody else may read with it.
    """

    def __init__(self, model: BMojoForCausalLM) -> None:
        self._model = model
        self._tuner: Any = None
        self._full: dict[str, dict[str, torch.Tensor]] = {}
        self._base: dict[str, torch.Tensor] = {}
        self._parameters = dict(model.named_parameters())
        self._swapped: frozenset[str] = frozenset()
        self._used: str | None = None

    def add(self, adapter: Adapter) -> None:
        """Load an adapter; it is not in use yet.

        Raises:
            ConfigError: it was made for another model; the set is as it was.
        """
        name = _key(adapter.digest)
        # the thread of a model may be in inference mode, and peft asks for gradients
        with torch.inference_mode(False), torch.no_grad():
            full = {path: self._fitting(adapter, path, tensor) for path, tensor in adapter.full_rank.items()}
            fresh = self._tuner is None
            try:
                if fresh:
                    self._tuner = inject(self._model, adapter.config, name)
                else:
                    with _ToldClearly():
                        self._tuner.peft_config[name] = adapter.config
                        self._tuner.inject_adapter(self._model, name)
                self._fill(adapter, name)
            except BaseException:
                if self._tuner is not None:
                    self._drop(name)
                raise
            self._full[adapter.digest] = full
            self._base.update({path: self._parameters[path].data for path in full if path not in self._base})
        # a fresh adapter may be the active one
        self._switch(None)

    def remove(self, digest: str) -> None:
        """Let go of an adapter; the last one leaves the model as it came."""
        self.use(None)
        del self._full[digest]
        with torch.inference_mode(False), torch.no_grad():
            self._drop(_key(digest))

    def use(self, digest: str | None) -> None:
        """Read with this adapter from now on; None for the model alone."""
        if digest != self._used:
            self._switch(digest)

    def _switch(self, digest: str | None) -> None:
        with torch.inference_mode(False), torch.no_grad():
            if self._tuner is not None:
                if digest is None:
                    self._tuner.disable_adapter_layers()
                else:
                    self._tuner.enable_adapter_layers()
                    self._tuner.set_adapter(_key(digest))
            full = {} if digest is None else self._full[digest]
            for path in self._swapped - full.keys():
                self._parameters[path].data = self._base[path]
            for path, tensor in full.items():
                self._parameters[path].data = tensor
            self._swapped = frozenset(full)
        self._used = digest

    def _fitting(self, adapter: Adapter, path: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that takes the place of a parameter."""
        parameter = self._parameters.get(path)
        if parameter is None or parameter.shape != tensor.shape:
            raise ConfigError(_other_model(adapter, path, tensor, parameter))
        return tensor.to(parameter.device, parameter.dtype)

    def _fill(self, adapter: Adapter, name: str) -> None:
        ours = dict(low_rank_parameters(self._model, name))
        theirs = {path: tensor for path, tensor in adapter.tensors.items() if ".lora_" in path}
        for path in sorted(ours.keys() | theirs.keys()):
            mine, tensor = ours.get(path), theirs.get(path)
            if mine is None or tensor is None or mine.shape != tensor.shape:
                raise ConfigError(_other_model(adapter, path, tensor, mine))
            mine.copy_(tensor)

    def _drop(self, name: str) -> None:
        others = [other for other in self._tuner.peft_config if other != name]
        if not others:
            self._tuner.unload()
            self._tuner = None
            # some releases of peft leave it there
            self._model.__dict__.pop("peft_config", None)
        else:
            # peft warns when the active one goes
            self._tuner.set_adapter(others[0])
            self._tuner.delete_adapter(name)


def _key(digest: str) -> str:
    """A name for peft, which makes it part of module names."""
    return f"adapter_{digest}"


def _other_model(adapter: Adapter, path: str, tensor: torch.Tensor | None, ours: torch.Tensor | None) -> str:
    shapes = ["no such tensor" if t is None else tuple(t.shape) for t in (tensor, ours)]
    return (
        f"adapter {adapter.name!r} was made for another model: {path} is {shapes[0]} in the adapter and {shapes[1]} in "
        f"the model. Open the model that it was trained on."
    )


class _ToldClearly:
    """peft's refusal of a configuration, as ours."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError) and not isinstance(error, ConfigError):
            raise ConfigError(f"the adapter does not fit this model: {error}") from error
