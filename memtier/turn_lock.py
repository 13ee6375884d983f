"""Whose turn it is: a lock that refuses the call that would wait for itself.

A session's call may run the caller's own code, an iterator that it reads from. What that code asks of the same session
would wait for the call that waits for it. Each call runs in a task of its own, so the owner of a lock says nothing; the
context, which tasks inherit, does.
"""

from __future__ import annotations

import os
from contextvars import ContextVar
from types import TracebackType

import anyio

from memtier.errors import SessionError

__all__ = ["TurnLock"]

_turns: ContextVar[frozenset[object]] = ContextVar("memtier_turns", default=frozenset())
"""The turns that this context, or the one that it was copied from, is within; those that have ended do not count."""


class TurnLock:
    """First come, first served. Use it as ``async with``.

    Args:
        what: is asked, for the error.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._pid = os.getpid()
        self._lock = anyio.Lock()
        self._turn: object | None = None

    async def __aenter__(self) -> None:
        """Wait for the turn.

        Raises:
            SessionError: the caller runs within the turn that it would wait for, or in a forked child process.
        """
        if os.getpid() != self._pid:
            raise SessionError(
                f"{self._what} was opened by process {self._pid}, and this is process {os.getpid()}: threads and locks "
                f"do not survive a fork. Open the store in the child, or start it with 'spawn'."
            )
        if self._turn in _turns.get():
            raise SessionError(
                f"{self._what} was asked for something from within a call on it, by an iterator that this call reads "
                f"from, and neither could go on. Ask first, keep the answer in a list or a string, and give that."
            )
        await self._lock.acquire()
        self._turn = object()
        _turns.set(_turns.get() | {self._turn})

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _turns.set(_turns.get() - {self._turn})
        self._turn = None
        self._lock.release()
