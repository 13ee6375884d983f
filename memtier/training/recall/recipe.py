"""`memtier train recall`: one model on one recall task, with a log, checkpoints and a model folder at the end."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from memtier.training.course import SpanDraw
from memtier.training.fit_settings import FitSettings
from memtier.training.recall.grid import Cell
from memtier.training.recall.models import memory_bytes
from memtier.training.recall.train import Asked, ask_both, train_model
from memtier.training.surroundings import progress_bar, resolve_device, write_record

__all__ = ["RecallReport", "train_recall"]


@dataclass(frozen=True, slots=True)
class RecallReport:
    """Where a run ended. Accuracies are NaN before it is finished, and those at `long_tokens` where it is 0."""

    folder: Path
    step: int
    finished: bool
    seconds: float
    tokens: int
    loss: float
    accuracy: float
    block_hit: float
    long_accuracy: float
    long_block_hit: float
    memory_bytes: int
    parameters: int


def train_recall(
    cell: Cell,
    out: Path | str,
    *,
    device: str = "auto",
    resume: bool = True,
    minutes: float | None = None,
    settings: FitSettings | None = None,
    span: SpanDraw | None = None,
    dense_until: float | None = None,
    show_progress: bool = True,
) -> RecallReport:
    """Train the model of a cell of the recall suite on its task, and ask it.

    Args:
        cell: model, task, steps, learning rate and seed; see `memtier.training.recall.grid`.
        out: gets log.csv and checkpoint.safetensors, and once finished the model and training.json.
        device: "auto" (CUDA if present), or a name torch knows.
        resume: go on from the checkpoint in `out`, if there is one.
        minutes: stop after so long; a later call goes on.
        settings: the optimizer's side; `steps` and `learning_rate` are the cell's.
        span: sizes of the span, drawn anew for each step.
        dense_until: see `Recipe`; 0 where sequences are read in pieces.

    Raises:
        ConfigError: an argument that cannot work, or a checkpoint of another run.
        ModelError: training diverged.
    """
    folder = Path(out)
    config, task, recipe = cell.parts()
    recipe = replace(
        recipe, fit=settings or recipe.fit, span=span or recipe.span,
        dense_until=recipe.dense_until if dense_until is None else dense_until,
    )  # fmt: skip
    where = resolve_device(device)
    with progress_bar(show_progress, cell.steps) as on_row:
        model, done = train_model(
            config, task, recipe, seed=cell.seed, device=str(where), out=folder, resume=resume, minutes=minutes,
            on_row=on_row,
        )  # fmt: skip
    nothing = Asked(math.nan, math.nan)
    short, long = nothing, nothing
    if done.finished:
        short, long = ask_both(model, task, recipe.eval_rows, cell.long_tokens)
    report = RecallReport(
        folder=folder,
        step=done.step,
        finished=done.finished,
        seconds=done.seconds,
        tokens=done.tokens,
        loss=done.loss,
        accuracy=short.accuracy,
        block_hit=short.block_hit,
        long_accuracy=long.accuracy,
        long_block_hit=long.block_hit,
        memory_bytes=memory_bytes(config),
        parameters=sum(p.numel() for p in model.parameters()),
    )
    if done.finished:
        model.save_pretrained(str(folder))
        write_record(
            folder, "recall", report, cell=asdict(cell), settings=asdict(recipe.plan), span=asdict(recipe.span)
        )
    return report
