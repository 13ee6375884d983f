"""One training run of a B'MOJO model on a course of lessons: AdamW, a warm-up and a cosine, resumable to the bit."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from memtier.errors import ConfigError, ModelError
from memtier.models.bmojo import BMojoForCausalLM
from memtier.training.checkpoint import load_checkpoint, save_checkpoint
from memtier.training.course import Course, Lesson
from memtier.training.fit_settings import FitSettings
from memtier.training.gradients import backward, checkpointed
from memtier.training.metrics import keep_rows_until
from memtier.training.objective import Losses, Objective
from memtier.training.optimizer import make_optimizer
from memtier.training.table import append_record

__all__ = ["CHECKPOINT_NAME", "LOG_NAME", "FitReport", "FitRow", "fit"]

CHECKPOINT_NAME = "checkpoint.safetensors"
LOG_NAME = "log.csv"
_MOST_SKIPPED_IN_A_ROW = 10
_NOT_OF_THE_RESULT = ("log_every_steps", "checkpoint_every_seconds")


@dataclass(frozen=True, slots=True)
class FitRow:
    """One row of log.csv: means over the steps since the row before; sizes are those of the last step.

    Args:
        loss: nats a target; innovation_loss and span_loss unweighted, NaN where a step had none.
        gradient_norm: before clipping.
    """

    step: int
    seconds: float
    tokens: int
    tokens_per_second: float
    learning_rate: float
    sequence_tokens: int
    piece_tokens: int
    span_refresh_tokens: int
    span_blocks: int
    far_attention: str
    loss: float
    innovation_loss: float
    span_loss: float
    gradient_norm: float
    skipped_steps: int


@dataclass(frozen=True, slots=True)
class FitReport:
    """Where a run ended. `finished` is False if time was over before the steps were; `loss` is the mean over the last
    tenth of the steps (NaN before), nats a target."""

    step: int
    finished: bool
    seconds: float
    tokens: int
    skipped_steps: int
    loss: float


@dataclass(frozen=True, slots=True)
class _State:
    """What the loop carries from step to step, beside weights and moments."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    skipped: int = 0
    tail_loss: float = 0.0
    tail_steps: int = 0


def fit(
    model: BMojoForCausalLM,
    course: Course,
    settings: FitSettings,
    *,
    out: Path | None = None,
    resume: bool = True,
    minutes: float | None = None,
    on_row: Callable[[FitRow], None] | None = None,
    on_step: Callable[[int], None] | None = None,
    objective: Objective | None = None,
) -> FitReport:
    """Train the parameters of a model that require gradients, in place, on the device it is on.

    Args:
        out: folder of checkpoint.safetensors and log.csv, made if absent; None keeps neither.
        resume: go on from the checkpoint in `out` if there is one; else start afresh and drop what was there.
        minutes: stop at the first row of the log after so long, with a checkpoint; the plan stays that of all steps.
        on_row: called with each row of the log; on_step with the number of steps done.
        objective: what is made small, the loss of rows and report; None for `read_losses`.

    Raises:
        ConfigError: the checkpoint is of another course or other settings; dense far attention in pieces; nothing to
            train.
        ModelError: ten steps in a row had a loss or gradient that is not finite.
        IncompatibleMemoryError: the checkpoint is of another model.
        CorruptMemoryError: the checkpoint cannot be read.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("no parameter of this model requires gradients; there is nothing to train.")
    device = parameters[0].device
    optimizer = make_optimizer(
        model, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, betas=settings.betas
    )  # fmt: skip
    plan = {
        "course": course.identity,
        "settings": {k: v for k, v in asdict(settings).items() if k not in _NOT_OF_THE_RESULT},
        "model": {"frozen_weights": _frozen_digest(model)},
    }
    state = _begin(out, resume, model, optimizer, plan)
    window, begun, saved_at, skipped_in_a_row = _Window(device), time.monotonic(), time.monotonic(), 0
    was_training = model.training
    model.train()
    try:
        with checkpointed(model, settings.gradient_checkpointing):
            while state.step < settings.steps:
                before = time.monotonic()
                lesson = course.lesson(state.step)
                rate = settings.rate(state.step)
                losses = _update(model, parameters, optimizer, lesson, settings, rate, window, objective)
                skipped_in_a_row = skipped_in_a_row + 1 if losses is None else 0
                if skipped_in_a_row >= _MOST_SKIPPED_IN_A_ROW:
                    raise ModelError(
                        f"{skipped_in_a_row} steps up to step {state.step + 1} had a loss or gradient that is not "
                        f"finite. Lower learning_rate ({settings.learning_rate}) or use precision='float32', and "
                        f"start again."
                    )
                state = replace(
                    state,
                    step=state.step + 1,
                    tokens=state.tokens + lesson.tokens.size,
                    skipped=state.skipped + (losses is None),
                    seconds=state.seconds + time.monotonic() - before,
                )
                if losses is not None and state.step > int(0.9 * settings.steps):
                    tail = state.tail_loss + float(losses.tokens)
                    state = replace(state, tail_loss=tail, tail_steps=state.tail_steps + 1)
                if on_step is not None:
                    on_step(state.step)
                if state.step % settings.log_every_steps and state.step < settings.steps:
                    continue
                row = window.row(state, rate, lesson, settings)
                out_of_time = minutes is not None and time.monotonic() - begun >= 60.0 * minutes
                if out is not None:
                    append_record(out / LOG_NAME, row)
                    due = time.monotonic() - saved_at >= settings.checkpoint_every_seconds
                    if due or out_of_time or state.step == settings.steps:
                        save_checkpoint(out / CHECKPOINT_NAME, model, optimizer, {"plan": plan, **asdict(state)})
                        saved_at = time.monotonic()
                if on_row is not None:
                    on_row(row)
                if out_of_time:
                    break
    finally:
        model.train(was_training)
    finished = state.step >= settings.steps
    if finished and not state.tail_steps:
        raise ModelError(
            f"no step of the last tenth of {settings.steps} had a finite loss; lower learning_rate "
            f"({settings.learning_rate}) or use precision='float32', and start again."
        )
    loss = state.tail_loss / state.tail_steps if state.tail_steps else math.nan
    return FitReport(state.step, finished, state.seconds, state.tokens, state.skipped, loss)


class _Window:
    """Losses and gradient norm since the last row, summed on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(4, dtype=torch.float64, device=self._device)
        self._steps, self._tokens, self._begun = 0, 0, time.monotonic()

    def add(self, losses: Losses, norm: torch.Tensor, tokens: int) -> None:
        """Take one step."""
        nan = torch.full_like(norm, math.nan)
        parts = (losses.tokens, losses.innovation, losses.span, norm)
        self._sums += torch.stack([(nan if part is None else part.detach()).double() for part in parts])
        self._steps += 1
        self._tokens += tokens

    def row(self, state: _State, rate: float, lesson: Lesson, settings: FitSettings) -> FitRow:
        """The row of the steps since the last one; begins the next."""
        means = (self._sums / max(1, self._steps)).tolist()
        length = lesson.tokens.shape[1]
        row = FitRow(
            step=state.step,
            seconds=state.seconds,
            tokens=state.tokens,
            tokens_per_second=self._tokens / max(1e-9, time.monotonic() - self._begun),
            learning_rate=rate,
            sequence_tokens=length,
            piece_tokens=min(settings.piece_tokens or length, length),
            span_refresh_tokens=lesson.memory.span_refresh_tokens,
            span_blocks=lesson.memory.span_blocks if lesson.memory.memory_layers else 0,
            far_attention="dense" if lesson.dense else "span",
            loss=means[0],
            innovation_loss=means[1],
            span_loss=means[2],
            gradient_norm=means[3],
            skipped_steps=state.skipped,
        )
        self._reset()
        return row


def _update(
    model: BMojoForCausalLM,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    lesson: Lesson,
    settings: FitSettings,
    rate: float,
    window: _Window,
    objective: Objective | None,
) -> Losses | None:
    """One update; None if loss or gradient was not finite and the weights were left as they were."""
    optimizer.zero_grad(set_to_none=True)
    losses = backward(model, lesson, settings, objective)
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
    if not bool(torch.isfinite(losses.tokens) & torch.isfinite(norm)):
        return None
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    window.add(losses, norm, lesson.tokens.size)
    return losses


def _begin(
    out: Path | None, resume: bool, model: torch.nn.Module, optimizer: torch.optim.Optimizer, plan: dict[str, Any]
) -> _State:
    """The state to go on from."""
    if out is None:
        return _State()
    out.mkdir(parents=True, exist_ok=True)
    path, log = out / CHECKPOINT_NAME, out / LOG_NAME
    if not resume or not path.exists():
        path.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
        return _State()
    saved = load_checkpoint(path, model, optimizer)
    _check_plan(saved.pop("plan", {}), plan, path)
    state = _State(**saved)
    keep_rows_until(log, state.step)
    return state


def _frozen_digest(model: torch.nn.Module) -> str:
    """A hash of a few values of each parameter that is not trained, and which a checkpoint therefore does not hold."""
    state = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            flat = parameter.detach().flatten()
            picked = flat[:: max(1, flat.numel() // 8)].to("cpu", torch.float64)
            state.update(f"{name} {tuple(parameter.shape)}".encode() + picked.numpy().tobytes())
    return state.hexdigest()


def _check_plan(saved: dict[str, Any], plan: dict[str, Any], path: Path) -> None:
    for part in plan:
        before, now = saved.get(part, {}), _as_json(plan[part])
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise ConfigError(
                    f"{path} is of a run with {name}={before.get(name)!r}, and this one has {name}={now.get(name)!r}. "
                    f"Give the same, --no-resume, or another folder."
                )


def _as_json(value: Any) -> Any:
    """As it comes back from JSON."""
    if isinstance(value, dict):
        return {name: _as_json(v) for name, v in value.items()}
    return [_as_json(v) for v in value] if isinstance(value, list | tuple) else value
