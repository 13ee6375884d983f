"""The sessions that a runtime has open, by id: each is opened once, whoever asks, and shares what all share."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

import anyio

from memtier.errors import MemtierError, SessionError
from memtier.forgetting import Forgetter
from memtier.listing import remove_session_of, remove_tenant
from memtier.models.adapters import Adapter
from memtier.parts import Shared
from memtier.recovery.portable import import_session
from memtier.recovery.reread import reread as give_to
from memtier.replay import Progress
from memtier.session import Session
from memtier.text import check_text
from memtier.threads import shielded
from memtier.tiers.landmarks import Held
from memtier_backends.layout import session_folder, session_folders

__all__ = ["OpenSessions"]

log = logging.getLogger("memtier")


class OpenSessions:
    """What each of these calls promises is told by `Runtime`, whose they are.

    Args:
        shared: of the runtime.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._sessions: dict[str, Session] = {}
        self._coming = 0
        # a lock stays while somebody holds it or waits for it
        self._opening: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()
        self._forgetter = Forgetter(shared, self._sessions)

    def all(self) -> list[Session]:
        """In the order they were opened."""
        return list(self._sessions.values())

    async def open(
        self, session_id: str, adapter: str | Path | None, reread: bool, on_progress: Progress | None
    ) -> Session:
        """See `Runtime.session`."""
        folder = self._folder(session_id)
        async with self._one_at_a_time(session_id):
            session = self._sessions.get(session_id)
            if session is not None and session.closed:
                await session.close_within(write=False)  # until whoever is closing it has done so
                session = None
            if session is None:
                async with self._place(adapter) as shared:
                    if reread:
                        await shared.journal.run(
                            give_to, folder, session_folders(shared.store, shared.tenant), shared.backends,
                            self._identity(session_id), shared.weights, shared.settings,
                        )  # fmt: skip
                    session = await self._opened(session_id, folder, shared, on_progress=on_progress)
                    self._sessions[session_id] = session
            elif adapter is not None:
                weights = session.timeline.reader.weights
                await self._shared.model.run(weights.check_adapter, adapter, session_id)
        return session

    async def take_in(
        self, path: Path, session_id: str, adapter: str | Path | None, on_progress: Progress | None
    ) -> Session:
        """See `Runtime.import_session`."""
        folder = self._folder(session_id)
        async with self._one_at_a_time(session_id):
            if session_id in self._sessions:
                raise SessionError(f"session {session_id!r} is open. Give another id, or delete that session first.")
            async with self._place(adapter) as shared:
                await shared.journal.run(shared.space.check)
                identity = self._identity(session_id)
                await shared.journal.run(import_session, path, folder, identity, shared.weights, shared.settings)
                try:
                    session = await self._opened(session_id, folder, shared, on_progress=on_progress)
                except Exception:
                    # whole, and yet not to be used: nothing is kept of it
                    await shielded(shared.journal.run(remove_session_of, shared.store, shared.tenant, session_id))
                    raise
                self._sessions[session_id] = session
        return session

    async def delete(self, session_id: str) -> list[str]:
        """See `Runtime.delete_session`."""
        shared = self._shared
        async with self._one_at_a_time(session_id):
            session = self._sessions.get(session_id)
            if session is not None:
                await session.close_within(write=False)
            return await shielded(shared.journal.run(remove_session_of, shared.store, shared.tenant, session_id))

    async def delete_all(self) -> list[str]:
        """See `Runtime.delete_tenant`."""
        for session in self.all():
            await session.close_within(write=False)
        return await shielded(self._shared.journal.run(remove_tenant, self._shared.store, self._shared.tenant))

    async def close_all(self, *, write: bool) -> list[MemtierError]:
        """Close every session, whatever happens to others; what failed. `write`: see `OpenSession.close_within`."""
        failures: list[MemtierError] = []
        for session in self.all():
            try:
                await session.close_within(write=write)
            except MemtierError as failure:
                log.error("session %r was closed with an error: %s", session.id, failure)
                failures.append(failure)
        return failures

    # -- private

    @asynccontextmanager
    async def _place(self, adapter: str | Path | Adapter | None) -> AsyncGenerator[Shared]:
        """A place among the open sessions for one that is opened inside, and what it shares, with the model under its
        adapter, which the session gives back.
        """
        taken, limit = len(self._sessions) + self._coming, self._shared.config.max_open_sessions
        if taken >= limit:
            raise SessionError(
                f"{taken} sessions are open, and max_open_sessions is {limit}. Close one with session.close(), or "
                f"raise that limit."
            )
        self._coming += 1
        try:
            async with self._under(adapter) as shared:
                yield shared
        finally:
            self._coming -= 1

    @asynccontextmanager
    async def _under(self, adapter: str | Path | Adapter | None) -> AsyncGenerator[Shared]:
        if adapter is None:
            yield self._shared
            return
        model = self._shared.model
        weights = await model.run(self._shared.weights.attach, adapter)
        try:
            yield replace(self._shared, weights=weights)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await model.run(weights.release)
            raise

    async def _opened(
        self, session_id: str, folder: Path, shared: Shared, landmarks: list[Held] | None = None, *,
        on_progress: Progress | None = None,
    ) -> Session:  # fmt: skip
        opened = await shared.open_folder(session_id, folder)
        try:
            parts = await shared.assemble(session_id, opened, landmarks)
            try:
                await parts.timeline.catch_up(on_progress)
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await shared.take_apart(parts)
                raise
            edition = await shared.journal.run(lambda: opened.edition)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await shared.journal.run(opened.close)
            raise
        return Session(
            session_id, shared, opened, parts, edition=edition, fork=self._fork, forgetter=self._forgetter,
            on_close=self._closed,
        )  # fmt: skip

    async def _fork(self, source: Session, session_id: str) -> Session:
        folder = self._folder(session_id)
        adapter = source.timeline.reader.weights.adapter
        async with self._one_at_a_time(session_id), self._place(adapter) as shared:
            landmarks = await source.fork_to(folder, session_id)
            session = self._sessions[session_id] = await self._opened(session_id, folder, shared, landmarks)
        return session

    def _folder(self, session_id: str) -> Path:
        folder = session_folder(self._shared.store, self._shared.tenant, session_id)
        check_text(session_id, "the session id")
        return folder

    def _identity(self, session_id: str) -> dict[str, str]:
        return {"id": session_id, "tenant": self._shared.tenant}

    def _one_at_a_time(self, session_id: str) -> anyio.Lock:
        return self._opening.setdefault(session_id, anyio.Lock())

    def _closed(self, session_id: str) -> None:
        self._sessions.pop(session_id, None)
