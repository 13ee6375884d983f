"""Recall tasks, with what must be recalled outside the window.

    mqar            multi-query associative recall (Arora et al. 2024, "Zoology"): n pairs of key and value, later each
                    key once more; its value is asked for. Where a key comes again follows a power law.
    noisy_recall    noisy in-context recall (Poli et al. 2024, "MAD"): pairs of key and value among pairs of noise
                    tokens, which have a vocabulary of their own; a value is asked for where its key comes again.
    selective_copy  selective copying (Gu and Dao 2023; Poli et al. 2024): tokens strewn among blanks, to be given back
                    in their order after a copy token.

All three have the form ``[what to remember | gap | questions]``. The gap, which the definitions lack, holds fillers
only: without it most questions of these tasks lie inside the window of any model of the same memory. Fillers are zeros
or random tokens; random ones cannot be told from what matters by how surprising they are.

Every batch is a function of (seed, step). Letters: B sequences, T tokens, V vocabulary, n pairs or tokens to remember.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from memtier.errors import ConfigError

__all__ = ["TASKS", "Fillers", "RecallBatch", "RecallTask", "TaskName"]

TaskName = Literal["mqar", "noisy_recall", "selective_copy"]
Fillers = Literal["zero", "random"]

# Token 0 is the filler; the last is the copy token of selective copying, unused elsewhere.
FILLER = 0


@dataclass(frozen=True, slots=True, eq=False)
class RecallBatch:
    """Sequences and what is asked in them.

    Args:
        tokens: (B, T) int64.
        labels: (B, T) int64: what the output at this token must be, -1 where nothing is asked.
        source: (B, T) int64: position of the token that holds the answer, -1 where nothing is asked.
    """

    tokens: np.ndarray
    labels: np.ndarray
    source: np.ndarray


@dataclass(frozen=True, slots=True)
class RecallTask:
    """One task at one size.

    Args:
        pairs: n, pairs of key and value; tokens to copy.
        tokens: T of a sequence.
        gap: fillers between what to remember and the first question.
        vocabulary: V.
        power: exponent a of the law p(g) ~ a g^(a - 1) for where a key comes again (mqar).
        noise: share of noise among the pairs (noisy_recall).
    """

    name: TaskName = "mqar"
    pairs: int = 8
    tokens: int = 256
    gap: int = 0
    vocabulary: int = 256
    fillers: Fillers = "zero"
    power: float = 0.01
    noise: float = 0.2

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise ConfigError(f"task is {self.name!r}; use one of {', '.join(TASKS)}.")
        if self.fillers not in ("zero", "random"):
            raise ConfigError(f'fillers is {self.fillers!r}; it must be "zero" or "random".')
        if self.pairs < 1 or self.gap < 0:
            raise ConfigError(f"pairs is {self.pairs} and gap is {self.gap}; use at least 1 and 0.")
        least = self.least_tokens(self.name, self.pairs, self.gap, self.noise)
        if self.tokens < least:
            raise ConfigError(
                f"tokens is {self.tokens}; {self.pairs} pairs and a gap of {self.gap} need at least {least}."
            )
        if self.vocabulary < 4 * self.pairs + 8:
            raise ConfigError(
                f"vocabulary is {self.vocabulary}; {self.pairs} distinct keys and values need at least "
                f"{4 * self.pairs + 8}."
            )

    @staticmethod
    def least_tokens(name: str, pairs: int, gap: int, noise: float) -> int:
        """Tokens of the shortest sequence."""
        context = _context_tokens(name, pairs, noise)
        return context + gap + (pairs + 1 if name == "selective_copy" else context)

    @property
    def context_tokens(self) -> int:
        """Tokens before the gap."""
        return _context_tokens(self.name, self.pairs, self.noise)

    def batch(self, seed: int, step: int, rows: int, *, held_out: bool = False) -> RecallBatch:
        """`rows` sequences of one training step, or of the evaluation."""
        rng = np.random.default_rng([seed, step, int(held_out)])
        batch = TASKS[self.name](self, rng, rows)
        # the model must not learn to lean on what it was asked: fillers are drawn last, from a stream of their own
        blank = batch.tokens == FILLER
        if self.fillers == "random":
            noise = rng.integers(self._noise_from, self.vocabulary - 1, size=batch.tokens.shape)
            batch.tokens[blank] = noise[blank]
        return batch

    @property
    def _noise_from(self) -> int:
        """First token that a random filler may be: in MQAR any (as Zoology does), else those of the noise alone."""
        return 1 if self.name == "mqar" else self._parts[2]

    @property
    def _parts(self) -> tuple[int, int, int]:
        """Where keys, values and noise begin in the vocabulary; the last token is none of them."""
        if self.name == "mqar":
            return 1, self.vocabulary // 2, self.vocabulary - 1
        third = (self.vocabulary - 2) // 3
        return 1, 1 + third, 1 + 2 * third


def _context_tokens(name: str, pairs: int, noise: float) -> int:
    if name == "mqar":
        return 2 * pairs
    if name == "noisy_recall":
        return 2 * round(pairs / (1.0 - noise))
    return 4 * pairs


def _mqar(task: RecallTask, rng: np.random.Generator, rows: int) -> RecallBatch:
    first_key, first_value, end = task._parts
    keys = first_key + _distinct(rng, rows, first_value - first_key, task.pairs)
    values = first_value + _distinct(rng, rows, end - first_value, task.pairs)
    batch, line = _empty(task, rows), np.arange(rows)[:, None]
    place = 2 * np.arange(task.pairs)
    batch.tokens[line, place], batch.tokens[line, place + 1] = keys, values
    start = task.context_tokens + task.gap
    space = (task.tokens - start) // 2
    law = (task.power - 1.0) * np.log(np.arange(1, space + 1))
    # drawing without replacement by weight, one after the other, is taking the largest of weight plus Gumbel noise
    slots = np.argsort(-(law + rng.gumbel(size=(rows, space))), axis=1)[:, : task.pairs]
    asked = start + 2 * slots
    batch.tokens[line, asked], batch.labels[line, asked] = keys, values
    batch.source[line, asked] = place + 1
    return batch


def _noisy_recall(task: RecallTask, rng: np.random.Generator, rows: int) -> RecallBatch:
    first_key, first_value, first_noise = task._parts
    keys = first_key + _distinct(rng, rows, first_value - first_key, task.pairs)
    # values may repeat, as in MAD
    values = rng.integers(first_value, first_noise, size=(rows, task.pairs))
    batch, line = _empty(task, rows), np.arange(rows)[:, None]
    told = 2 * np.sort(_distinct(rng, rows, task.context_tokens // 2, task.pairs), axis=1)
    start = task.context_tokens + task.gap
    slots = task.context_tokens // 2
    order = rng.permuted(np.tile(np.arange(task.pairs), (rows, 1)), axis=1)
    asked = start + 2 * np.sort(_distinct(rng, rows, slots, task.pairs), axis=1)
    for begin, width in ((0, task.context_tokens), (start, 2 * slots)):
        batch.tokens[:, begin : begin + width] = rng.integers(first_noise, task.vocabulary - 1, size=(rows, width))
    batch.tokens[line, told], batch.tokens[line, told + 1] = keys, values
    batch.tokens[line, asked], batch.tokens[line, asked + 1] = keys[line, order], values[line, order]
    batch.labels[line, asked] = values[line, order]
    batch.source[line, asked] = told[line, order] + 1
    return batch


def _selective_copy(task: RecallTask, rng: np.random.Generator, rows: int) -> RecallBatch:
    first, _, first_noise = task._parts
    copied = rng.integers(first, first_noise, size=(rows, task.pairs))
    batch, line = _empty(task, rows), np.arange(rows)[:, None]
    told = np.sort(_distinct(rng, rows, task.context_tokens, task.pairs), axis=1)
    batch.tokens[line, told] = copied
    start = task.context_tokens + task.gap
    batch.tokens[:, start] = task.vocabulary - 1
    # asked from the copy token on: the k-th answer stands k tokens after it, and only blanks are read meanwhile
    asked = start + np.arange(task.pairs)
    batch.labels[line, asked], batch.source[line, asked] = copied, told
    return batch


TASKS: dict[str, Callable[[RecallTask, np.random.Generator, int], RecallBatch]] = {
    "mqar": _mqar,
    "noisy_recall": _noisy_recall,
    "selective_copy": _selective_copy,
}


def _empty(task: RecallTask, rows: int) -> RecallBatch:
    shape = (rows, task.tokens)
    return RecallBatch(np.full(shape, FILLER, np.int64), np.full(shape, -1, np.int64), np.full(shape, -1, np.int64))


def _distinct(rng: np.random.Generator, rows: int, among: int, count: int) -> np.ndarray:
    """(rows, count) distinct numbers below `among`, in random order."""
    if count > among:
        raise ConfigError(f"{count} distinct tokens were asked of a vocabulary part of {among}; enlarge vocabulary.")
    taken = np.argpartition(rng.random((rows, among)), min(count, among - 1), axis=1)[:, :count]
    return rng.permuted(taken, axis=1)
