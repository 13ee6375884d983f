"""What a B'MOJO model is trained on: the loss of the tokens, and the auxiliary losses of its memories.

Letters: `memtier.blocks`; V is the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import cross_entropy

from memtier.blocks import MemorySettings
from memtier.cache import TieredCache
from memtier.layers.bmojo import MixerLosses
from memtier.models.bmojo import BMojoConfig, BMojoForCausalLM

__all__ = ["NO_TARGET", "Losses", "Objective", "read_losses", "with_auxiliary"]

NO_TARGET = -100
"""The target of a token after which nothing is asked."""


@dataclass(frozen=True, slots=True)
class Losses:
    """Scalars: mean nats a target, and the means of the auxiliary losses, None where no layer has one."""

    tokens: torch.Tensor
    innovation: torch.Tensor | None
    span: torch.Tensor | None

    def detach(self) -> Losses:
        """The same numbers, without how they came about."""
        return Losses(*(None if part is None else part.detach() for part in (self.tokens, self.innovation, self.span)))  # pyright: ignore[reportArgumentType]

    def total(self, config: BMojoConfig, *, target_share: float = 1.0, token_share: float = 1.0) -> torch.Tensor:
        """What is differentiated.

        Args:
            target_share, token_share: of a piece in its sequence, by targets and by tokens: then the sum over the
                pieces is the loss of the whole.
        """
        loss = self.tokens * target_share
        if self.innovation is not None:
            loss = loss + config.innovation_loss_weight * token_share * self.innovation
        if self.span is not None:
            loss = loss + config.span_loss_weight * token_share * self.span
        return loss


class Objective(Protocol):
    """What a run makes small; `read_losses` is the usual one, and its arguments are those of all."""

    def __call__(
        self, model: BMojoForCausalLM, tokens_BT: torch.Tensor, targets_BT: torch.Tensor, *,
        cache: TieredCache | None = None, memory: MemorySettings | None = None, dense: bool = False,
    ) -> Losses: ...  # fmt: skip


def read_losses(
    model: BMojoForCausalLM,
    tokens_BT: torch.Tensor,
    targets_BT: torch.Tensor,
    *,
    cache: TieredCache | None = None,
    memory: MemorySettings | None = None,
    dense: bool = False,
) -> Losses:
    """Read sequences, or with a cache their next piece. Only outputs that have a target go through the head.

    Args:
        tokens_BT: int64, on the model's device.
        targets_BT: int64, on the CPU: what must follow each token; `NO_TARGET` where nothing is asked.
        cache: carried memory, moved on by T tokens; None for whole sequences.
        memory: sizes to read whole sequences under; None for the model's own.
        dense: every sealed token is visible to far attention, and landmarks are taught (whole sequences only).
    """
    hidden, parts = model.model(model.model.embed_tokens(tokens_BT), cache, (), "dense" if dense else "span", memory)
    hidden, targets = hidden.flatten(0, 1), targets_BT.flatten()
    at = (targets != NO_TARGET).nonzero().squeeze(1)
    if len(at) < len(targets):
        hidden, targets = hidden[at.to(hidden.device)], targets[at]
    if len(at):
        logits = model.lm_head(hidden)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        loss = cross_entropy(wide, targets.to(hidden.device))
    else:
        loss = hidden.sum()  # of nothing: 0, and a part of the graph
    return with_auxiliary(loss, parts)


def with_auxiliary(loss: torch.Tensor, parts: list[MixerLosses]) -> Losses:
    """A main loss, and the means of the layers' auxiliary ones."""
    return Losses(
        loss,
        _mean([part.innovation for part in parts if part.innovation is not None]),
        _mean([part.span for part in parts if part.span is not None]),
    )


def _mean(values: list[torch.Tensor]) -> torch.Tensor | None:
    return torch.stack(values).mean() if values else None
