"""The gradients of a lesson, of whole sequences or piece by piece, and how little of a forward pass is kept for them.

In pieces (truncated back-propagation through time, Williams and Peng 1990) memory passes from piece to piece, gradients
do not. So device memory is that of one piece, whatever the length of the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from memtier.cache import TieredCache
from memtier.errors import ConfigError
from memtier.models.bmojo import BMojoForCausalLM
from memtier.training.course import Lesson
from memtier.training.fit_settings import FitSettings
from memtier.training.objective import NO_TARGET, Losses, Objective, read_losses

__all__ = ["backward", "checkpointed", "enable_checkpointing"]


def backward(
    model: BMojoForCausalLM, lesson: Lesson, settings: FitSettings, objective: Objective | None = None
) -> Losses:  # fmt: skip
    """Add the gradients of one lesson to those of the model; its losses, detached.

    Args:
        objective: what is differentiated, besides the auxiliary losses; None for `read_losses`.

    Raises:
        ConfigError: dense far attention in pieces.
    """
    objective, device = objective or read_losses, next(model.parameters()).device
    tokens, targets = torch.from_numpy(lesson.tokens).to(device), torch.from_numpy(lesson.targets)
    length = tokens.shape[1]
    piece = settings.piece_tokens or length
    if piece >= length:
        return _read_and_differentiate(
            model, objective, tokens, targets, settings, 1.0, 1.0, memory=lesson.memory, dense=lesson.dense
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
            model, objective, tokens[:, part], targets[:, part], settings, target_share, token_share, cache=cache
        )  # fmt: skip
        cache.detach()
        done.append((target_share, token_share, losses))
    return _sum(done)


@contextmanager
def checkpointed(model: torch.nn.Module, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing (Chen et al. 2016) for as long as the block lasts; a model that has it on keeps it."""
    wanted = wanted and not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if wanted:
        enable_checkpointing(model)
    try:
        yield
    finally:
        if wanted:
            _of_transformers(model, "disable")()


def enable_checkpointing(model: torch.nn.Module) -> None:
    """Keep what passes between layers only, and compute the rest again in the backward pass.

    Raises:
        ConfigError: the model cannot.
    """
    _of_transformers(model, "enable")()


def _of_transformers(model: torch.nn.Module, verb: str) -> Any:
    # the name of transformers >= 5.20, and the one before it
    for name in (f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}"):
        if hasattr(model, name):
            return getattr(model, name)
    raise ConfigError(f"{type(model).__name__} cannot checkpoint gradients; set gradient_checkpointing to False.")


def _read_and_differentiate(
    model: BMojoForCausalLM, objective: Objective, tokens: torch.Tensor, targets: torch.Tensor, settings: FitSettings,
    target_share: float, token_share: float, **reading: Any,
) -> Losses:  # fmt: skip
    """The losses of one piece, detached: nothing of its graph outlives this call but what a cache carries."""
    with settings.autocast(tokens.device):
        losses = objective(model, tokens, targets, **reading)
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
