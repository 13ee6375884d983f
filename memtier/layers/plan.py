"""Where one step stands in the stream: its boundaries, groups, windows and the blocks it seals.

All layers of a step share one plan. It is a function of absolute positions and marks only, never of how the stream
was cut into calls. A group is the run of tokens served by one boundary; group g sees the window [lo_g, i].
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from memtier.blocks import MemorySettings

__all__ = ["StepPlan", "make_plan", "window_start"]


@dataclass(frozen=True)
class StepPlan:
    """The geometry of the tokens [start, start + tokens).

    Args:
        boundaries: (R,) int64 CPU: the boundary that serves each group; the first may lie before `start`.
        carried: True if the first group's choices were made in an earlier step.
        group: (T,) int64: the group of each token.
        lo: (R,) int64 CPU: the window's start for each group.
        lo_token: (T,) int64: the window's start for each token.
        visible: (R,) int64 CPU: blocks sealed at each boundary.
        sealed_from, sealed_to: numbers of the blocks that leave the window in this step.
    """

    settings: MemorySettings
    start: int
    tokens: int
    boundaries: torch.Tensor
    carried: bool
    group: torch.Tensor
    lo: torch.Tensor
    lo_token: torch.Tensor
    visible: torch.Tensor
    sealed_from: int
    sealed_to: int

    @property
    def new(self) -> slice:
        """The groups whose choices are made in this step."""
        return slice(1 if self.carried else 0, len(self.boundaries))


def window_start(settings: MemorySettings, boundary: int) -> int:
    """lo_g: the first position that the group of `boundary` sees in its (widened) window."""
    block = settings.span_block_tokens
    return block * (max(0, boundary - settings.window_tokens + 1) // block)


def make_plan(
    settings: MemorySettings, start: int, tokens: int, marks: Collection[int], boundary: int, device: torch.device
) -> StepPlan:
    """Plan a step.

    Args:
        marks: positions of retrieval marks; those outside the step are ignored.
        boundary: the last boundary before `start`; -1 at the start of a session.
    """
    stride = settings.span_refresh_tokens
    inside = set(range(start + -start % stride, start + tokens, stride))
    inside.update(p for p in marks if start <= p < start + tokens)
    carried = start not in inside
    boundaries = torch.tensor(([boundary] if carried else []) + sorted(inside), dtype=torch.int64)
    position = torch.arange(start, start + tokens, dtype=torch.int64)
    group = torch.searchsorted(boundaries, position, right=True) - 1
    if settings.widened:
        lo = torch.tensor([window_start(settings, b) for b in boundaries.tolist()], dtype=torch.int64)
        lo_token = lo[group]
    else:
        lo = (boundaries - settings.window_tokens + 1).clamp(min=0)
        lo_token = (position - settings.window_tokens + 1).clamp(min=0)
    block = settings.span_block_tokens
    sealed_from = window_start(settings, boundary) // block if boundary >= 0 else 0
    sealed_to = int(lo[-1]) // block if settings.widened else sealed_from
    return StepPlan(
        settings, start, tokens, boundaries, carried, group.to(device), lo, lo_token.to(device), lo // block,
        sealed_from, sealed_to,
    )  # fmt: skip
