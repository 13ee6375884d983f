"""One training run of a B'MOJO model on a course of lessons: AdamW, a warm-up and a cosine, resumable to the bit.

A sequence is read whole, or in pieces with carried memory (truncated back-propagation through time, Williams and Peng
1990): state passes from piece to piece, gradients do not, and one update follows when all pieces are read. So device
memory is that of one piece, whatever the length of the sequence.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from memtier.cache import TieredCache
from memtier.errors import ConfigError, ModelError
from memtier.models.bmojo import BMojoForCausalLM
from memtier.training.checkpoint import load_checkpoint, save_checkpoint
from memtier.training.course import Course, Lesson
from memtier.training.metrics import keep_rows_until
from memtier.training.objective import NO_TARGET, Losses, read_losses
from memtier.training.table import append_record

__all__ = ["CHECKPOINT_NAME", "LOG_NAME", "FitReport", "FitRow", "FitSettings", "backward", "fit", "make_optimizer"]

CHECKPOINT_NAME = "checkpoint.safetensors"
LOG_NAME = "log.csv"
_MOST_SKIPPED_IN_A_ROW = 10
_NOT_OF_THE_RESULT = ("log_every_steps", "checkpoint_every_seconds")

Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How to train.

    Args:
        steps: updates; the learning rate is planned for so many.
        learning_rate: at its peak: linear up over `warmup_share` of the steps, then a cosine to zero.
        weight_decay: of matrices; vectors (norms, biases, decays of the recurrence) have none.
        piece_tokens: tokens of a piece of truncated back-propagation; None: sequences are read whole.
        precision: of the forward pass: "bfloat16" by autocast, "float32" in the weights' own dtype, "auto" is bfloat16
            on a GPU and float32 elsewhere.
        gradient_checkpointing: keep what passes between layers only, and compute the rest again in the backward pass.
        log_every_steps: steps a row of the log; checkpoints are written at rows.

    Raises:
        ConfigError: a value out of range.
    """

    steps: int = 1000
    learning_rate: float = 2e-3
    warmup_share: float = 0.1
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    piece_tokens: int | None = None
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    log_every_steps: int = 10
    checkpoint_every_seconds: float = 120.0

    def __post_init__(self) -> None:
        for name in ("steps", "log_every_steps", "piece_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1.")
        if not 0.0 <= self.warmup_share < 1.0:
            raise ConfigError(f"warmup_share is {self.warmup_share}; it must be 0 or more, and below 1.")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"precision is {self.precision!r}; use 'auto', 'float32' or 'bfloat16'.")

    def rate(self, step: int) -> float:
        """Learning rate of one step."""
        progress, warm = step / self.steps, self.warmup_share
        if progress < warm:
            return self.learning_rate * min(1.0, (step + 1) / (warm * self.steps))
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (progress - warm) / (1.0 - warm)))

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Around a forward pass on that device."""
        wanted = self.precision == "bfloat16" or (self.precision == "auto" and device.type == "cuda")
        return torch.autocast(device.type, dtype=torch.bfloat16) if wanted else nullcontext()


@dataclass(frozen=True, slots=True)
class FitRow:
    """One row of log.csv: means over the steps since the row before; sizes are those of the last step.

    Args:
        loss: nats a target; innovation_loss and span_loss unweighted, NaN where there is none.
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
) -> FitReport:
    """Train the parameters of a model that require gradients, in place, on the device it is on.

    Args:
        out: folder of checkpoint.safetensors and log.csv, made if absent; None keeps neither.
        resume: go on from the checkpoint in `out` if there is one; else start afresh and drop what was there.
        minutes: stop at the first row of the log after so long, with a checkpoint; the plan stays that of all steps.
        on_row: called with each row of the log; on_step with the number of steps done.

    Raises:
        ConfigError: the checkpoint is of another course or other settings; dense far attention in pieces.
        ModelError: ten steps in a row had a loss or gradient that is not finite.
        IncompatibleMemoryError: the checkpoint is of another model.
        CorruptMemoryError: the checkpoint cannot be read.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = make_optimizer(parameters, settings, device)
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
        with _Checkpointed(model, settings.gradient_checkpointing):
            while state.step < settings.steps:
                before = time.monotonic()
                lesson = course.lesson(state.step)
                rate = settings.rate(state.step)
                losses = _update(model, parameters, optimizer, lesson, settings, rate, window)
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


def backward(model: BMojoForCausalLM, lesson: Lesson, settings: FitSettings) -> Losses:
    """Add the gradients of one lesson to those of the model; its losses, detached.

    Raises:
        ConfigError: dense far attention in pieces.
    """
    device = next(model.parameters()).device
    tokens, targets = torch.from_numpy(lesson.tokens).to(device), torch.from_numpy(lesson.targets)
    length = tokens.shape[1]
    piece = settings.piece_tokens or length
    if piece >= length:
        return _read_and_differentiate(
            model, tokens, targets, settings, 1.0, 1.0, memory=lesson.memory, dense=lesson.dense
        )  # fmt: skip
    if lesson.dense:
        raise ConfigError(
            f"a sequence of {length} tokens is read in pieces of {piece}, and its far attention is dense, which needs "
            f"it whole. Set dense_until to 0, or piece_tokens to None."
        )
    cache = TieredCache(
        model.config, settings=lesson.memory, batch_size=len(tokens), device=device, dtype=model.dtype
    )  # fmt: skip
    counted, done = int((targets != NO_TARGET).sum()), []
    for start in range(0, length, piece):
        part = slice(start, start + piece)
        target_share = int((targets[:, part] != NO_TARGET).sum()) / max(1, counted)
        token_share = tokens[:, part].shape[1] / length
        losses = _read_and_differentiate(
            model, tokens[:, part], targets[:, part], settings, target_share, token_share, cache=cache
        )  # fmt: skip
        cache.detach()
        done.append((target_share, token_share, losses))
    return _sum(done)


def make_optimizer(
    parameters: list[torch.nn.Parameter], settings: FitSettings, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors do not."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=settings.learning_rate, betas=settings.betas,
        fused=device.type == "cuda",
    )  # fmt: skip


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
) -> Losses | None:
    """One update; None if loss or gradient was not finite and the weights were left as they were."""
    optimizer.zero_grad(set_to_none=True)
    losses = backward(model, lesson, settings)
    norm = torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
    if not bool(torch.isfinite(losses.tokens) & torch.isfinite(norm)):
        return None
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    window.add(losses, norm, lesson.tokens.size)
    return losses


def _read_and_differentiate(
    model: BMojoForCausalLM, tokens: torch.Tensor, targets: torch.Tensor, settings: FitSettings, target_share: float,
    token_share: float, **reading: Any,
) -> Losses:  # fmt: skip
    """The losses of one piece, detached: nothing of its graph outlives this call but what a cache carries."""
    with settings.autocast(tokens.device):
        losses = read_losses(model, tokens, targets, **reading)
        loss = losses.total(model.config, target_share=target_share, token_share=token_share)
    loss.backward()
    return losses.detach()


def _sum(parts: list[tuple[float, float, Losses]]) -> Losses:
    """The losses of a sequence of those of its pieces: by share of the targets, or of the tokens."""

    def total(name: str, share: int) -> torch.Tensor | None:
        values = [part[share] * value for part in parts if (value := getattr(part[2], name)) is not None]
        return torch.stack(values).sum() if values else None

    tokens = total("tokens", 0)
    assert tokens is not None
    return Losses(tokens, total("innovation", 1), total("span", 1))


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


class _Checkpointed:
    """A model whose layers recompute what the backward pass needs, for as long as the block lasts."""

    def __init__(self, model: BMojoForCausalLM, wanted: bool) -> None:
        self._model = model
        self._wanted = wanted and not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())

    def __enter__(self) -> None:
        if self._wanted:
            # the name of transformers >= 5.20, or the one before it
            getattr(self._model, "activation_checkpointing_enable", self._model.gradient_checkpointing_enable)()

    def __exit__(self, *_: object) -> None:
        if self._wanted:
            getattr(self._model, "activation_checkpointing_disable", self._model.gradient_checkpointing_disable)()
