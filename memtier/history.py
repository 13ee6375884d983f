"""A session's journal as the event loop sees it: one thread, no wait on a lock, failures that pass tried again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from memtier.threads import WorkerThread
from memtier.tiers.retry import retry
from memtier_backends.base import Journal
from memtier_backends.records import TurnRecord

__all__ = ["History"]

R = TypeVar("R")


class History:
    """Tokens and turns of one session.

    Args:
        journal: the session's journal.
        thread: the journal thread; every call to `journal` runs there.
        position: tokens it holds.
        check_room: raises StorageFullError where nothing new may be taken; runs on the journal thread.
    """

    def __init__(
        self, journal: Journal, thread: WorkerThread, position: int, check_room: Callable[[], None] = lambda: None
    ) -> None:
        self.check_room = check_room
        self.journal = journal
        self._thread = thread
        self.position = position

    async def call(self, function: Callable[..., R], *args: Any) -> R:
        """Run a function that uses the journal; storage errors that may pass are tried again.

        Sent again it must do no harm: everything that a failed journal call wrote was undone with its transaction.

        Raises:
            StorageError: the last try's error.
        """
        return await retry(lambda: self._thread.run(function, *args), "the journal")

    async def begin_turn(self, **turn: Any) -> int:
        """Begin a turn; see `Journal.begin_turn`. Returns its number."""
        return await self.call(lambda: self.journal.begin_turn(**turn))

    async def commit(
        self, turn: int, tokens: NDArray[np.int32] | Sequence[int], *, text: str | None = None, mark: bool = False,
        has_room: bool = False,
    ) -> None:  # fmt: skip
        """Append tokens: on return they are acknowledged.

        Args:
            turn, tokens, text, mark: see `Journal.commit`.
            has_room: the caller asked for room before (`ask_for_room`), or ends what it was given room for.

        Raises:
            StorageFullError: nothing new may be taken, or nothing can be written.
        """
        before, after = self.position, self.position + len(tokens)

        def once() -> int:
            # a commit whose answer was lost must not be sent twice
            if self.journal.position == after != before:
                return after
            if not has_room:
                self.check_room()
            return self.journal.commit(turn, tokens, text=text, mark=mark)

        self.position = await self.call(once)

    async def ask_for_room(self) -> None:
        """Raises StorageFullError where nothing new may be taken."""
        await self.call(self.check_room)

    async def rollback(self, position: int, reason: str) -> None:
        """Take back the tokens >= position."""
        await self.call(self.journal.rollback, position, reason)
        self.position = position

    async def tokens(self, start: int, end: int) -> NDArray[np.int32]:
        """Token ids [start, end)."""
        return await self.call(self.journal.tokens, start, end)

    async def turns(self, start: int, end: int) -> list[TurnRecord]:
        """Turns that hold a token of [start, end)."""
        return await self.call(self.journal.turns, start, end)

    async def marks(self, start: int, end: int) -> list[int]:
        """Retrieval marks in [start, end)."""
        return await self.call(self.journal.marks, start, end)
