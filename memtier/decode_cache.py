"""Several sessions' caches as one batch, for a step of one token each.

The rows stand at positions of their own. None of them may have anything to choose or to seal (`chooses_next`), so a
step is a function of the carried tensors alone. These stay stacked from step to step while the same caches go on
together: each cache holds a row of them, and whatever else reads it copies that row out first (`TieredCache.states`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NoReturn

import torch

from memtier.cache import LayerState, TieredCache
from memtier.layers.plan import StepPlan, make_decode_plan
from memtier.layers.records import combine, flatten, map_tensors

__all__ = ["DecodeCache"]


class DecodeCache:
    """What the model takes as the cache of the batch. The caches themselves move on at `commit`, not before.

    Args:
        caches: of one model, under one settings; none of them with `chooses_next`.
    """

    def __init__(self, caches: Sequence[TieredCache]) -> None:
        assert not any(cache.chooses_next for cache in caches), "a row that chooses is read alone"
        self.caches = tuple(caches)
        self.settings = caches[0].settings
        self.states = _stacked(caches)
        self._after: list[LayerState] | None = None

    @property
    def position(self) -> int:
        """Where the foremost row stands."""
        return max(cache.position for cache in self.caches)

    def plan(self, tokens: int, marks: Collection[int], device: torch.device) -> StepPlan:
        """The plan of the next step."""
        assert tokens == 1 and not marks, "a batch of sessions reads one plain token each"
        return make_decode_plan(self.settings, [(cache.position, cache.boundary) for cache in self.caches], device)

    def advance(self, plan: StepPlan, states: list[LayerState]) -> None:
        """Note the states after the step."""
        self._after = states

    def commit(self) -> None:
        """The step is good: every cache moves on by its token."""
        assert self._after is not None, "there was a step"
        for row, cache in enumerate(self.caches):
            cache.read_in_row(self._after, row)

    def seal(self, *_: object, **__: object) -> NoReturn:
        """Never called: a row that seals is read alone."""
        raise AssertionError("a row that seals or chooses was read in a batch")

    select = fetch = resident = seal


def _stacked(caches: Sequence[TieredCache]) -> list[LayerState]:
    """The states of all, one batch; those that lie so already are taken as they are."""
    runs: list[tuple[list[LayerState], int, int]] = []
    for cache in caches:
        states, row = cache.held
        row = row or 0
        if runs and runs[-1][0] is states and runs[-1][2] == row:
            runs[-1] = states, runs[-1][1], row + 1
        else:
            runs.append((states, row, row + 1))
    if len(runs) == 1 and runs[0][1] == 0 and _rows(runs[0][0]) == runs[0][2]:
        return runs[0][0]
    parts = [[map_tensors(state, lambda t, a=a, b=b: t[a:b]) for state in states] for states, a, b in runs]
    return [combine(layer, torch.cat) for layer in zip(*parts, strict=True)]


def _rows(states: list[LayerState]) -> int:
    return next(tensor for _, tensor in flatten(states[0])).shape[0]
