"""The weights tier: a model and its tokenizer, perhaps under an adapter, their fingerprint, and one step through them.

What a model is known again by: fingerprint.py.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from memtier.blocks import MemorySettings
from memtier.cache import TieredCache
from memtier.chat_template import ChatTemplate
from memtier.decode_cache import DecodeCache
from memtier.errors import ConfigError, IncompatibleMemoryError, ModelError
from memtier.models.adapters import Adapter, AdapterSet, read_adapter
from memtier.models.bmojo import BMojoConfig, BMojoForCausalLM
from memtier.models.primed_checkpoint import MODEL_TYPE, load_primed_checkpoint, stored_config
from memtier.models.stock import HybridReader, StockLayout, StockReader, is_hybrid
from memtier.reports import WeightsReport
from memtier.text import TextCodec
from memtier.tiers.fingerprint import DTYPES, NO_ADAPTER, digest, fingerprint_of, hash_tensors, same_values

__all__ = ["WeightsTier"]

log = logging.getLogger("memtier")


class WeightsTier:
    """A loaded model, ready for the model thread.

    Args:
        model: the model; it is put into eval mode until `close`.
        codec: its text codec.
        name: what reports call it.
        own: nobody else holds the model, so that adapters may change it; else they get a copy of it.

    Raises:
        ConfigError: the model is neither a B'MOJO model nor one that can be given a memory.
    """

    def __init__(self, model: PreTrainedModel, codec: TextCodec, name: str, *, own: bool = False) -> None:
        self.model = self._given = model
        self._own = own
        self.adapter: Adapter | None = None
        self._adapters: AdapterSet | None = None
        self._views: dict[str, WeightsTier] = {}
        self._uses = 0
        self._reader = None
        if not isinstance(model, BMojoForCausalLM):
            self._reader = HybridReader(model) if is_hybrid(model) else StockReader(model)
        config: Any = model.config if self._reader is None else self._reader.layout
        self.config: BMojoConfig | StockLayout = config
        self.codec = codec
        self.name = name
        self._was_training = model.training
        model.eval()
        self.device, self.dtype = _execution_device(model), model.dtype
        self.fingerprint = fingerprint_of(model, codec.tokenizer)
        self._tensors = dict(model.named_parameters())  # as they were named before an adapter came
        self._hashes: dict[str, str] | None = None
        self._size = [(p.numel(), p.numel() * p.element_size()) for p in model.parameters()]
        ends = self.config.eos_token_id, getattr(model.generation_config, "eos_token_id", None)
        self.end_tokens = frozenset(t for end in ends for t in ([end] if isinstance(end, int) else end or ()))

    @classmethod
    @torch.inference_mode(False)
    def load(
        cls, model: str | Path | Any, tokenizer: Any = None, device: str = "auto", dtype: str = "auto"
    ) -> WeightsTier:
        """Load by name, or take a model as it is.

        Args:
            model: "nano", a Hugging Face id or folder, or a loaded model (given back as it came).
            tokenizer: a tokenizer, its id or folder, or None for the model's own.
            device: "auto" (a GPU if there is one) or a torch device name.
            dtype: "auto" (the weights') or "float32", "float64", "bfloat16", "float16".

        Raises:
            ConfigError: an unknown dtype or device, a model that cannot be found, or one that cannot be given a memory.
        """
        if dtype != "auto" and dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; it must be 'auto' or one of {', '.join(DTYPES)}.")
        if isinstance(model, (str, Path)):
            name, loaded, own = str(model), *_load(model)
        else:
            name, loaded, own = type(model).__name__, model, None
        if not isinstance(loaded, PreTrainedModel):
            raise ConfigError(
                f"model is a {name}; give 'nano', a folder, a Hugging Face id, or a loaded causal language model "
                f"(a PreTrainedModel of transformers)."
            )
        wanted_dtype = loaded.dtype if dtype == "auto" else DTYPES[dtype]
        given = loaded is model
        wanted_device = _device(device, loaded, given=given)
        if (wanted_dtype, wanted_device) != (loaded.dtype, loaded.device):
            try:
                loaded, given = copy.deepcopy(loaded) if given else loaded, False
                loaded = loaded.to(device=wanted_device, dtype=wanted_dtype)  # pyright: ignore[reportCallIssue]
            except (RuntimeError, AssertionError, ValueError) as error:
                # a ValueError is transformers' word for quantised models, which stay where and as they are
                raise ConfigError(
                    f"device {device!r} and dtype {dtype!r} cannot take the model: {error}. Try device='cpu', and "
                    f"'auto' for a model that is quantised or has a device map."
                ) from error
        if isinstance(tokenizer, (str, Path)):
            tokenizer = _tokenizer(str(tokenizer))
        text = loaded.config.get_text_config()
        codec = TextCodec(tokenizer if tokenizer is not None else own, text.vocab_size, text.bos_token_id)
        return cls(loaded, codec, name, own=not given)

    @torch.inference_mode(False)
    def attach(self, adapter: str | Path | Adapter) -> WeightsTier:
        """This model under an adapter: the same object for each session that uses it. To be given back by `release`.

        Runs on the model thread. A model that was passed in as an object is copied when its first adapter comes.

        Args:
            adapter: its folder, or what was read from there.

        Raises:
            ConfigError: no adapter, or one of another model; or peft is missing.
        """
        if not isinstance(self.model, BMojoForCausalLM):
            raise ConfigError(f"{self.name!r} is not a B'MOJO model; adapters by session are for B'MOJO models.")
        adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
        view = self._views.get(adapter.digest)
        if view is None:
            if not self._own:
                self.model, self._own = copy.deepcopy(self.model), True
            if self._adapters is None:
                self._adapters = AdapterSet(self.model)
            self._adapters.add(adapter)
            view = copy.copy(self)
            view.adapter, view.fingerprint = adapter, {**self.fingerprint, "adapter": adapter.digest}
            self._views[adapter.digest] = view
        view._uses += 1
        return view

    def release(self) -> None:
        """A session that used this adapter is closed; the adapter is unloaded after the last. On the model thread."""
        if self.adapter is None or self._adapters is None:
            return
        self._uses -= 1
        if not self._uses:
            del self._views[self.adapter.digest]
            self._adapters.remove(self.adapter.digest)

    def step(self, ids: torch.Tensor, cache: TieredCache, keep: int) -> torch.Tensor:
        """One forward pass.

        Args:
            ids: (T,) int64 on the CPU.
            cache: of the session; dead if this raises.
            keep: logits of the last `keep` tokens; 0 keeps all.

        Returns:
            logits (keep or T, vocabulary) on the CPU, in float32 (float64 for a float64 model).

        Raises:
            ModelError: keys, values or logits that are not finite, or no memory left on the device.
        """
        try:
            return self._logits(ids[None], cache, keep)[0]
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{self.device} has no memory left for a step of {ids.numel()} tokens: {error}. "
                f"The step was taken back; close other sessions or programs on the device and try again."
            ) from error

    def decode(self, tokens: Sequence[int], cache: DecodeCache) -> torch.Tensor:
        """One forward pass of one token for each of several sessions; the caches move on when `cache` is committed.

        Args:
            tokens: an id a row.
            cache: of the sessions.

        Returns:
            logits (rows, vocabulary) on the CPU, in float32 (float64 for a float64 model).

        Raises:
            ModelError: logits of some row that are not finite.
        """
        return self._logits(torch.tensor(tokens)[:, None], cache, 1)[:, 0]

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """What turns add in the model's own words.

        Raises:
            ConfigError: it has no template, or one that is not prefix-stable.
        """
        return ChatTemplate(self.codec.tokenizer)

    def check_settings(self, settings: MemorySettings) -> None:
        """Refuse sizes that a stock model was not trained for; a B'MOJO model has checked its own.

        Raises:
            ConfigError
        """
        if isinstance(self.config, StockLayout):
            self.config.check(settings)

    def check(self, stored: Mapping[str, Any], where: str) -> None:
        """Refuse a store that another model wrote.

        Raises:
            IncompatibleMemoryError: names the first field that differs.
        """
        for field, hint in (
            ("config", "The model's configuration differs."),
            ("tensors", "Its tensors have other names or shapes."),
            ("tokenizer", "Its tokenizer differs."),
        ):
            if stored[field] != self.fingerprint[field]:
                raise IncompatibleMemoryError(
                    f"{where} was written by another model: {field} is {stored[field]}, expected "
                    f"{self.fingerprint[field]} of {self.name!r}. {hint} Open it with the model that wrote it."
                )
        self._check_digest(stored.get("adapter", NO_ADAPTER), where)
        if not same_values(stored, self.fingerprint):
            raise IncompatibleMemoryError(
                f"{where} was written by another model: values of its weights differ from those of {self.name!r}, "
                f"though names and shapes agree. Open it with the weights that wrote it."
            )
        if stored["dtype"] != self.fingerprint["dtype"]:
            log.warning("%s was written in %s and is read in %s", where, stored["dtype"], self.fingerprint["dtype"])

    def tensor_hashes(self) -> dict[str, str]:
        """A hash of all values of each tensor, in the dtype that the model is in; made when first asked for."""
        if self._hashes is None:
            self._hashes = hash_tensors(self._given, self._tensors)
        return self._hashes

    def check_adapter(self, adapter: str | Path, session_id: str) -> None:
        """Refuse an adapter that is not the one in use.

        Raises:
            ConfigError: it is no adapter.
            IncompatibleMemoryError: it is another one.
        """
        digest, used = read_adapter(adapter).digest, self.fingerprint["adapter"]
        if digest != used:
            raise IncompatibleMemoryError(
                f"session {session_id!r} is open, and its adapter is {used}; {str(adapter)!r} is {digest}. Close the "
                f"session first, and open it with the adapter that wrote it."
            )

    def _check_digest(self, stored: str, where: str) -> None:
        if stored != self.fingerprint["adapter"]:
            raise IncompatibleMemoryError(
                f"{where} was written under another adapter: adapter is {stored}, expected "
                f"{self.fingerprint['adapter']}. Keys and values made under one adapter mean nothing under another: "
                f"open it with the adapter that wrote it, or observe the text again under another id."
            )

    def _logits(self, ids: torch.Tensor, cache: TieredCache | DecodeCache, keep: int) -> torch.Tensor:
        if self._adapters is not None:
            self._adapters.use(None if self.adapter is None else self.adapter.digest)
        read = self.model if self._reader is None else self._reader
        logits = read(input_ids=ids.to(self.device), past_key_values=cache, logits_to_keep=keep).logits
        return logits.to("cpu", torch.float64 if logits.dtype == torch.float64 else torch.float32)

    def report(self) -> WeightsReport:
        """What `inspect` shows of this tier."""
        return WeightsReport(
            name=self.name,
            parameters=sum(numbers for numbers, _ in self._size),
            bytes=sum(size for _, size in self._size),
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            fingerprint=digest(json.dumps(self.fingerprint, sort_keys=True).encode()),
            adapters=() if self.adapter is None else (self.adapter.name,),
        )

    def close(self) -> None:
        """Give the model back as it came."""
        self._given.train(self._was_training)


def _load(model: str | Path) -> tuple[PreTrainedModel, Any]:
    name = str(files("memtier.models") / "nano") if str(model) == "nano" else str(model)
    try:
        if stored_config(name).get("model_type") == MODEL_TYPE:
            return load_primed_checkpoint(name), _tokenizer(name)
        config = AutoConfig.from_pretrained(name)
        family = BMojoForCausalLM if isinstance(config, BMojoConfig) else AutoModelForCausalLM
        with _no_progress_bar():
            return family.from_pretrained(name, config=config, dtype="auto"), _tokenizer(name)
    except (OSError, ValueError) as error:
        # a ValueError is transformers' word for a model type that it does not know, or that is no language model
        raise ConfigError(
            f"model {str(model)!r} cannot be loaded: {error}. Give 'nano', a folder that holds config.json and "
            f"model.safetensors, or the id of a causal language model on the Hugging Face Hub."
        ) from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        log.warning("%s has no tokenizer (%s): sessions take and yield token ids", name, error)
        return None


def _device(device: str, loaded: PreTrainedModel, given: bool) -> torch.device:
    if device == "auto":
        return loaded.device if given else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device is {device!r}: {error}. Try 'auto', 'cpu' or 'cuda'.") from error
    if wanted.type == "cuda" and wanted.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return wanted


def _execution_device(model: PreTrainedModel) -> torch.device:
    """Where a model computes.

    Raises:
        ConfigError: on several devices.
    """
    devices = {p.device for p in model.parameters() if not p.is_meta}
    if len(devices) != 1:
        raise ConfigError(
            f"the model's layers lie on {', '.join(sorted(map(str, devices))) or 'no device'}; a session is read on "
            f"one device. Load it with device_map='cuda:0', or with layers offloaded to 'cpu' or 'disk'."
        )
    return devices.pop()
