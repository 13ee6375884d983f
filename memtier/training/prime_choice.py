"""Which layers of an attention model to convert: those that can do with a window, found by trying each alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from memtier.errors import ConfigError
from memtier.layers.plan import make_plan
from memtier.models.bmojo import BMojoForCausalLM
from memtier.training.text import TextIds, cut

__all__ = ["Choice", "choose_layers", "replacement_losses"]

SEQUENCES = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """Layers to convert, ascending, and what each costs alone: nats a token; () where layers were named.

    Args:
        whole: nats a token with every layer as it was; NaN where layers were named.
    """

    layers: tuple[int, ...]
    losses: tuple[float, ...] = ()
    whole: float = float("nan")


def choose_layers(
    plain: BMojoForCausalLM, text: TextIds, convert: str, *, window_tokens: int, tokens: int
) -> Choice:  # fmt: skip
    """The layers that `convert` means.

    Args:
        plain: the attention model, as of `memtier.models.primed.plain_copy`.
        convert: "0,2,3", or "best:N".
        window_tokens: of the window that replaces a layer.
        tokens: of the sequences that are tried.

    Raises:
        ConfigError: no such layers.
    """
    every = plain.config.num_hidden_layers
    best = convert.startswith("best:")
    try:
        numbers = [int(part) for part in convert.removeprefix("best:").split(",")]
    except ValueError as error:
        raise ConfigError(f"convert is {convert!r}; give layers such as 0,2,3, or best:N.") from error
    if best and (len(numbers) != 1 or not 1 <= numbers[0] <= every):
        raise ConfigError(f"convert is {convert!r}; N must be one number from 1 to {every}.")
    if not best:
        if len(set(numbers)) != len(numbers) or not all(0 <= n < every for n in numbers):
            raise ConfigError(f"convert is {convert!r}; the model has layers 0 to {every - 1}, each named once.")
        return Choice(tuple(sorted(numbers)))
    whole, losses = replacement_losses(plain, text, window_tokens=window_tokens, tokens=tokens)
    harmless = sorted(range(every), key=lambda layer: losses[layer])[: numbers[0]]
    return Choice(tuple(sorted(harmless)), tuple(losses), whole)


@torch.no_grad()
def replacement_losses(
    plain: BMojoForCausalLM, text: TextIds, *, window_tokens: int, tokens: int
) -> tuple[float, list[float]]:  # fmt: skip
    """Nats a token of training text: as it is, and with each layer alone attending to a window."""
    starts = np.linspace(0, len(text.train) - tokens - 1, SEQUENCES).astype(np.int64)
    device = next(plain.parameters()).device
    x, targets = (torch.from_numpy(part).to(device) for part in cut(text.train, starts, tokens, text.bos))
    sizes = plain.config.memory_settings()
    wide, narrow = (
        make_plan(replace(sizes, window_tokens=w), 0, tokens, (), -1, device) for w in (tokens, window_tokens)
    )

    def loss(replaced: int | None) -> float:
        h = plain.model.embed_tokens(x)
        for number, layer in enumerate(plain.model.layers):
            h, _, _ = layer(h, narrow if number == replaced else wide, None, None, False)
        logits = plain.lm_head(plain.model.norm(h)).float()
        return float(cross_entropy(logits.flatten(0, 1), targets.flatten()))

    return loss(None), [loss(layer) for layer in range(plain.config.num_hidden_layers)]
