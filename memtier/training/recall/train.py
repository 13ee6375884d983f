"""One run of a recall task: train a model on it, and ask it at the trained length and beyond.

The recipe is the same for every model: sequences as short as can be first, where recall is learned in a few hundred
steps, then the length of the task; AdamW, a warm-up and a cosine. A model with a far memory begins with few eidetic
slots, since what to look for is learned among few tokens sooner than among all; a span then takes their place, first
with every sealed token in sight, which teaches the landmarks, then with the chosen blocks. A run of a seed on one
device is a function of its cell.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from memtier.blocks import MemorySettings
from memtier.cache import TieredCache
from memtier.models.bmojo import BMojoConfig, BMojoForCausalLM
from memtier.training.course import Lesson, SpanDraw
from memtier.training.fit import FitReport, FitRow, fit
from memtier.training.fit_settings import FitSettings
from memtier.training.objective import NO_TARGET
from memtier.training.recall.models import memory_bytes
from memtier.training.recall.selectors import NotingSelector, SpanRule
from memtier.training.recall.tasks import RecallTask

__all__ = ["Asked", "RecallCourse", "Recipe", "RunResult", "ask", "ask_both", "run_recall", "train_model"]

# tokens of a step in which a long sequence is read at evaluation
STEP_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained.

    Args:
        steps: updates. batch_tokens: of one update, over all its sequences.
        short_share: part of the steps with short sequences, whose gap is `short_gap`, and with no more than two eidetic
            slots a pair.
        slots_share: part of the steps in which a model with a span has such slots instead of it.
        dense_until: part of the steps after which the span is the chosen blocks, not every sealed token.
        span: sizes of the span, drawn anew for each step.
        fit: the optimizer's side; its `steps` and `learning_rate` are those given here.
        eval_rows: sequences of an evaluation.
    """

    steps: int = 500
    batch_tokens: int = 2048
    learning_rate: float = 6e-3
    short_share: float = 0.75
    short_gap: int = 16
    slots_share: float = 0.4
    dense_until: float = 0.85
    span: SpanDraw = field(default_factory=SpanDraw)
    fit: FitSettings = field(default_factory=lambda: FitSettings(weight_decay=0.01, precision="float32"))
    eval_rows: int = 256

    @property
    def plan(self) -> FitSettings:
        """What `fit` is given."""
        return replace(self.fit, steps=self.steps, learning_rate=self.learning_rate)

    def task_at(self, task: RecallTask, step: int) -> RecallTask:
        """The task of one step: the short one first."""
        if step >= self.short_share * self.steps or task.gap <= self.short_gap:
            return task
        least = RecallTask.least_tokens(task.name, task.pairs, self.short_gap, task.noise)
        return replace(task, gap=self.short_gap, tokens=least)


@dataclass(frozen=True, slots=True)
class RecallCourse:
    """The lessons of one task, for a model whose own memory sizes are `memory`; see `memtier.training.course`."""

    task: RecallTask
    recipe: Recipe
    memory: MemorySettings
    seed: int

    @property
    def identity(self) -> dict[str, Any]:
        """See `Course`."""
        recipe = {k: v for k, v in asdict(self.recipe).items() if k not in ("fit", "eval_rows")}
        return {"recipe": "recall", "seed": self.seed, **asdict(self.task), **recipe, **asdict(self.memory)}

    def lesson(self, step: int) -> Lesson:
        """See `Course`."""
        recipe, now = self.recipe, self.recipe.task_at(self.task, step)
        memory, progress, few = self.memory, step / recipe.steps, 2 * self.task.pairs
        if memory.memory_layers and progress < recipe.slots_share:
            memory = replace(memory, memory_layers=(), eidetic_tokens=few)
        elif now.tokens < self.task.tokens:
            memory = replace(memory, eidetic_tokens=min(memory.eidetic_tokens, few))
        dense = bool(memory.memory_layers) and progress < recipe.dense_until
        batch = now.batch(self.seed, step, max(1, recipe.batch_tokens // now.tokens))
        targets = np.where(batch.labels >= 0, batch.labels, NO_TARGET)
        return Lesson(batch.tokens, targets, recipe.span.draw(memory, self.seed, step), dense)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a model answered: share of right answers and, with a span, of questions whose block was among the chosen
    (the best layer's; NaN without)."""

    accuracy: float
    block_hit: float


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run. `accuracy` is at the task's own length, `long_accuracy` at `long_tokens` (NaN where not asked);
    `seconds` are of the process's own computing time, `loss` is the mean of the last tenth of the steps."""

    accuracy: float
    block_hit: float
    long_accuracy: float
    long_block_hit: float
    loss: float
    memory_bytes: int
    parameters: int
    seconds: float
    wall_seconds: float


def run_recall(
    config: BMojoConfig,
    task: RecallTask,
    recipe: Recipe,
    *,
    seed: int,
    device: str = "cpu",
    long_tokens: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> RunResult:
    """Train one model on one task and ask it.

    Args:
        long_tokens: ask at this length too, with the same pairs; 0 for not.
        on_progress: called with steps done and steps in all.

    Raises:
        ModelError: the loss is not finite.
    """
    begun, begun_wall = time.process_time(), time.monotonic()
    on_step = None if on_progress is None else lambda step: on_progress(step, recipe.steps)
    model, report = train_model(config, task, recipe, seed=seed, device=device, on_step=on_step)
    seconds, wall = time.process_time() - begun, time.monotonic() - begun_wall
    short, long = ask_both(model, task, recipe.eval_rows, long_tokens)
    return RunResult(
        short.accuracy, short.block_hit, long.accuracy, long.block_hit, report.loss, memory_bytes(config),
        sum(p.numel() for p in model.parameters()), seconds, wall,
    )  # fmt: skip


def train_model(
    config: BMojoConfig,
    task: RecallTask,
    recipe: Recipe,
    *,
    seed: int,
    device: str = "cpu",
    out: Path | None = None,
    resume: bool = True,
    minutes: float | None = None,
    on_row: Callable[[FitRow], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> tuple[BMojoForCausalLM, FitReport]:
    """A new model, trained on one task; the options after `device` are those of `fit`."""
    torch.manual_seed(seed)
    model = BMojoForCausalLM(config)
    torch.nn.Module.to(model, device)
    course = RecallCourse(task, recipe, config.memory_settings(), seed)
    report = fit(
        model, course, recipe.plan, out=out, resume=resume, minutes=minutes, on_row=on_row, on_step=on_step
    )  # fmt: skip
    return model, report


def ask_both(model: BMojoForCausalLM, task: RecallTask, rows: int, long_tokens: int) -> tuple[Asked, Asked]:
    """Ask at the task's own length and, if `long_tokens` is not 0, with an eighth of the rows at that one."""
    short, long = ask(model, task, rows), Asked(float("nan"), float("nan"))
    if long_tokens:
        long = ask(model, replace(task, tokens=long_tokens), max(1, rows // 8))
    return short, long


@torch.inference_mode()
def ask(model: BMojoForCausalLM, task: RecallTask, rows: int, *, span_rule: SpanRule = "on") -> Asked:
    """Ask held-out questions, reading as a session does: in steps, with carried memory."""
    device, block = next(model.parameters()).device, model.config.span_block_tokens
    was_training = model.training
    model.eval()
    right = asked = 0
    hits: dict[int, int] = {}
    total: dict[int, int] = {}
    # several batches, so that long sequences of many rows fit into memory
    at_once = max(1, min(rows, 64, 2**16 // task.tokens))
    for part, first in enumerate(range(0, rows, at_once)):
        batch = task.batch(0, part, min(at_once, rows - first), held_out=True)
        gold = (batch.source // block) * (batch.source >= 0) - (batch.source < 0)
        selector = NotingSelector(gold, span_rule)
        cache = TieredCache(model.config, selector=selector, batch_size=len(gold), device=device)
        tokens, labels = torch.from_numpy(batch.tokens).to(device), torch.from_numpy(batch.labels).to(device)
        for start in range(0, task.tokens, STEP_TOKENS):
            step = slice(start, start + STEP_TOKENS)
            hidden, _ = model.model(model.model.embed_tokens(tokens[:, step]), cache, (), False)
            at = labels[:, step] >= 0
            right += int((model.lm_head(hidden[at]).argmax(-1) == labels[:, step][at]).sum())
            asked += int(at.sum())
        for layer in selector.asked:
            hits[layer] = hits.get(layer, 0) + selector.hits[layer]
            total[layer] = total.get(layer, 0) + selector.asked[layer]
    model.train(was_training)
    found = [hits[layer] / total[layer] for layer in total if total[layer]]
    return Asked(right / asked, max(found, default=float("nan")))
