"""`memtier train prime`: a B'MOJO hybrid from an attention model.

Some layers are converted: window attention stays, and a fading memory that begins with the attention's own weights
comes beside it. First what is new learns to give the source's final hidden state (mean squared error), everything else
frozen; then the whole model learns text. Which layers: those whose replacement by window attention harms least.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from memtier.errors import ConfigError
from memtier.models.bmojo import BMojoForCausalLM
from memtier.models.primed import plain_copy, primed_model, primed_sizes, trained_tokens
from memtier.training.corpus import load_corpus
from memtier.training.fit import FitReport, fit
from memtier.training.fit_settings import FitSettings
from memtier.training.prime_alignment import Alignment, AlignmentCourse
from memtier.training.prime_choice import Choice, choose_layers
from memtier.training.surroundings import progress_bar, resolve_device, write_record
from memtier.training.text import HeldOut, TextCourse, TextIds, TextLessons, held_out, text_ids

__all__ = ["Prime", "PrimeReport", "prime", "train_prime"]

ALIGN_FOLDER, LEARN_FOLDER = "align", "learn"
# a model that was converted is measured on sequences so many times as long as those of the alignment
BEYOND = 8


@dataclass(frozen=True, slots=True)
class Prime:
    """What is made of a model.

    Args:
        convert: layers, as "0,2,3"; or "best:N": the N whose replacement by window attention harms least.
        fading: "grouped_mamba2" or "grouped_gated_deltanet".
        sizes: of the memory, by their names in MemorySettings; by default such that no distance exceeds the context
            that the source was trained on.
        align_steps, align_learning_rate: of the first part of the training.
        sequence_tokens: of both parts, but no more in the first than the source was trained on; None for four windows.
    """

    convert: str = "best:1"
    fading: str = "grouped_mamba2"
    sizes: dict[str, Any] = field(default_factory=dict)
    align_steps: int = 500
    align_learning_rate: float = 2e-3
    sequence_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class PrimeReport:
    """Where a run ended; the measures are None before it is finished.

    Args:
        layers: those that were converted.
        choice: nats a token with each layer alone replaced by window attention; None where layers were named.
        alignment: relative squared error of the final hidden state, the mean of the last tenth of the steps.
        loss: nats a token, likewise.
        source: the source inside its context. inside: the new model on the same. beyond: on far longer sequences.
    """

    folder: Path
    layers: tuple[int, ...]
    choice: Choice | None
    step: int
    finished: bool
    seconds: float
    tokens: int
    alignment: float
    loss: float
    parameters: int
    source: HeldOut | None
    inside: HeldOut | None
    beyond: HeldOut | None


def prime(
    source: PreTrainedModel,
    text: TextIds,
    out: Path | str,
    *,
    recipe: Prime | None = None,
    settings: FitSettings | None = None,
    lessons: TextLessons | None = None,
    seed: int = 0,
    resume: bool = True,
    minutes: float | None = None,
    show_progress: bool = False,
) -> tuple[PrimeReport, BMojoForCausalLM]:
    """Prime a loaded model, on the device it is on; see `train_prime`."""
    begun, folder = time.monotonic(), Path(out)
    recipe, settings = recipe or Prime(), settings or FitSettings(steps=500, learning_rate=5e-4)
    plain, trained = plain_copy(source), trained_tokens(source.config)
    every = range(plain.config.num_hidden_layers)
    sizes = primed_sizes(trained, tuple(every), recipe.sizes)
    length = recipe.sequence_tokens or min(trained, 4 * sizes.window_tokens)
    known = min(trained, length)
    if known < 4 * sizes.window_tokens:
        raise ConfigError(
            f"sequences of {known} tokens are under four windows of {sizes.window_tokens}, too short to train the "
            f"fading memory. Set window_tokens to at most {known // 4}, or take longer sequences."
        )
    choice = choose_layers(plain, text, recipe.convert, window_tokens=sizes.window_tokens, tokens=known)
    sizes = primed_sizes(trained, tuple(i for i in every if i not in choice.layers), recipe.sizes)
    lessons = replace(lessons or TextLessons(), sequence_tokens=length)
    torch.manual_seed(seed)
    model = primed_model(plain, list(choice.layers), recipe.fading, sizes)
    torch.nn.Module.to(model, source.device)
    align = replace(
        settings, steps=recipe.align_steps, learning_rate=recipe.align_learning_rate, piece_tokens=None
    )  # fmt: skip
    model.requires_grad_(False)
    for layer in choice.layers:
        model.model.layers[layer].mixer.requires_grad_(True)

    def left() -> float | None:
        return None if minutes is None else minutes - (time.monotonic() - begun) / 60

    whole = replace(lessons, sequence_tokens=known, dense_until=0.0)
    course = AlignmentCourse(TextCourse(text, whole, sizes, steps=align.steps, seed=seed), source)
    with progress_bar(show_progress, align.steps) as on_row:
        first = fit(
            model, course, align, out=folder / ALIGN_FOLDER, resume=resume, minutes=left(), on_row=on_row,
            objective=Alignment(source),
        )  # fmt: skip
    done = FitReport(0, False, 0.0, 0, 0, float("nan"))
    if first.finished:
        model.requires_grad_(True)
        course = TextCourse(text, lessons, sizes, steps=settings.steps, seed=seed + 1)
        with progress_bar(show_progress, settings.steps) as on_row:
            done = fit(
                model, course, settings, out=folder / LEARN_FOLDER, resume=resume, minutes=left(), on_row=on_row
            )  # fmt: skip
    model.eval()
    inside, source_inside, beyond = None, None, None
    if done.finished:
        source_inside = held_out(plain, text, sequence_tokens=known)
        inside = held_out(model, text, sequence_tokens=known)
        beyond = held_out(model, text, sequence_tokens=BEYOND * known)
    report = PrimeReport(
        folder=folder,
        layers=choice.layers,
        choice=choice if choice.losses else None,
        step=first.step + done.step,
        finished=done.finished,
        seconds=first.seconds + done.seconds,
        tokens=first.tokens + done.tokens,
        alignment=first.loss,
        loss=done.loss,
        parameters=sum(p.numel() for p in model.parameters()),
        source=source_inside,
        inside=inside,
        beyond=beyond,
    )
    if done.finished:
        model.save_pretrained(str(folder))
        write_record(
            folder, "prime", report, seed=seed, source=source.config.model_type, conversion=asdict(recipe),
            settings=asdict(settings), lessons=asdict(lessons), memory=asdict(sizes),
        )  # fmt: skip
    return report, model


def train_prime(
    corpus: Path | str,
    out: Path | str,
    *,
    model: str | Path,
    recipe: Prime | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = True,
    minutes: float | None = None,
    settings: FitSettings | None = None,
    lessons: TextLessons | None = None,
    show_progress: bool = True,
) -> PrimeReport:
    """Make a B'MOJO hybrid of a saved attention model and write it as a model folder.

    Args:
        corpus: folder of *.md and *.txt; the last 2 % of each file are held out and measured at the end.
        out: gets a folder each for the two parts of training (log.csv and checkpoint.safetensors) and, once finished,
            the model, its tokenizer and training.json.
        model: folder or id of a causal language model of the common layout (Llama, Mistral, Qwen3 and their kin).
        recipe: what is converted.
        seed: of what is new, and of the text.
        device, resume, minutes, show_progress: as in `train_lm`.
        settings: the optimizer's side; its steps and learning rate are those of the second part.
        lessons: how text is cut; the recipe says how long sequences are.

    Raises:
        ConfigError: the model cannot be primed, an argument that cannot work, or a checkpoint of another run.
        ModelError: training diverged.
        IncompatibleMemoryError: a checkpoint in `out` is of another model.
    """
    where, read = resolve_device(device), load_corpus(corpus)
    try:
        source = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {str(model)!r} cannot be loaded: {error}. Give a folder or an id.") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model))
    except (OSError, ValueError):
        tokenizer = None
    torch.nn.Module.to(source.eval(), where)
    text = text_ids(read, tokenizer, source.config.vocab_size)
    report, _ = prime(
        source, text, out, recipe=recipe, settings=settings, lessons=lessons, seed=seed, resume=resume,
        minutes=minutes, show_progress=show_progress,
    )  # fmt: skip
    if report.finished and tokenizer is not None:
        tokenizer.save_pretrained(str(out))
    return report
