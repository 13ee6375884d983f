"""A session while it is open: its lock, its parts, the answer that is being written; put aside, and closed."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from memtier.errors import SessionError
from memtier.folder import SessionFolder
from memtier.lines import Line
from memtier.parts import Parts, Shared
from memtier.recovery.copies import fork_to
from memtier.recovery.holders import INTENT
from memtier.tiers.landmarks import Held
from memtier.turn_lock import TurnLock

__all__ = ["OpenSession"]


class OpenSession:
    """What a session's calls, its lines, its runtime and a forget need of it.

    Args:
        session_id: the id it was opened by.
        shared: with the other sessions of its runtime.
        folder: on disk; its lock is held.
        parts: assembled and caught up.
        edition: of its positions; see `SessionFolder.edition`.
        on_close: told its id when it is closed.
    """

    def __init__(
        self, session_id: str, shared: Shared, folder: SessionFolder, parts: Parts, *, edition: str,
        on_close: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._id = session_id
        self._shared = shared
        self._config = shared.config
        self._weights = shared.weights
        self.folder = folder
        self._on_close = on_close
        self.lock = TurnLock(f"session {session_id!r}")
        self._line: Line | None = None
        self._closed = False
        self._pid = os.getpid()
        self.model_thread = shared.model
        self._edition = edition
        self._take(parts)

    def _take(self, parts: Parts) -> None:
        self._parts = parts
        self.timeline, self._storage = parts.timeline, parts.storage
        self.updater, self._views = parts.updater, parts.views

    async def close_within(self, *, write: bool) -> None:
        """`close`; without `write` what waits is left to the next open."""
        with anyio.CancelScope(shield=True):
            async with self.lock:
                if self._closed:
                    return
                self._closed = True
                try:
                    await self._end_line(None)
                    if write and not self.updater.error_was_told:
                        await self.timeline.snapshot()
                        await self.updater.rest()
                finally:
                    await self._free()

    @property
    def acknowledges_each_token(self) -> bool:
        """True if every sampled token is committed before the next."""
        return self._config.durability == "token"

    @asynccontextmanager
    async def exclusive(self, line: Line | None, *, catch_up: bool = True) -> AsyncGenerator[None]:
        """The lock, with other lines ended and old failures raised; level with the journal (`catch_up`).

        Raises:
            SessionError: the session is closed, or the caller runs within a call on it.
        """
        self._check_open()
        async with self.lock:
            self._check_open()
            # a line that another call has ended must not end that call's
            if line is None or not line.ended:
                await self._end_line(line)
                await self.updater.ready()
                if catch_up:
                    await self.timeline.catch_up()
            yield

    async def _end_line(self, line: Line | None) -> None:
        ended, self._line = self._line, line
        if ended is not None and ended is not line:
            with anyio.CancelScope(shield=True):
                await ended.end_within()

    async def _ready_to_look(self) -> None:
        self._check_open()
        if self.timeline.reader.cache is None:
            async with self.exclusive(None):
                pass

    async def fork_to(self, folder: Path, session_id: str) -> list[Held]:
        """Copy the session to the folder of a new one, and give the landmarks that the new one would read."""
        async with self.exclusive(None):
            await self._shared.journal.run(self._shared.space.check)
            await self._settle()
            await self._shared.journal.run(fork_to, self.folder, folder, session_id)
            return await self.model_thread.run(self._storage.landmarks_in_memory)

    @asynccontextmanager
    async def offline(self) -> AsyncGenerator[SessionFolder]:
        """The session's folder, used by nothing else; then new parts, not yet caught up. The lock is held.

        Where a forget is left unfinished the session is closed instead: its positions hold until that is done, so
        nothing may be written before the next open goes on with it.
        """
        with anyio.CancelScope(shield=True):
            await self._shared.take_apart(self._parts)
            try:
                yield self.folder
            finally:
                try:
                    unfinished = await self._shared.journal.run(self.folder.journal.get_meta, INTENT) is not None
                    if not unfinished:
                        self._edition = await self._shared.journal.run(lambda: self.folder.edition)
                        self._take(await self._shared.assemble(self._id, self.folder))
                except BaseException:
                    self._closed = True
                    await self._release()
                    raise
                if unfinished:
                    self._closed = True
                    await self._release()

    @property
    def closed(self) -> bool:
        """True once it can no longer be used."""
        return self._closed

    async def _settle(self) -> None:
        """All that was read is on disk, and a snapshot of this moment too."""
        await self.timeline.snapshot()
        await self.updater.flush()

    async def _free(self) -> None:
        try:
            await self._shared.take_apart(self._parts)
        finally:
            await self._release()

    async def _release(self) -> None:
        try:
            await self._shared.journal.run(self.folder.close)
        finally:
            await self.model_thread.run(self._weights.release)
            self._on_close(self._id)

    def _check_open(self) -> None:
        if self._closed:
            raise SessionError(f"session {self._id!r} is closed. Ask the runtime for it again.")
        if os.getpid() != self._pid:
            raise SessionError(
                f"session {self._id!r} was opened by process {self._pid}, and this is process {os.getpid()}: threads "
                f"and locks do not survive a fork. Open the store in the child, or start it with 'spawn'."
            )
