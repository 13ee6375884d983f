"""Where one step stands in the stream: its boundaries, groups, windows and the blocks it seals.

All layers of a step share one plan. It is a function of absolute positions and marks only, never of how the stream
was cut into calls. A group is the run of tokens served by one boundary; group g sees the window [lo_g, i].
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from memtier.blocks import MemorySettings

__all__ = ["StepPlan", "make_decode_plan", "make_plan", "next_boundary", "window_start"]


@dataclass(frozen=True)
class StepPlan:
    """The geometry of the tokens [start, start + tokens): numbers on the host, and the same as tensors on the device.

    Args:
        boundaries: the boundary that serves each of the R groups; the first may lie before `start`.
        carried: True if the first group's choices were made in an earlier step.
        lo: the window's start for each group, by its boundary.
        visible: blocks sealed at each boundary.
        sealed_from, sealed_to: numbers of the blocks that leave the window in this step.
        group: (T,) int64: the group of each token.
        origin: `start`, as a number or, where each row of the batch stands at its own place, (B, 1) int64.
        lo_token: (T,) or (B, T) int64: the window's start for each token.
        boundary_row, visible_row: (R,) int64: `boundaries` and `visible`.
        lo_row: (R,) or (B, R) int64: `lo`.

    Where rows stand at places of their own, the numbers on the host are those of the row that stands first; none of
    them matters, since such a step has no boundary and seals nothing.
    """

    settings: MemorySettings
    start: int
    tokens: int
    boundaries: tuple[int, ...]
    carried: bool
    lo: tuple[int, ...]
    visible: tuple[int, ...]
    sealed_from: int
    sealed_to: int
    group: torch.Tensor
    origin: int | torch.Tensor
    lo_token: torch.Tensor
    boundary_row: torch.Tensor
    lo_row: torch.Tensor
    visible_row: torch.Tensor

    @property
    def new(self) -> slice:
        """The groups whose choices are made in this step."""
        return slice(1 if self.carried else 0, len(self.boundaries))


def window_start(settings: MemorySettings, boundary: int) -> int:
    """lo_g: the first position that the group of `boundary` sees in its (widened) window."""
    block = settings.span_block_tokens
    return block * (max(0, boundary - settings.window_tokens + 1) // block)


def next_boundary(settings: MemorySettings, boundary: int) -> int:
    """The boundary that follows one, if no mark comes before it."""
    return 0 if boundary < 0 else boundary + settings.span_refresh_tokens


def make_plan(
    settings: MemorySettings, start: int, tokens: int, marks: Collection[int], boundary: int, device: torch.device
) -> StepPlan:
    """Plan a step.

    Args:
        marks: positions of retrieval marks; those outside the step are ignored.
        boundary: the last boundary before `start`; -1 at the start of a session.
    """
    inside, end = [], start + tokens
    following = next_boundary(settings, boundary)
    for mark in [*sorted(p for p in set(marks) if start <= p < end), end]:
        # what was chosen at a mark serves r tokens like any other choice: the boundaries that follow count from it
        inside += range(following, mark, settings.span_refresh_tokens)
        inside += [mark] if mark < end else []
        following = mark + settings.span_refresh_tokens
    carried = not inside or inside[0] != start
    boundaries = ([boundary] if carried else []) + inside
    block = settings.span_block_tokens
    if settings.widened:
        lo = [window_start(settings, b) for b in boundaries]
        visible = [start_g // block for start_g in lo]
    else:
        lo = [max(0, b - settings.window_tokens + 1) for b in boundaries]
        visible = [0] * len(lo)
    rows = torch.tensor([boundaries, lo, visible], dtype=torch.int64).to(device)
    position = torch.arange(start, start + tokens, device=device)
    group = torch.searchsorted(rows[0], position, right=True) - 1
    lo_token = rows[1][group] if settings.widened else (position - settings.window_tokens + 1).clamp(min=0)
    sealed_from = window_start(settings, boundary) // block if boundary >= 0 else 0
    sealed_to = lo[-1] // block if settings.widened else sealed_from
    return StepPlan(
        settings, start, tokens, tuple(boundaries), carried, tuple(lo), tuple(visible), sealed_from, sealed_to,
        group, start, lo_token, rows[0], rows[1], rows[2],
    )  # fmt: skip


def make_decode_plan(settings: MemorySettings, places: Sequence[tuple[int, int]], device: torch.device) -> StepPlan:
    """Plan a step of one token for each of several sequences, none of which has a boundary at it.

    Args:
        places: position and last boundary of each sequence.
    """
    lo = [window_start(settings, boundary) for _, boundary in places]
    if settings.widened:
        lo_token = lo
    else:
        lo = [max(0, boundary - settings.window_tokens + 1) for _, boundary in places]
        lo_token = [max(0, start - settings.window_tokens + 1) for start, _ in places]
    start, boundary = min(places)
    first = window_start(settings, boundary)
    visible = first // settings.span_block_tokens if settings.widened else 0
    rows = torch.tensor([[start for start, _ in places], lo_token, lo], dtype=torch.int64).to(device)[..., None]
    numbers = torch.tensor([[0], [boundary], [visible]], dtype=torch.int64).to(device)
    return StepPlan(
        settings, start, 1, (boundary,), True, (first,), (visible,), visible, visible,
        numbers[0], rows[0], rows[1], numbers[1], rows[2], numbers[2],
    )  # fmt: skip
