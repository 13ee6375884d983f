"""Aligning a converted model with its source: their final hidden states on the same text."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from transformers import PreTrainedModel

from memtier.blocks import MemorySettings
from memtier.cache import TieredCache
from memtier.models.bmojo import BMojoForCausalLM
from memtier.training.course import Course, Lesson
from memtier.training.objective import Losses, with_auxiliary

__all__ = ["Alignment", "AlignmentCourse"]


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """The objective: squared error of the final hidden state over its square, the mean over tokens.

    Args:
        source: what is to be matched; it reads whole sequences, no longer than its context.
    """

    source: PreTrainedModel

    def __call__(
        self, model: BMojoForCausalLM, tokens_BT: torch.Tensor, targets_BT: torch.Tensor, *,
        cache: TieredCache | None = None, memory: MemorySettings | None = None, dense: bool = False,
    ) -> Losses:  # fmt: skip
        """See `memtier.training.objective.read_losses`; targets are not looked at."""
        assert cache is None, "alignment reads whole sequences"
        with torch.no_grad():
            wanted = self.source.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state.float()
        hidden, parts = model.model(model.model.embed_tokens(tokens_BT), None, (), dense, memory)
        error = (hidden.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-9)
        return with_auxiliary(error.mean(), parts)


@dataclass(frozen=True, slots=True, eq=False)
class AlignmentCourse:
    """A course of text, read to be aligned with a source; see `memtier.training.course`."""

    course: Course
    source: PreTrainedModel

    @property
    def identity(self) -> dict[str, Any]:
        """See `Course`; what was aligned with another source is not gone on with."""
        state = blake2b(digest_size=16)
        for parameter in self.source.parameters():
            flat = parameter.detach().flatten()
            state.update(flat[:: max(1, flat.numel() // 8)].to("cpu", torch.float64).numpy().tobytes())
        return {**self.course.identity, "recipe": "alignment", "source": state.hexdigest()}

    def lesson(self, step: int) -> Lesson:
        """See `Course`."""
        return self.course.lesson(step)
