"""Which of the tokens that leave the window stay as eidetic memory: the rules, and the controls they are held to.

A rule gives each token a score, and the M highest stay. A score is a function of the token alone (`recent`, `oldest`
and `threshold` order by age), so choosing among the survivors and the newcomers is choosing among all, and any split of
the stream keeps the same tokens. Without a gradient.

    innovation  the tokens that the fading memory predicted worst: ``||h - xh||^2 / ||h||^2``
    cosine      the same by the angle alone: ``1 - cos(h, xh)``
    threshold   the newest of those whose innovation reaches `eidetic_threshold`
    random      by a hash of layer, position and row of the batch       controls: does the choice matter?
    recent      the newest: a longer window
    oldest      the first: attention sinks; where all that is asked for comes first, the oracle
    lowest      the tokens that were predicted best

Shape letters: `memtier.blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from memtier_kernels import innovation

__all__ = ["EIDETIC_RULES", "EideticRule", "RuleByName", "prediction_error"]

EideticRule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(innovation (B, n), positions (B, n) ascending by age, -1 for none) -> scores (B, n); -inf: must not be kept."""

EIDETIC_RULES = ("innovation", "cosine", "threshold", "random", "recent", "oldest", "lowest")


@dataclass(frozen=True)
class RuleByName:
    """The rule of that name, for one layer; `threshold` is the least innovation that rule "threshold" keeps."""

    name: str
    layer: int
    threshold: float

    def __call__(self, innovation: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self.name in ("innovation", "cosine"):
            return innovation
        if self.name == "lowest":
            return -innovation
        if self.name == "random":
            return _hash(positions, self.layer)
        age = torch.arange(innovation.shape[1], device=innovation.device, dtype=torch.float32).expand(innovation.shape)
        if self.name in ("recent", "oldest"):
            return age if self.name == "recent" else -age
        return age.masked_fill(innovation < self.threshold, float("-inf"))


def prediction_error(h: torch.Tensor, predicted: torch.Tensor, rule: str) -> torch.Tensor:
    """How badly each token (B, T, E) was predicted, as the rule measures it: (B, T), float32 or float64."""
    if rule != "cosine":
        return innovation(h, predicted)
    full = torch.float64 if h.dtype == torch.float64 else torch.float32
    return 1.0 - torch.nn.functional.cosine_similarity(h.to(full), predicted.to(full), dim=-1, eps=1e-6)


def _hash(positions: torch.Tensor, layer: int) -> torch.Tensor:
    """Numbers below 2^24, each a function of layer, position and row (a 32-bit mixer of xor-shifts and products).

    The row is in it so that a batch of sequences of one layout is not always robbed of the same places.
    """
    rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
    x = (positions + 0x9E3779B9 * (1 + layer) + 0x85EBCA6B * rows) & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return ((x ^ (x >> 16)) & 0xFFFFFF).to(torch.float32)
