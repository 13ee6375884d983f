"""The training loop: AdamW, warm-up then a plateau then a slow stop, resumable at any logged step.

`train` needs a model that takes input_ids, labels, loss_weights and far_attention and gives .loss and .logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch

from memtier.blocks import FarAttention
from memtier.errors import ConfigError, ModelError
from memtier.training.checkpoint import load_checkpoint, save_checkpoint
from memtier.training.fit_settings import Precision, autocast, check_precision
from memtier.training.gradients import enable_checkpointing
from memtier.training.levels import Curriculum
from memtier.training.metrics import LogRow, Meter, keep_rows_until
from memtier.training.optimizer import make_optimizer
from memtier.training.table import append_record
from memtier.training.tasks import Batch, TaskMixer

__all__ = ["CHECKPOINT_NAME", "LOG_NAME", "LoopSettings", "TrainReport", "train"]

CHECKPOINT_NAME = "checkpoint.safetensors"
LOG_NAME = "log.csv"
_MOST_SKIPPED_IN_A_ROW = 10
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """How to train.

    Args:
        minutes, steps: the budget; exactly one. With steps, two runs of one seed are equal; minutes follow the clock.
        batch_tokens, sequence_tokens: of one step over all its sequences, and of a sequence: (until which progress,
            tokens) pairs, in order.
        peak_learning_rate: (until which progress, rate) pairs likewise.
        far_attention: (until which progress, kinds) pairs; the kinds take turns, a step each.
        warmup_steps, decay_from: the learning rate rises over warmup_steps, stays, and falls to 0 from decay_from on.
        far_tokens: an answer whose code was seen further back counts as far.
        precision: of the forward pass; see `FitSettings`.
    """

    minutes: float | None = None
    steps: int | None = None
    batch_tokens: tuple[tuple[float, int], ...] = ((1.0, 8192),)
    sequence_tokens: tuple[tuple[float, int], ...] = ((0.4, 512), (1.0, 1024))
    far_attention: tuple[tuple[float, tuple[FarAttention, ...]], ...] = ((0.5, ("dense",)), (1.0, ("span",)))
    peak_learning_rate: tuple[tuple[float, float], ...] = ((1.0, 2e-3),)
    warmup_steps: int = 100
    decay_from: float = 0.6
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    far_tokens: int = 256
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    log_every_steps: int = 10
    checkpoint_every_seconds: float = 120.0

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ConfigError(f"minutes is {self.minutes} and steps is {self.steps}; give exactly one of them.")
        if (self.minutes or self.steps or 0) <= 0:
            raise ConfigError(f"minutes is {self.minutes} and steps is {self.steps}; the one given must be positive.")
        for name in ("batch_tokens", "sequence_tokens", "peak_learning_rate", "far_attention"):
            ends = [until for until, _ in getattr(self, name)]
            if not ends or ends != sorted(ends) or ends[-1] < 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}; progress must rise up to 1.0.")
        if min(tokens for _, tokens in self.sequence_tokens) < 160:
            raise ConfigError(f"sequence_tokens is {self.sequence_tokens}; a sequence has at least 160 tokens.")
        check_precision(self.precision)
        kinds = [kind for _, turns in self.far_attention for kind in turns or ("",)]
        if unknown := [kind for kind in kinds if kind not in get_args(FarAttention)]:
            raise ConfigError(f"far_attention holds {unknown[0]!r}; use some of {', '.join(get_args(FarAttention))}.")

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is used, 0 to 1."""
        used = step / self.steps if self.steps else seconds / (60.0 * (self.minutes or 1.0))
        return min(used, 1.0)

    def learning_rate(self, step: int, progress: float) -> float:
        """Linear warm-up by steps, a plateau, then a linear fall by progress."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        fall = min(1.0, (1.0 - progress) / max(1e-9, 1.0 - self.decay_from))
        return _now(self.peak_learning_rate, progress) * warm * fall

    def far_attention_at(self, step: int, progress: float) -> FarAttention:
        """What far attention is in a step."""
        turns = _now(self.far_attention, progress)
        return turns[step % len(turns)]

    def tokens_at(self, progress: float) -> tuple[int, int]:
        """Tokens of a step and of a sequence at this progress."""
        return _now(self.batch_tokens, progress), _now(self.sequence_tokens, progress)


def _now(pairs: tuple[tuple[float, _Value], ...], progress: float) -> _Value:
    return next((value for until, value in pairs if progress < until), pairs[-1][1])


@dataclass(frozen=True, slots=True)
class TrainReport:
    """Where a run ended; `row` is the last row of the log."""

    step: int
    seconds: float
    tokens: int
    level: int
    row: LogRow | None


@dataclass(slots=True)
class _State:
    """What the loop carries from step to step, beside weights and moments."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    skipped: int = 0
    level: int = 0
    level_accuracy: float = 0.0


def train(
    model: torch.nn.Module,
    mixer: TaskMixer,
    settings: LoopSettings,
    out: Path,
    *,
    resume: bool = True,
    until: float = 1.0,
    on_row: Callable[[LogRow], None] | None = None,
) -> TrainReport:
    """Train a model in place, on the device it is on.

    Args:
        out: folder of checkpoint.safetensors and log.csv; made if absent.
        resume: go on from the checkpoint in `out` if there is one; else start afresh and drop what was there.
        until: progress at which to stop, with a checkpoint; a later call goes on.
        on_row: called with each row of the log.

    Raises:
        ModelError: ten steps in a row had a loss or gradient that is not finite.
        IncompatibleMemoryError: the checkpoint is of another model, or of another seed.
    """
    out.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    optimizer = make_optimizer(
        model, learning_rate=settings.peak_learning_rate[0][1], weight_decay=settings.weight_decay, betas=settings.betas
    )  # fmt: skip
    state, row = _State(), None
    if resume and (out / CHECKPOINT_NAME).exists():
        saved = load_checkpoint(out / CHECKPOINT_NAME, model, optimizer)
        _check_seed(saved.pop("seed"), mixer.seed, out)
        state = _State(**saved)
        keep_rows_until(out / LOG_NAME, state.step)
    else:
        (out / CHECKPOINT_NAME).unlink(missing_ok=True)
        (out / LOG_NAME).unlink(missing_ok=True)
    if settings.gradient_checkpointing:
        enable_checkpointing(model)
    curriculum = Curriculum(state.level, state.level_accuracy)
    meter = Meter(far_tokens=settings.far_tokens, device=device)
    window = _Window(device)
    saved_at, skipped_in_a_row = time.monotonic(), 0
    model.train()
    while (progress := settings.progress(state.step, state.seconds)) < until:
        begun = time.monotonic()
        batch_tokens, sequence_tokens = settings.tokens_at(progress)
        far_attention = settings.far_attention_at(state.step, progress)
        batch = mixer.batch(
            state.step, level=curriculum.level, sequence_tokens=sequence_tokens, batch_tokens=batch_tokens
        )
        rate = settings.learning_rate(state.step, progress)
        finite = _one_step(model, optimizer, batch, settings, rate, far_attention, curriculum.level, meter, window)
        skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
        state = replace(
            state, step=state.step + 1, tokens=state.tokens + batch.tokens.size, skipped=state.skipped + (not finite)
        )
        if skipped_in_a_row >= _MOST_SKIPPED_IN_A_ROW:
            raise ModelError(
                f"{skipped_in_a_row} steps up to step {state.step} had a loss or gradient that is not finite."
                f" Lower peak_learning_rate ({settings.peak_learning_rate}) or set precision to float32, and resume."
            )
        seconds = time.monotonic() - begun
        state = replace(state, seconds=state.seconds + seconds)
        progress = settings.progress(state.step, state.seconds)
        if state.step % settings.log_every_steps and progress < until:
            continue
        row = _log_row(state, curriculum, progress, rate, sequence_tokens, far_attention, meter, window)
        append_record(out / LOG_NAME, row, digits=5)
        if on_row is not None:
            on_row(row)
        curriculum.update(None if math.isnan(row.level_accuracy) else row.level_accuracy, progress)
        state = replace(state, level=curriculum.level, level_accuracy=curriculum.accuracy)
        if progress >= until or time.monotonic() - saved_at >= settings.checkpoint_every_seconds:
            save_checkpoint(out / CHECKPOINT_NAME, model, optimizer, _as_json(state, mixer.seed))
            saved_at = time.monotonic()
    model.eval()
    return TrainReport(state.step, state.seconds, state.tokens, curriculum.level, row)


class _Window:
    """Loss and gradient norm since the last row, summed on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.loss = torch.zeros((), device=self.device)
        self.gradient_norm = torch.zeros((), device=self.device)
        self.steps, self.tokens, self.begun = 0, 0, time.monotonic()


def _one_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    settings: LoopSettings,
    rate: float,
    far_attention: str,
    level: int,
    meter: Meter,
    window: _Window,
) -> bool:
    """One update; False if loss or gradient was not finite and the weights were left as they were."""
    device = window.device
    tokens, kinds, distance, weights, at_level = (
        torch.from_numpy(a).to(device)
        for a in (batch.tokens, batch.kinds, batch.distance, batch.loss_weights(), batch.levels == level)
    )
    with autocast(settings.precision, device):
        output: Any = model(input_ids=tokens, labels=tokens, loss_weights=weights, far_attention=far_attention)
    loss = output.loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
    finite = bool(torch.isfinite(loss.detach()) & torch.isfinite(norm))
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        window.loss += loss.detach()
        window.gradient_norm += norm
        window.steps += 1
        meter.add(output.logits, tokens, kinds, distance, at_level)
    window.tokens += tokens.numel()
    return finite


def _log_row(
    state: _State,
    curriculum: Curriculum,
    progress: float,
    rate: float,
    sequence_tokens: int,
    far_attention: str,
    meter: Meter,
    window: _Window,
) -> LogRow:
    """The row of the steps since the last one; empties meter and window."""
    reading, steps, now = meter.read(), max(1, window.steps), time.monotonic()
    row = LogRow(
        step=state.step,
        seconds=state.seconds,
        tokens=state.tokens,
        tokens_per_second=window.tokens / max(1e-9, now - window.begun),
        progress=progress,
        learning_rate=rate,
        level=curriculum.level,
        sequence_tokens=sequence_tokens,
        far_attention=far_attention,
        loss=float(window.loss) / steps,
        gradient_norm=float(window.gradient_norm) / steps,
        skipped_steps=state.skipped,
        text_bpb=reading.text_bpb,
        answer_loss=reading.answer_loss,
        answer_accuracy=reading.answer_accuracy,
        near_accuracy=reading.near_accuracy,
        far_accuracy=reading.far_accuracy,
        level_accuracy=reading.level_accuracy,
        copy_loss=reading.copy_loss,
    )
    window.reset()
    return row


def _check_seed(saved: int, seed: int, out: Path) -> None:
    if saved != seed:
        raise ConfigError(
            f"{out} holds a run of seed {saved}, not {seed}; pass that seed, --no-resume or another folder."
        )


def _as_json(state: _State, seed: int) -> dict[str, Any]:
    return {name: getattr(state, name) for name in _State.__slots__} | {"seed": seed}
