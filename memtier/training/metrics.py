"""What one training step says about text, answers and copies, summed on the device until it is asked for.

B sequences     T tokens of a sequence     V vocabulary
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from memtier.training.tasks import ANSWER, COPY, TEXT

__all__ = ["LogRow", "Meter", "MeterReading", "keep_rows_until"]


@dataclass(frozen=True, slots=True)
class MeterReading:
    """Means since the last reading; NaN where there was nothing to measure.

    Args:
        text_bpb: bits per byte of book text.
        answer_loss: nats a digit of an answer; ln 10 = 2.303 is chance.
        answer_accuracy: share of digits that come right, each given the digits before it.
        near_accuracy, far_accuracy: the same where the code was last seen inside the window, or before it.
        level_accuracy: the same over sequences of the present level alone.
        copy_loss: nats a byte of a repeated segment, after its first bytes.
    """

    text_bpb: float
    answer_loss: float
    answer_accuracy: float
    near_accuracy: float
    far_accuracy: float
    level_accuracy: float
    copy_loss: float


@dataclass(frozen=True, slots=True)
class LogRow:
    """One row of log.csv; means are over the steps since the row before."""

    step: int
    seconds: float
    tokens: int
    tokens_per_second: float
    progress: float
    learning_rate: float
    level: int
    sequence_tokens: int
    far_attention: str
    loss: float
    gradient_norm: float
    skipped_steps: int
    text_bpb: float
    answer_loss: float
    answer_accuracy: float
    near_accuracy: float
    far_accuracy: float
    level_accuracy: float
    copy_loss: float


class Meter:
    """Sums over targets.

    Args:
        far_tokens: an answer whose code was seen further back than this is far.
    """

    def __init__(self, *, far_tokens: int, device: torch.device) -> None:
        self.far_tokens = far_tokens
        self._sums = torch.zeros(7, 2, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(
        self,
        logits_BTV: torch.Tensor,
        tokens_BT: torch.Tensor,
        kinds_BT: torch.Tensor,
        distance_BT: torch.Tensor,
        at_level_B: torch.Tensor,
    ) -> None:
        """Take one batch; `at_level_B` is True for sequences of the present level."""
        targets = tokens_BT[:, 1:]
        logits = logits_BTV[:, :-1].detach()
        loss = cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1), reduction="none")
        loss = loss.reshape(targets.shape).double()
        hit = (logits.argmax(-1) == targets).double()
        kinds, distance = kinds_BT[:, 1:], distance_BT[:, 1:]
        answer, far = kinds == ANSWER, distance > self.far_tokens
        measured = (
            (loss, kinds == TEXT),
            (loss, answer),
            (hit, answer),
            (hit, answer & ~far),
            (hit, answer & far),
            (hit, answer & at_level_B[:, None]),
            (loss, kinds == COPY),
        )
        self._sums += torch.stack(
            [torch.stack(((value * where).sum(), where.sum().double())) for value, where in measured]
        )

    def read(self) -> MeterReading:
        """Means since the last call."""
        means = [total / count if count else math.nan for total, count in self._sums.tolist()]
        self._sums.zero_()
        return MeterReading(means[0] / math.log(2), *means[1:])


def keep_rows_until(path: Path, step: int) -> None:
    """Drop rows after a step: what a resumed run will write again."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        head, *rows = list(csv.reader(file)) or [[]]
    kept = [row for row in rows if row and int(row[0]) <= step]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        csv.writer(file).writerows([head, *kept] if head else [])
    temporary.replace(path)
