"""`memtier train`: recipes that train models. Each can be stopped, and goes on from its last checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from memtier.cli_options import Device, Json
from memtier.errors import ConfigError

__all__ = ["train"]

train = typer.Typer(help="Train a model by one of memtier's own recipes.", no_args_is_help=True, rich_markup_mode=None)

Out = Annotated[Path, typer.Option(help="Folder for log.csv, checkpoints and what is trained.")]
Corpus = Annotated[Path, typer.Argument(help="Folder of .txt and .md files.")]
Seed = Annotated[int, typer.Option(help="Draws weights and data.")]
Resume = Annotated[bool, typer.Option(help="Go on from the checkpoint in --out.")]
Minutes = Annotated[float | None, typer.Option(help="Stop after so long; call again to go on.")]
Steps = Annotated[int, typer.Option(help="Updates; the learning rate is planned for so many.")]
Rate = Annotated[float, typer.Option(help="Learning rate at its peak.")]
SequenceTokens = Annotated[int, typer.Option(help="Tokens of a sequence.")]
BatchTokens = Annotated[int, typer.Option(help="Tokens of an update, over all its sequences.")]
PieceTokens = Annotated[
    int | None,
    typer.Option(help="Truncated back-propagation: read a sequence in pieces of so many tokens, memory carried."),
]
PrecisionOption = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Of the forward pass; auto: bfloat16 on a GPU, float32 elsewhere."),
]
Checkpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Recompute activations in the backward pass: less memory.")
]
DrawRefresh = Annotated[
    str, typer.Option("--span-refresh-tokens", help="Draw r anew each step from these, such as 8,16,32.")
]
DrawBlocks = Annotated[str, typer.Option("--span-blocks", help="Draw K anew each step from these, such as 2,4,8.")]
LogEvery = Annotated[int, typer.Option("--log-every", help="Steps a row of log.csv.")]


@train.command("nano")
def train_nano(
    corpus: Corpus,
    out: Annotated[Path, typer.Option(help="Folder for the model and its checkpoints.")],
    seed: Annotated[int, typer.Option(help="Draws weights, text and facts.")] = 0,
    minutes: Annotated[float | None, typer.Option(help="Train for so long (default: the recipe's own time).")] = None,
    steps: Annotated[int | None, typer.Option(help="Train for so many steps instead.")] = None,
    resume: Resume = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train nano, the byte-level model that memtier ships, on a folder of text."""
    from memtier.training.nano import train_nano as run

    report = run(
        corpus, out, seed=seed, device=device, minutes=minutes, steps=steps, resume=resume,
        show_progress=sys.stderr.isatty(),
    )  # fmt: skip
    _tell("nano", report, as_json)


@train.command("lm")
def train_lm(
    corpus: Corpus,
    out: Out,
    model: Annotated[
        str | None, typer.Option(help="Begin with this model: 'nano', a folder or an id (default: new weights).")
    ] = None,
    config: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE: a field of BMojoConfig of a new model; may be repeated.")
    ] = None,
    steps: Steps = 1000,
    learning_rate: Rate = 2e-3,
    sequence_tokens: SequenceTokens = 1024,
    batch_tokens: BatchTokens = 8192,
    piece_tokens: PieceTokens = None,
    dense_until: Annotated[
        float | None,
        typer.Option(
            help="Part of the steps in which every sealed token is seen, which teaches the landmarks (default: 0.5 for "
            "a new model that reads sequences whole, else 0)."
        ),
    ] = None,
    span_refresh_tokens: DrawRefresh = "",
    span_blocks: DrawBlocks = "",
    precision: PrecisionOption = "auto",
    gradient_checkpointing: Checkpointing = False,
    log_every: LogEvery = 10,
    seed: Seed = 0,
    minutes: Minutes = None,
    resume: Resume = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a B'MOJO language model on a folder of text, new or from given weights."""
    from memtier.training.fit_settings import FitSettings
    from memtier.training.lm import DENSE_UNTIL, byte_config
    from memtier.training.lm import train_lm as run
    from memtier.training.surroundings import parse_pairs
    from memtier.training.text import TextLessons

    new_and_whole = model is None and piece_tokens is None
    lessons = TextLessons(
        sequence_tokens, batch_tokens, (DENSE_UNTIL if new_and_whole else 0.0) if dense_until is None else dense_until,
        _span(span_refresh_tokens, span_blocks),
    )  # fmt: skip
    settings = FitSettings(
        steps=steps, learning_rate=learning_rate, piece_tokens=piece_tokens, precision=precision,
        gradient_checkpointing=gradient_checkpointing, log_every_steps=log_every,
    )  # fmt: skip
    new = byte_config(**parse_pairs(config)) if config else None
    report = run(
        corpus, out, model=model, config=new, seed=seed, device=device, resume=resume, minutes=minutes,
        settings=settings, lessons=lessons, show_progress=sys.stderr.isatty(),
    )  # fmt: skip
    _tell("lm", report, as_json)


@train.command("recall")
def train_recall(
    out: Out,
    variant: Annotated[
        str, typer.Option(help="bmojo, bmojo_f, span, bmojo_span, window, mamba2, gated_deltanet or hybrid.")
    ] = "bmojo",
    eidetic_tokens: Annotated[int, typer.Option(help="Slots of the B'MOJO whose bytes the model gets.")] = 16,
    rule: Annotated[str, typer.Option(help="Which old tokens are kept.")] = "innovation",
    task: Annotated[
        Literal["mqar", "noisy_recall", "selective_copy"], typer.Option(help="What is to be recalled.")
    ] = "mqar",
    fillers: Annotated[Literal["zero", "random"], typer.Option(help="What lies between telling and asking.")] = "zero",
    pairs: Annotated[int, typer.Option(help="Pairs of key and value.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    gap: Annotated[int, typer.Option(help="Fillers between telling and asking.")] = 168,
    vocabulary: Annotated[int, typer.Option(help="Distinct tokens.")] = 256,
    width: Annotated[int, typer.Option(help="Width of the model.")] = 32,
    heads: Annotated[int, typer.Option(help="Heads of attention.")] = 1,
    long_tokens: Annotated[int, typer.Option(help="Ask at this length too; 0 for not.")] = 0,
    dense_until: Annotated[
        float, typer.Option(help="Part of the steps after which a span is the chosen blocks, not every sealed token.")
    ] = 0.85,
    steps: Steps = 500,
    learning_rate: Rate = 6e-3,
    batch_tokens: BatchTokens = 2048,
    piece_tokens: PieceTokens = None,
    span_refresh_tokens: DrawRefresh = "",
    span_blocks: DrawBlocks = "",
    precision: PrecisionOption = "float32",
    gradient_checkpointing: Checkpointing = False,
    log_every: LogEvery = 10,
    seed: Seed = 0,
    minutes: Minutes = None,
    resume: Resume = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train one model of the recall suite on one of its tasks, and ask it. `bench recall` runs whole grids of these."""
    from dataclasses import replace

    from memtier.training.recall.grid import Cell
    from memtier.training.recall.recipe import train_recall as run
    from memtier.training.recall.train import Recipe

    cell = Cell(
        variant, eidetic_tokens, rule, task, fillers, pairs, tokens, gap, vocabulary, width, heads,  # pyright: ignore[reportArgumentType]
        learning_rate, steps, batch_tokens, long_tokens, seed,
    )  # fmt: skip
    settings = replace(
        Recipe().fit, piece_tokens=piece_tokens, precision=precision, gradient_checkpointing=gradient_checkpointing,
        log_every_steps=log_every,
    )  # fmt: skip
    report = run(
        cell, out, device=device, resume=resume, minutes=minutes, settings=settings, dense_until=dense_until,
        span=_span(span_refresh_tokens, span_blocks), show_progress=sys.stderr.isatty(),
    )  # fmt: skip
    _tell("recall", report, as_json)


@train.command("hylora")
def train_hylora(
    model: Annotated[str, typer.Argument(help="The model to adapt: 'nano', a folder or an id.")],
    corpus: Corpus,
    out: Out,
    rank: Annotated[int, typer.Option(help="Of the low-rank updates.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="They count alpha / rank (default: 2 rank).")] = None,
    dropout: Annotated[float, typer.Option(help="On the input of the low-rank updates.")] = 0.0,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Train the embeddings too, whole.")] = False,
    norms: Annotated[bool, typer.Option("--norms", help="Train the norms too, whole.")] = False,
    steps: Steps = 200,
    learning_rate: Rate = 1e-3,
    sequence_tokens: Annotated[int, typer.Option(help="Tokens of a sequence: the length to adapt to.")] = 8192,
    batch_tokens: BatchTokens = 16_384,
    piece_tokens: PieceTokens = 1024,
    span_refresh_tokens: DrawRefresh = "",
    span_blocks: DrawBlocks = "",
    precision: PrecisionOption = "auto",
    gradient_checkpointing: Checkpointing = False,
    log_every: LogEvery = 5,
    seed: Seed = 0,
    minutes: Minutes = None,
    resume: Resume = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Adapt a model to longer sequences by HyLoRA, an adapter of its projections and short convolutions.

    Needs memtier[train].
    What is written is an adapter: pass its folder to `runtime.session(..., adapter=FOLDER)`.
    """
    from memtier.training.fit_settings import FitSettings
    from memtier.training.hylora import HyLora
    from memtier.training.hylora import train_hylora as run
    from memtier.training.text import TextLessons

    settings = FitSettings(
        steps=steps, learning_rate=learning_rate, piece_tokens=piece_tokens, precision=precision,
        gradient_checkpointing=gradient_checkpointing, log_every_steps=log_every,
    )  # fmt: skip
    lessons = TextLessons(sequence_tokens, batch_tokens, span=_span(span_refresh_tokens, span_blocks))
    report = run(
        model, corpus, out, adapter=HyLora(rank, alpha, dropout, embeddings, norms), seed=seed, device=device,
        resume=resume, minutes=minutes, settings=settings, lessons=lessons, show_progress=sys.stderr.isatty(),
    )  # fmt: skip
    _tell("hylora", report, as_json)


@train.command("prime")
def train_prime(
    corpus: Corpus,
    out: Out,
    model: Annotated[str, typer.Option("--from", help="The attention model to begin with: a folder or an id.")],
    convert: Annotated[
        str,
        typer.Option(
            help="Layers to convert, such as 0,2,3; or best:N, the N whose replacement by window attention harms least."
        ),
    ],
    fading: Annotated[
        Literal["grouped_mamba2", "grouped_gated_deltanet"], typer.Option(help="The fading memory of those layers.")
    ] = "grouped_mamba2",
    memory: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE: a size of the memory, such as window_tokens=256 (default: what fits the model); may be "
            "repeated."
        ),
    ] = None,
    align_steps: Annotated[int, typer.Option(help="Updates of the first part: the source's hidden states.")] = 500,
    align_learning_rate: Annotated[float, typer.Option(help="Learning rate of the first part at its peak.")] = 2e-3,
    steps: Annotated[int, typer.Option(help="Updates of the second part: text.")] = 500,
    learning_rate: Rate = 5e-4,
    sequence_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a sequence (default: four windows); alignment stays in the context."),
    ] = None,
    batch_tokens: BatchTokens = 8192,
    piece_tokens: PieceTokens = None,
    span_refresh_tokens: DrawRefresh = "",
    span_blocks: DrawBlocks = "",
    precision: PrecisionOption = "auto",
    gradient_checkpointing: Checkpointing = False,
    log_every: LogEvery = 10,
    seed: Seed = 0,
    minutes: Minutes = None,
    resume: Resume = True,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Make a B'MOJO hybrid of an attention model (Llama, Mistral, Qwen3 and their kin) by priming.

    Some layers get a fading memory that begins with their own weights; what is new learns the source's hidden states,
    then the whole learns text.
    """
    from memtier.training.fit_settings import FitSettings
    from memtier.training.prime import Prime
    from memtier.training.prime import train_prime as run
    from memtier.training.surroundings import parse_pairs
    from memtier.training.text import TextLessons

    settings = FitSettings(
        steps=steps, learning_rate=learning_rate, piece_tokens=piece_tokens, precision=precision,
        gradient_checkpointing=gradient_checkpointing, log_every_steps=log_every,
    )  # fmt: skip
    report = run(
        corpus, out, model=model, seed=seed, device=device, resume=resume, minutes=minutes, settings=settings,
        recipe=Prime(
            convert, fading, parse_pairs(memory or []), align_steps, align_learning_rate, sequence_tokens
        ),
        lessons=TextLessons(batch_tokens=batch_tokens, span=_span(span_refresh_tokens, span_blocks)),
        show_progress=sys.stderr.isatty(),
    )  # fmt: skip
    _tell("prime", report, as_json)


def _tell(recipe: str, report: Any, as_json: bool) -> None:
    from dataclasses import asdict

    from memtier.console import emit_json, show_values

    emit_json(asdict(report)) if as_json else show_values(recipe, asdict(report))


def _span(refresh_tokens: str, blocks: str) -> Any:
    from memtier.training.course import SpanDraw

    return SpanDraw(_numbers("--span-refresh-tokens", refresh_tokens), _numbers("--span-blocks", blocks))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"{option} is {text!r}; give whole numbers such as 8,16,32.") from error
