"""What a journal holds, read again: each turn in the manner in which it was first read, and step by step."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from functools import partial

from memtier.blocks import RetrievalMode
from memtier.history import History
from memtier.reader import STEP_TOKENS, Manner, Reader, StepResult
from memtier.threads import WorkerThread, shielded
from memtier.updater import Updater
from memtier_backends.records import TurnRecord

__all__ = ["Progress", "Replay"]

log = logging.getLogger("memtier")

Progress = Callable[[int, int | None], None]
"""Told of tokens done, and of how many there are; None if that is not known."""

REPLAY_TOKENS = 32 * STEP_TOKENS  # read back from the journal at a time
TOLD_TOKENS = 4096  # from so many on it takes long enough for a line in the log


class Replay:
    """Lets readers read the journal of one session.

    Args:
        name: the session's id, for messages.
        history: its journal.
        updater: no step is begun while too many blocks wait there.
        model: the model thread.
        snapshot_every_tokens: no step goes over a multiple of it.
    """

    def __init__(
        self, name: str, history: History, updater: Updater, model: WorkerThread, snapshot_every_tokens: int
    ) -> None:
        self._name = name
        self._history = history
        self._updater = updater
        self._model = model
        self._snapshot_every = snapshot_every_tokens

    async def read(
        self, reader: Reader, after: Callable[[StepResult], Awaitable[None]] | None = None,
        on_progress: Progress | None = None, *, until: int | None = None,
    ) -> None:  # fmt: skip
        """Let `reader` read from its position on, to the journal's end or `until`.

        Args:
            reader: the session's own, or one aside.
            after: told of each step.
            on_progress: told after each step how many tokens were read again, and of how many.

        Raises:
            ModelError: the model refuses a step.
            StorageError: memory cannot be read or written.
        """
        began = reader.position
        goal = self._history.position if until is None else until
        if goal - began > TOLD_TOKENS:
            log.info("session %r: reading %d tokens again, from token %d on", self._name, goal - began, began)
        while reader.position < goal:
            start = reader.position
            end = min(goal, start + REPLAY_TOKENS)
            tokens = await self._history.tokens(start, end)
            marks = await self._history.marks(start, end)
            turns = await self._history.turns(start, end)
            for first, last, manner in _steps(turns, start, end, self._snapshot_every):
                await self._updater.ready()
                here = [mark for mark in marks if first <= mark < last]
                step = partial(reader.step, tokens[first - start : last - start], manner, marks=here)
                await shielded(self._step(step, after))
                if on_progress is not None:
                    on_progress(last - began, goal - began)

    async def _step(
        self, step: Callable[[], StepResult], after: Callable[[StepResult], Awaitable[None]] | None
    ) -> None:
        result = await self._model.run(step)
        if after is not None:
            await after(result)


def _steps(turns: list[TurnRecord], start: int, end: int, snapshot_every: int) -> Iterator[tuple[int, int, Manner]]:
    """Steps [first, last) that cover [start, end), none across two turns or over a snapshot's position."""
    for turn in turns:
        # the journal keeps what a turn was begun with, which was checked then
        retrieval: RetrievalMode = turn.retrieval  # pyright: ignore[reportAssignmentType]
        manner = Manner(retrieval, turn.span_blocks, turn.retained_from)
        first = max(turn.start, start)
        while first < min(turn.end, end):
            last = min(first + STEP_TOKENS, turn.end, end, (first // snapshot_every + 1) * snapshot_every)
            yield first, last, manner
            first = last
