"""Forgetting as a runtime does it: who holds the span, all of them put aside, and each brought up to date again."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import anyio
import numpy as np
from numpy.typing import NDArray

from memtier.blocks import MemoryHit
from memtier.errors import ConfigError, SessionError, StorageError, StorageFullError
from memtier.folder import SessionFolder
from memtier.parts import Shared
from memtier.recovery import erasure
from memtier.recovery.forget import Held, find_forks, forget_in, open_copy, parts_of
from memtier.recovery.reports import ForgetReport
from memtier.timeline import Timeline
from memtier.updater import Updater
from memtier_backends.layout import SessionPaths, session_folders

__all__ = ["Forgetter", "Wanted"]

QUOTED_TOKENS = 16
"""So many tokens of it in a row, somewhere else, are told as a quotation."""


class Forgettable(Protocol):
    """What is needed of a session."""

    timeline: Timeline

    @property
    def id(self) -> str: ...

    @property
    def folder(self) -> SessionFolder: ...

    @property
    def updater(self) -> Updater: ...

    def exclusive(self, line: None, *, catch_up: bool = True) -> AbstractAsyncContextManager[None]: ...

    def offline(self) -> AbstractAsyncContextManager[SessionFolder]: ...

    async def abandon(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a caller wants forgotten: one of the three."""

    hit: MemoryHit | None = None
    start: int | None = None
    end: int | None = None
    turn: int | None = None

    def __post_init__(self) -> None:
        given = [self.hit is not None, self.start is not None or self.end is not None, self.turn is not None]
        if sum(given) != 1 or (given[1] and (self.start is None or self.end is None)):
            raise ConfigError("say what to forget: a hit of recall, or start= and end=, or turn=; exactly one of them.")


class Forgetter:
    """One forget at a time in a runtime, so that two sessions never wait for each other.

    Args:
        shared: see `Shared`.
        sessions: the open ones.
    """

    def __init__(self, shared: Shared, sessions: Mapping[str, Any]) -> None:
        self._shared = shared
        self._sessions: Mapping[str, Forgettable] = sessions
        self._lock = anyio.Lock()

    async def forget(self, session: Forgettable, wanted: Wanted, *, forks: bool, verify: bool) -> ForgetReport:
        """See `Session.forget`."""
        began, run = time.perf_counter(), self._shared.journal.run
        async with self._lock, session.exclusive(None):
            start, end, keep_first = await self._span(session, wanted)
            ids = await session.timeline.tokens(start, end)
            held = await self._held(session, start, end)
            forgetting = held if forks else []
            proof = None
            evidence = await self._evidence(session, start, end) if verify else None
            folders = [session.folder.paths, *(SessionPaths(one.folder) for one in forgetting)]
            if evidence is not None:
                async with self._at_rest(session, forgetting):
                    await run(erasure.control, evidence, folders)
            names = await self._forget(session, forgetting, start, end, keep_first)
            await session.timeline.catch_up()
            restored_from = session.timeline.restored_from
            if evidence is not None:
                index = await session.updater.index()
                async with self._at_rest(session, forgetting):
                    await run(session.folder.journal.checkpoint)
                    texts = (await index.rows(0, 2**62))["text"].to_pylist()
                    proof = await run(erasure.prove, evidence, session.folder, folders, texts)
            rest = await session.timeline.tokens(0, session.timeline.position)
            quotations = await run(_quotations, ids, rest)
            return ForgetReport(
                start=start,
                end=end,
                tokens=end - start,
                position=session.timeline.position,
                restored_from=restored_from,
                replayed_tokens=session.timeline.position - restored_from,
                forks=tuple(one.session_id for one in forgetting),
                checkpoints=tuple(names),
                still_held_by=() if forks else tuple(one.session_id for one in held),
                also_at=tuple(quotations),
                proof=proof,
                seconds=time.perf_counter() - began,
            )

    async def _span(self, session: Forgettable, wanted: Wanted) -> tuple[int, int, bool]:
        history, codec = session.timeline.history, self._shared.weights.codec
        if wanted.turn is not None:
            turns = await history.turns(0, history.position)
            turn = next((turn for turn in turns if turn.turn == wanted.turn), None)
            if turn is None:
                raise SessionError(f"session {session.id!r} has no turn {wanted.turn}; history() lists those it has.")
            start, end = turn.start, turn.end
        elif wanted.hit is not None:
            start, end = wanted.hit.start, wanted.hit.end
            edition = await history.call(lambda: session.folder.edition)
            current = edition == wanted.hit.edition and 0 <= start < end <= history.position
            if not current or codec.decode(await history.tokens(start, end)) != wanted.hit.text:
                raise SessionError(
                    f"the hit is not of session {session.id!r} as it stands: positions have moved since, or it is of "
                    f"another session. Call recall again, and forget what that finds."
                )
        else:
            assert wanted.start is not None and wanted.end is not None
            start, end = wanted.start, wanted.end
        if not 0 <= start < end <= history.position:
            raise ConfigError(
                f"tokens [{start}, {end}) are to be forgotten; the session holds [0, {history.position}), and a span "
                f"holds at least one token."
            )
        first = (await history.tokens(0, 1)).tolist()
        # the token that begins a text stands for nothing that was said
        keep_first = first == [codec.bos_token_id]
        if keep_first and end == 1:
            raise ConfigError("token 0 begins the session and stands for nothing that was said: it stays.")
        return max(start, int(keep_first)), end, keep_first

    async def _held(self, session: Forgettable, start: int, end: int) -> list[Held]:
        def look() -> list[Held]:
            folder = session.folder
            siblings = session_folders(self._shared.store, self._shared.tenant)
            return find_forks(folder, siblings, parts_of(folder.journal, start, end))

        return await self._shared.journal.run(look)

    async def _evidence(self, session: Forgettable, start: int, end: int) -> erasure.Evidence:
        index = await session.updater.index()
        del index  # opened, so that rows which it lost are written again
        await session.updater.flush()
        decode, ids = self._shared.weights.codec.decode, await session.timeline.tokens(0, session.timeline.position)

        def collect() -> erasure.Evidence:
            rest = f"{decode(ids[:start])}\0{decode(ids[end:])}"
            return erasure.collect(session.folder, start, end, decode(ids[start:end]), rest)

        return await self._shared.journal.run(collect)

    @asynccontextmanager
    async def _at_rest(self, session: Forgettable, held: list[Held]) -> AsyncGenerator[None]:
        """Nothing is written or merged, so that no file comes or goes while all are read."""
        async with AsyncExitStack() as stack:
            for other in self._open(held):
                with suppress(SessionError):  # one that was closed meanwhile writes nothing
                    await stack.enter_async_context(other.exclusive(None, catch_up=False))
            for one in (session, *self._open(held)):
                await one.updater.rest()
            yield

    def _open(self, held: list[Held]) -> list[Forgettable]:
        return [other for one in held if (other := self._sessions.get(one.session_id)) is not None]

    async def _forget(
        self, session: Forgettable, held: list[Held], start: int, end: int, keep_first: bool
    ) -> list[str]:
        others = self._open(held)
        try:
            try:
                return await self._forget_offline(session, held, start, end, keep_first)
            except StorageFullError:
                # to forget takes room, too: what was set aside for it
                if not await self._shared.journal.run(self._shared.space.release):
                    raise
                return await self._forget_offline(session, held, start, end, keep_first)
            finally:
                await self._shared.journal.run(self._shared.space.fill)
        except StorageError as error:
            # the intent is journaled, and its positions hold until it is done: nothing may be written meanwhile
            for one in (session, *others):
                await one.abandon()
            raise type(error)(
                f"{error} What is to be forgotten is written down, and session {session.id!r} was closed: open it "
                f"again and that goes on where it was cut off."
            ) from error

    async def _forget_offline(
        self, session: Forgettable, held: list[Held], start: int, end: int, keep_first: bool
    ) -> list[str]:
        shared = self._shared
        async with AsyncExitStack() as stack:
            forks = []
            for one in held:
                other = self._sessions.get(one.session_id)
                if other is None:
                    fork = await shared.journal.run(open_copy, one.folder, shared.backends)
                    stack.push_async_callback(shared.journal.run, fork.close)
                else:
                    await stack.enter_async_context(other.exclusive(None, catch_up=False))
                    fork = await stack.enter_async_context(other.offline())
                forks.append(fork)
            folder = await stack.enter_async_context(session.offline())

            def forget() -> list[str]:
                told = [one.session_id for one in held]
                return forget_in(folder, forks, start, end, keep_first=keep_first, told=told)

            return await shared.journal.run(forget)


def _quotations(ids: NDArray[np.int32], rest: NDArray[np.int32]) -> list[tuple[int, int]]:
    """Ranges of `rest` that repeat at least QUOTED_TOKENS tokens of the span in a row."""
    size = QUOTED_TOKENS
    windows = {ids[at : at + size].tobytes() for at in range(ids.size - size + 1)}
    found: list[tuple[int, int]] = []
    if windows:
        data = rest.tobytes()
        for at in range(rest.size - size + 1):
            if data[4 * at : 4 * (at + size)] in windows:
                if found and at <= found[-1][1]:
                    found[-1] = found[-1][0], at + size
                else:
                    found.append((at, at + size))
    return found
