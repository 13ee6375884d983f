"""One run of a recall task: train a model on it, and ask it at the trained length and beyond.

The recipe is the same for every model: sequences as short as can be first, where recall is learned in a few hundred
steps, then the length of the task; AdamW, a warm-up and a cosine. A model with a far memory begins with few eidetic
slots, since what to look for is learned among few tokens sooner than among all; a span then takes their place, first
with every sealed token in sight, which teaches the landmarks, then with the chosen blocks. A run of a seed on one
device is a function of its cell.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from memtier.cache import TieredCache
from memtier.errors import ModelError
from memtier.models.bmojo import BMojoConfig, BMojoForCausalLM
from memtier.training.recall.models import memory_bytes
from memtier.training.recall.selectors import NotingSelector, SpanRule
from memtier.training.recall.tasks import RecallTask

__all__ = ["Asked", "Recipe", "RunResult", "ask", "run_recall"]

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
        eval_rows: sequences of an evaluation.
    """

    steps: int = 500
    batch_tokens: int = 2048
    learning_rate: float = 6e-3
    short_share: float = 0.75
    short_gap: int = 16
    slots_share: float = 0.4
    dense_until: float = 0.85
    warmup_share: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    eval_rows: int = 256

    def rate(self, step: int) -> float:
        """Learning rate: linear up, then a cosine to zero."""
        progress, warm = step / self.steps, self.warmup_share
        if progress < warm:
            return self.learning_rate * (step + 1) / (warm * self.steps)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (progress - warm) / (1.0 - warm)))

    def task_at(self, task: RecallTask, step: int) -> RecallTask:
        """The task of one step: the short one first."""
        if step >= self.short_share * self.steps or task.gap <= self.short_gap:
            return task
        least = RecallTask.least_tokens(task.name, task.pairs, self.short_gap, task.noise)
        return replace(task, gap=self.short_gap, tokens=least)


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
    torch.manual_seed(seed)
    model = BMojoForCausalLM(config)
    torch.nn.Module.to(model, device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=recipe.betas,
    )
    begun, begun_wall = time.process_time(), time.monotonic()
    model.train()
    slots, memory_layers = config.eidetic_tokens, config.memory_layers
    tail: list[torch.Tensor] = []
    for step in range(recipe.steps):
        now, dense = _enter_stage(model.config, step, recipe, task, slots, memory_layers)
        batch = now.batch(seed, step, max(1, recipe.batch_tokens // now.tokens))
        tokens, labels = torch.from_numpy(batch.tokens).to(device), torch.from_numpy(batch.labels).to(device)
        loss, task_loss = _loss(model, tokens, labels, dense)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.gradient_clip)
        optimizer.step()
        if step >= int(0.9 * recipe.steps):
            tail.append(task_loss.detach())
        if on_progress is not None:
            on_progress(step + 1, recipe.steps)
    model.config.eidetic_tokens, model.config.memory_layers = slots, memory_layers
    last = float(torch.stack(tail).mean())
    if not math.isfinite(last):
        raise ModelError(f"the loss is {last} at the end of {recipe.steps} steps; lower learning_rate.")
    seconds, wall = time.process_time() - begun, time.monotonic() - begun_wall
    short = ask(model, task, recipe.eval_rows)
    nan = float("nan")
    long = Asked(nan, nan)
    if long_tokens:
        long = ask(model, replace(task, tokens=long_tokens), max(1, recipe.eval_rows // 8))
    return RunResult(
        short.accuracy, short.block_hit, long.accuracy, long.block_hit, last, memory_bytes(config),
        sum(p.numel() for p in parameters), seconds, wall,
    )  # fmt: skip


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


def _enter_stage(
    config: BMojoConfig, step: int, recipe: Recipe, task: RecallTask, slots: int, memory_layers: list[int] | None
) -> tuple[RecallTask, bool]:
    """Set the memories of one step in the model's own config; its task, and whether far attention is dense."""
    now, progress, few = recipe.task_at(task, step), step / recipe.steps, 2 * task.pairs
    config.memory_layers, config.eidetic_tokens = memory_layers, slots
    if memory_layers and progress < recipe.slots_share:
        config.memory_layers, config.eidetic_tokens = [], few
    elif now.tokens < task.tokens:
        config.eidetic_tokens = min(slots, few)
    return now, bool(config.memory_layers) and progress < recipe.dense_until


def _loss(
    model: BMojoForCausalLM, tokens: torch.Tensor, labels: torch.Tensor, dense: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss with the auxiliary ones, and that of the questions alone. Only they go through the head."""
    hidden, parts = model.model(model.model.embed_tokens(tokens), None, (), dense)
    at = labels >= 0
    task_loss = F.cross_entropy(model.lm_head(hidden[at]).float(), labels[at])
    loss = task_loss
    for weight, name in ((model.config.innovation_loss_weight, "innovation"), (model.config.span_loss_weight, "span")):
        values = [v for part in parts if (v := getattr(part, name)) is not None]
        if values:
            loss = loss + weight * torch.stack(values).mean()
    return loss, task_loss
