"""What a trained model can do: bits per byte of held-out text, and codes of names it never trained on.

Everything is teacher-forced: a digit counts as right if it is the most likely one given the true digits before it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from memtier.errors import ConfigError
from memtier.training.corpus import Corpus
from memtier.training.levels import LEVELS
from memtier.training.tasks import ANSWER, fact_sequence
from memtier.training.tokenizer import BOS_ID

__all__ = ["EvaluationReport", "evaluate"]


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Means over held-out text and held-out names.

    Args:
        bits_per_byte: of held-out text, in sequences of `sequence_tokens` that start afresh.
        near_digits, far_digits: share of right digits where the code was last seen within far_tokens, or before.
        near_codes, far_codes: share of codes with every digit right.
        near_count, far_count: codes asked for.
    """

    bits_per_byte: float
    near_digits: float
    near_codes: float
    near_count: int
    far_digits: float
    far_codes: float
    far_count: int
    sequence_tokens: int
    far_tokens: int


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    corpus: Corpus,
    *,
    seed: int = 0,
    sequence_tokens: int = 1024,
    text_sequences: int = 32,
    fact_sequences: int = 32,
    sequences_a_batch: int = 8,
    far_tokens: int = 256,
    autocast: bool = False,
) -> EvaluationReport:
    """Measure a model as it is used: far attention by retrieved span.

    Args:
        corpus: its held-out part is read.
        sequence_tokens: of each sequence; at least 160.
        far_tokens: an answer whose code was seen further back counts as far.

    Raises:
        ConfigError: sequences are too short, or the held-out text is shorter than one.
    """
    if sequence_tokens < 160 or len(corpus.held_out) < sequence_tokens:
        raise ConfigError(
            f"sequence_tokens is {sequence_tokens} and the held-out text has {len(corpus.held_out)} bytes;"
            " a sequence has at least 160 tokens and fits the held-out text."
        )
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    text = _held_out_text(corpus, sequence_tokens, text_sequences)
    nats = [_losses_and_hits(model, part, device, autocast)[0].mean() for part in _split(text, sequences_a_batch)]
    made = [
        fact_sequence(corpus, LEVELS[-1], sequence_tokens, random.Random(f"evaluate/{seed}/{i}"), split="held_out")
        for i in range(fact_sequences)
    ]
    tokens, kinds, distance = (np.stack(arrays) for arrays in zip(*made, strict=True))
    hits = np.concatenate(
        [_losses_and_hits(model, part, device, autocast)[1] for part in _split(tokens, sequences_a_batch)]
    )
    digits: dict[bool, list[float]] = {False: [], True: []}
    codes: dict[bool, list[float]] = {False: [], True: []}
    for row in range(fact_sequences):
        for start, end in _runs(kinds[row, 1:] == ANSWER):
            far = bool(distance[row, start + 1] > far_tokens)
            digits[far].extend(hits[row, start:end].tolist())
            codes[far].append(float(hits[row, start:end].all()))
    model.train(was_training)
    return EvaluationReport(
        bits_per_byte=float(np.mean(nats)) / math.log(2),
        near_digits=_mean(digits[False]),
        near_codes=_mean(codes[False]),
        near_count=len(codes[False]),
        far_digits=_mean(digits[True]),
        far_codes=_mean(codes[True]),
        far_count=len(codes[True]),
        sequence_tokens=sequence_tokens,
        far_tokens=far_tokens,
    )


def _held_out_text(corpus: Corpus, sequence_tokens: int, count: int) -> np.ndarray:
    """(count, T) evenly spaced pieces, BOS first; fewer where the text is short."""
    count = max(1, min(count, len(corpus.held_out) // sequence_tokens))
    starts = np.linspace(0, len(corpus.held_out) - sequence_tokens, count).astype(np.int64)
    tokens = np.full((count, sequence_tokens), BOS_ID, np.int64)
    tokens[:, 1:] = corpus.held_out[starts[:, None] + np.arange(sequence_tokens - 1)]
    return tokens


def _losses_and_hits(
    model: Any, tokens: np.ndarray, device: torch.device, autocast: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Nats and right-or-wrong of every target, each (B, T - 1)."""
    tokens_BT = torch.from_numpy(tokens).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids=tokens_BT).logits[:, :-1].float()
    targets = tokens_BT[:, 1:]
    loss = cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
    return loss.reshape(targets.shape).cpu().numpy(), (logits.argmax(-1) == targets).cpu().numpy()


def _split(rows: np.ndarray, size: int) -> list[np.ndarray]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _runs(where: np.ndarray) -> list[tuple[int, int]]:
    """[start, end) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], where.astype(np.int8), [0]))))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan
