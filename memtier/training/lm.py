"""`memtier train lm`: a B'MOJO language model on a folder of text, new or from given weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from memtier.errors import ConfigError
from memtier.models.bmojo import BMojoConfig, BMojoForCausalLM
from memtier.training.corpus import load_corpus
from memtier.training.fit import fit
from memtier.training.fit_settings import FitSettings
from memtier.training.surroundings import progress_bar, resolve_device, write_record
from memtier.training.text import HeldOut, TextCourse, TextLessons, held_out, text_ids
from memtier.training.tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE, make_byte_tokenizer

__all__ = ["LmReport", "byte_config", "load_model", "train_lm"]

# what a new model with a span needs first: a hard choice of blocks teaches nothing about them
DENSE_UNTIL = 0.5


@dataclass(frozen=True, slots=True)
class LmReport:
    """Where a run ended; `held_out` is None before it is finished. `loss` is nats a token, the mean over the last
    tenth of the steps."""

    folder: Path
    step: int
    finished: bool
    seconds: float
    tokens: int
    loss: float
    parameters: int
    held_out: HeldOut | None


def byte_config(**overrides: Any) -> BMojoConfig:
    """The configuration of a byte-level model; `overrides` are fields of BMojoConfig."""
    fields: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    try:
        return BMojoConfig(**(fields | overrides))
    except TypeError as error:
        raise ConfigError(f"the model cannot be made: {error}. Give fields of BMojoConfig.") from error


def load_model(name: str | Path) -> tuple[BMojoForCausalLM, Any]:
    """A saved B'MOJO model in float32, and its tokenizer or None.

    Args:
        name: "nano", a folder, or a Hugging Face id.

    Raises:
        ConfigError: it cannot be found, or is of another kind.
    """
    where = str(files("memtier.models") / "nano") if str(name) == "nano" else str(name)
    try:
        config = AutoConfig.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {str(name)!r} cannot be loaded: {error}. Give 'nano', a folder or an id.") from error
    if not isinstance(config, BMojoConfig):
        raise ConfigError(f"model {str(name)!r} is a {config.model_type}; a B'MOJO model was expected.")
    model = BMojoForCausalLM.from_pretrained(where, config=config, dtype=torch.float32)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError):
        tokenizer = None
    return model, tokenizer


def train_lm(
    corpus: Path | str,
    out: Path | str,
    *,
    model: str | Path | None = None,
    config: BMojoConfig | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = True,
    minutes: float | None = None,
    settings: FitSettings | None = None,
    lessons: TextLessons | None = None,
    show_progress: bool = True,
) -> LmReport:
    """Train a language model and write it as a model folder.

    Args:
        corpus: folder of *.md and *.txt; the last 2 % of each file are held out and measured at the end.
        out: gets log.csv and checkpoint.safetensors, and once finished the model, its tokenizer and training.json.
        model: weights and tokenizer to begin with: "nano", a folder or an id; None for a new byte-level model.
        config: of a new model; None for `byte_config()`.
        seed: of new weights and of the text.
        device: "auto" (CUDA if present), or a name torch knows.
        resume: go on from the checkpoint in `out`, if there is one. The resumed run equals the uninterrupted one.
        minutes: stop after so long; a later call goes on.
        settings: the optimizer's side. lessons: how text is cut; by default a new model that reads sequences whole sees
            every sealed token for half of the steps, which teaches its landmarks.
        show_progress: draw a progress bar on the terminal (needs rich).

    Raises:
        ConfigError: an argument that cannot work, or a checkpoint of another run.
        ModelError: training diverged.
        IncompatibleMemoryError: the checkpoint in `out` is of another model.
    """
    if model is not None and config is not None:
        raise ConfigError("model and config were given; a config is for a new model.")
    folder, settings = Path(out), settings or FitSettings()
    where, read = resolve_device(device), load_corpus(corpus)
    torch.manual_seed(seed)
    if model is None:
        trained, tokenizer = BMojoForCausalLM(config or byte_config()), make_byte_tokenizer()
    else:
        trained, tokenizer = load_model(model)
    if lessons is None:
        whole = settings.piece_tokens is None
        lessons = replace(TextLessons(), dense_until=DENSE_UNTIL if whole and model is None else 0.0)
    torch.nn.Module.to(trained, where)
    text = text_ids(read, tokenizer, trained.config.vocab_size)
    course = TextCourse(text, lessons, trained.config.memory_settings(), steps=settings.steps, seed=seed)
    with progress_bar(show_progress, settings.steps) as on_row:
        done = fit(trained, course, settings, out=folder, resume=resume, minutes=minutes, on_row=on_row)
    trained.eval()
    measured = held_out(trained, text, sequence_tokens=lessons.sequence_tokens) if done.finished else None
    report = LmReport(
        folder=folder,
        step=done.step,
        finished=done.finished,
        seconds=done.seconds,
        tokens=done.tokens,
        loss=done.loss,
        parameters=sum(p.numel() for p in trained.parameters()),
        held_out=measured,
    )
    if done.finished:
        trained.save_pretrained(str(folder))
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))
        write_record(
            folder, "lm", report, seed=seed, begun_with=None if model is None else str(model),
            settings=asdict(settings), lessons=asdict(lessons), corpus=[asdict(f) for f in read.files],
        )  # fmt: skip
    return report
