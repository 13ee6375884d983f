"""`memtier train hylora`: adapt a B'MOJO model to longer sequences by HyLoRA, and write the adapter.

HyLoRA (Nunez et al. 2024, "Expansion Span"): low-rank updates of the projections of attention and of the recurrence,
and full-rank training of the short convolutions, which are small and which low rank serves badly; embeddings and norms
as well, where wanted (Chen et al. 2023, LoRA+ as used in LongLoRA).
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from memtier.errors import ConfigError
from memtier.models.adapters import find_peft, inject, low_rank_parameters, write_adapter
from memtier.models.bmojo import BMojoForCausalLM
from memtier.training.corpus import load_corpus
from memtier.training.fit import fit
from memtier.training.fit_settings import FitSettings
from memtier.training.lm import load_model
from memtier.training.surroundings import progress_bar, resolve_device, write_record
from memtier.training.text import HeldOut, TextCourse, TextLessons, held_out, text_ids

__all__ = ["HyLora", "HyLoraReport", "adapter_tensors", "add_hylora", "train_hylora"]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
RECURRENCE = ("in_proj", "in_proj_qkvz", "in_proj_ba", "out_proj", "b_proj", "gk_proj", "g_proj")
_CONVOLUTION = re.compile(r"\.(k_conv|v_conv|([qkv]_)?conv1d\.(weight|bias))$")
_NORM = re.compile(r"(^|\.)(\w+_)?norm\.weight$")
_NAME = "default"


@dataclass(frozen=True, slots=True)
class HyLora:
    """What is trained.

    Args:
        rank, alpha: of the low-rank updates, which count alpha / rank; None for alpha = 2 rank.
        dropout: on the input of the low-rank updates.
        embeddings, norms: trained whole too.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    embeddings: bool = False
    norms: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"rank is {self.rank} and dropout {self.dropout}; use at least 1, and 0 to below 1.")


@dataclass(frozen=True, slots=True)
class HyLoraReport:
    """Where a run ended; `before` and `after` are None before it is finished. `loss` is nats a token, the mean over the
    last tenth of the steps."""

    folder: Path
    step: int
    finished: bool
    seconds: float
    tokens: int
    loss: float
    trained_parameters: int
    parameters: int
    before: HeldOut | None
    after: HeldOut | None


def add_hylora(model: BMojoForCausalLM, adapter: HyLora) -> list[str]:
    """Make a model ready for HyLoRA, in place: what is not adapted no longer requires gradients.

    The model computes what it did before, until it is trained.

    Returns:
        The names of the tensors that are trained whole.

    Raises:
        ConfigError: peft is missing, or the model carries adapters already.
    """
    whole = [name for name, _ in model.named_parameters() if _trained_whole(name, adapter)]
    config = find_peft().LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha if adapter.alpha is not None else 2 * adapter.rank,
        lora_dropout=adapter.dropout, target_modules=[*ATTENTION, *RECURRENCE],
    )  # fmt: skip
    inject(model, config, _NAME)
    parameters = dict(model.named_parameters())
    for name in whole:
        parameters[name].requires_grad_(True)
    return whole


def adapter_tensors(model: BMojoForCausalLM, whole: list[str]) -> dict[str, torch.Tensor]:
    """What an adapter of this model consists of: low-rank factors, and the tensors trained whole."""
    parameters = dict(model.named_parameters())
    return {name: p.detach() for name, p in low_rank_parameters(model, _NAME)} | {
        name: parameters[name].detach() for name in whole
    }


def train_hylora(
    model: str | Path,
    corpus: Path | str,
    out: Path | str,
    *,
    adapter: HyLora | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = True,
    minutes: float | None = None,
    settings: FitSettings | None = None,
    lessons: TextLessons | None = None,
    show_progress: bool = True,
) -> HyLoraReport:
    """Train an adapter of a saved model and write it as an adapter folder.

    Args:
        model: "nano", a folder or an id.
        corpus: folder of *.md and *.txt; the last 2 % of each file are held out, and measured before and after.
        out: gets log.csv and checkpoint.safetensors, and once finished the adapter and training.json.
        adapter: what is trained.
        seed, device, resume, minutes, show_progress: as in `train_lm`.
        settings: the optimizer's side; `piece_tokens` keeps device memory small on long sequences.
        lessons: how text is cut: `sequence_tokens` is the length to adapt to.

    Raises:
        ConfigError: an argument that cannot work, peft is missing, or a checkpoint of another run.
        ModelError: training diverged.
        IncompatibleMemoryError: the checkpoint in `out` is of another model.
    """
    folder, adapter = Path(out), adapter or HyLora()
    settings, lessons = settings or FitSettings(), lessons or TextLessons()
    where, read = resolve_device(device), load_corpus(corpus)
    adapted, tokenizer = load_model(model)
    torch.nn.Module.to(adapted, where)
    text = text_ids(read, tokenizer, adapted.config.vocab_size)
    before = held_out(adapted, text, sequence_tokens=lessons.sequence_tokens)
    torch.manual_seed(seed)
    whole = add_hylora(adapted, adapter)
    course = TextCourse(text, lessons, adapted.config.memory_settings(), steps=settings.steps, seed=seed)
    with progress_bar(show_progress, settings.steps) as on_row:
        done = fit(adapted, course, settings, out=folder, resume=resume, minutes=minutes, on_row=on_row)
    adapted.eval()
    after = held_out(adapted, text, sequence_tokens=lessons.sequence_tokens) if done.finished else None
    trained = adapter_tensors(adapted, whole)
    report = HyLoraReport(
        folder=folder,
        step=done.step,
        finished=done.finished,
        seconds=done.seconds,
        tokens=done.tokens,
        loss=done.loss,
        trained_parameters=sum(tensor.numel() for tensor in trained.values()),
        parameters=sum(p.numel() for p in adapted.parameters()),
        before=before if done.finished else None,
        after=after,
    )
    if done.finished:
        config = adapted.peft_config[_NAME]
        config.base_model_name_or_path = str(model)
        write_adapter(folder, config, trained)
        write_record(
            folder, "hylora", report, seed=seed, model=str(model), adapter=asdict(adapter), settings=asdict(settings),
            lessons=asdict(lessons), corpus=[asdict(f) for f in read.files],
        )  # fmt: skip
    return report


def _trained_whole(name: str, adapter: HyLora) -> bool:
    if _CONVOLUTION.search(name):
        return True
    if adapter.norms and _NORM.search(name):
        return True
    return adapter.embeddings and name.startswith(("model.embed_tokens.", "lm_head."))
