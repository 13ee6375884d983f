"""Running text as token ids: a course of pieces of it, and how well a model predicts the part held out.

B sequences     T tokens of a sequence
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from memtier.blocks import MemorySettings
from memtier.cache import TieredCache
from memtier.errors import ConfigError
from memtier.models.bmojo import BMojoForCausalLM
from memtier.training.corpus import Corpus
from memtier.training.course import Lesson, SpanDraw
from memtier.training.tokenizer import BOS_ID, VOCAB_SIZE

__all__ = ["HeldOut", "TextCourse", "TextIds", "TextLessons", "cut", "held_out", "text_ids"]

# tokens of a step in which a long sequence is read at evaluation
STEP_TOKENS = 512


@dataclass(frozen=True, slots=True, eq=False)
class TextIds:
    """Tokens of a text.

    Args:
        train, held_out: (n,) integers.
        held_out_bytes: that the held-out tokens stand for.
        bos: the token before the first of a sequence; None for none.
    """

    train: np.ndarray
    held_out: np.ndarray
    held_out_bytes: int
    bos: int | None

    @property
    def digest(self) -> str:
        """A hash of all of it."""
        state = hashlib.blake2b(f"{self.bos}".encode(), digest_size=16)
        for ids in (self.train, self.held_out):
            state.update(np.ascontiguousarray(ids, np.int64).tobytes())
        return state.hexdigest()


def text_ids(corpus: Corpus, tokenizer: Any, vocabulary: int) -> TextIds:
    """A corpus as the tokens of a model.

    Args:
        tokenizer: of transformers; None for bytes.
        vocabulary: of the model.

    Raises:
        ConfigError: the tokenizer gives ids that the model does not have.
    """
    if tokenizer is None or (len(tokenizer) == VOCAB_SIZE and tokenizer.bos_token_id == BOS_ID):
        # nano's tokenizer: a byte is its own id
        text = TextIds(corpus.train, corpus.held_out, len(corpus.held_out), BOS_ID)
    else:
        train, tail = (
            np.array(tokenizer(part.tobytes().decode(errors="replace"), add_special_tokens=False, verbose=False)[
                "input_ids"
            ], np.int64)
            for part in (corpus.train, corpus.held_out)
        )  # fmt: skip
        text = TextIds(train, tail, len(corpus.held_out), tokenizer.bos_token_id)
    highest = max(int(text.train.max()), int(text.held_out.max()), text.bos or 0)
    if highest >= vocabulary:
        raise ConfigError(
            f"the tokenizer gives id {highest}, and the model's vocabulary has {vocabulary}. Give the model's own "
            f"tokenizer, or a larger vocab_size."
        )
    return text


@dataclass(frozen=True, slots=True)
class TextLessons:
    """How text becomes lessons.

    Args:
        sequence_tokens: T.
        batch_tokens: of a step, over all its sequences (at least one sequence).
        dense_until: part of the steps in which far attention sees every sealed token, which teaches the landmarks; only
            where sequences are read whole.
        span: sizes of the span, drawn anew for each step.
    """

    sequence_tokens: int = 1024
    batch_tokens: int = 8192
    dense_until: float = 0.0
    span: SpanDraw = field(default_factory=SpanDraw)

    def __post_init__(self) -> None:
        if self.sequence_tokens < 2 or not 0.0 <= self.dense_until <= 1.0:
            raise ConfigError(
                f"sequence_tokens is {self.sequence_tokens} and dense_until is {self.dense_until}; the first must be "
                f"at least 2, the second between 0 and 1."
            )


class TextCourse:
    """Pieces of a text from random places; see `memtier.training.course`.

    Args:
        memory: the sizes of the model, or those to adapt it to.
        steps: of the run, which `dense_until` is a part of.

    Raises:
        ConfigError: the text is shorter than a sequence.
    """

    def __init__(self, text: TextIds, lessons: TextLessons, memory: MemorySettings, *, steps: int, seed: int) -> None:
        if len(text.train) <= lessons.sequence_tokens:
            raise ConfigError(
                f"the text has {len(text.train)} tokens and sequence_tokens is {lessons.sequence_tokens}; give more "
                f"text or shorter sequences."
            )
        self._text, self._lessons, self._memory = text, lessons, memory
        self._dense_steps = math.ceil(lessons.dense_until * steps)
        self._seed = seed

    @property
    def identity(self) -> dict[str, Any]:
        """See `Course`."""
        return {
            "recipe": "text",
            "seed": self._seed,
            "text": self._text.digest,
            **asdict(self._lessons),
            **asdict(self._memory),
        }

    def lesson(self, step: int) -> Lesson:
        """See `Course`."""
        text, length = self._text, self._lessons.sequence_tokens
        rng = np.random.default_rng([self._seed, step])
        rows = max(1, self._lessons.batch_tokens // length)
        starts = rng.integers(0, len(text.train) - length, size=rows)
        tokens, targets = cut(text.train, starts, length, text.bos)
        memory = self._lessons.span.draw(self._memory, self._seed, step)
        dense = step < self._dense_steps and bool(memory.memory_layers)
        return Lesson(tokens, targets, memory, dense)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How well held-out text is predicted, read as a session reads it: in steps, with carried memory.

    Args:
        bits_per_byte: over sequences of `sequence_tokens` that start afresh.
        late_bits_per_byte: over the last quarter of each.
    """

    bits_per_byte: float
    late_bits_per_byte: float
    sequence_tokens: int
    sequences: int


@torch.no_grad()
def held_out(
    model: BMojoForCausalLM, text: TextIds, *, sequence_tokens: int, sequences: int = 8,
    memory: MemorySettings | None = None,
) -> HeldOut:  # fmt: skip
    """Measure a model on the held-out part of a text.

    Args:
        sequence_tokens: of each sequence; fewer where the text is shorter.
        sequences: at most so many, evenly spaced.
        memory: sizes to read under; None for the model's own.
    """
    device = next(model.parameters()).device
    length = min(sequence_tokens, len(text.held_out) - 1)
    rows = max(1, min(sequences, len(text.held_out) // length))
    starts = np.linspace(0, len(text.held_out) - length - 1, rows).astype(np.int64)
    tokens, targets = (torch.from_numpy(a).to(device) for a in cut(text.held_out, starts, length, text.bos))
    was_training = model.training
    model.eval()
    cache = TieredCache(model.config, settings=memory, batch_size=rows, device=device, dtype=model.dtype)
    nats = []
    for start in range(0, length, STEP_TOKENS):
        part = slice(start, start + STEP_TOKENS)
        logits = model(input_ids=tokens[:, part], past_key_values=cache).logits.float()
        nats.append(cross_entropy(logits.transpose(1, 2), targets[:, part], reduction="none").cpu())
    model.train(was_training)
    nats_BT = torch.cat(nats, dim=1).double()
    bits = len(text.held_out) / text.held_out_bytes / math.log(2)
    return HeldOut(float(nats_BT.mean()) * bits, float(nats_BT[:, -(length // 4) :].mean()) * bits, length, rows)


def cut(ids: np.ndarray, starts: np.ndarray, length: int, bos: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets (B, T) int64 of the pieces that begin at `starts`."""
    targets_from = 0 if bos is not None else 1
    place = starts[:, None] + np.arange(length) + targets_from
    targets = ids[place].astype(np.int64)
    if bos is None:
        return ids[place - 1].astype(np.int64), targets
    tokens = np.empty_like(targets)
    tokens[:, 0], tokens[:, 1:] = bos, targets[:, :-1]
    return tokens, targets
