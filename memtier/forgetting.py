"""Forgetting as a runtime does it: who holds the span, all of them put aside, and each brought up to date again."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import anyio

from memtier.arguments import whole_number
from memtier.blocks import MemoryHit
from memtier.errors import ConfigError, MemtierError, SessionError, SessionNotFoundError, StorageError, StorageFullError
from memtier.folder import SessionFolder
from memtier.parts import Shared
from memtier.recovery import erasure
from memtier.recovery.evidence import Evidence, collect
from memtier.recovery.forget import begin, go_on, open_copy
from memtier.recovery.holders import Held, Holders, Said, holders_of, said_in
from memtier.recovery.quotations import quotations
from memtier.recovery.reports import ErasureProof, ForgetReport
from memtier.replay import Progress
from memtier.threads import WorkerThread
from memtier.timeline import Timeline
from memtier.updater import Updater
from memtier_backends.layout import session_folders

__all__ = ["Forgetter", "Wanted"]


class Forgettable(Protocol):
    """What is needed of a session."""

    timeline: Timeline

    @property
    def id(self) -> str: ...

    @property
    def folder(self) -> SessionFolder: ...

    @property
    def updater(self) -> Updater: ...

    @property
    def closed(self) -> bool: ...

    def exclusive(self, line: None, *, catch_up: bool = True) -> AbstractAsyncContextManager[None]: ...

    def offline(self) -> AbstractAsyncContextManager[SessionFolder]: ...


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
        for name in (field.name for field in fields(self) if field.name != "hit"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else whole_number(name, value))


@dataclass(frozen=True, slots=True)
class Span:
    """The tokens [start, end). `keep_first`: position 0 holds a token that is no text, and stays."""

    start: int
    end: int
    keep_first: bool


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

    async def forget(
        self, session: Forgettable, wanted: Wanted, *, forks: bool, verify: bool, on_progress: Progress | None = None
    ) -> ForgetReport:
        """See `Session.forget`."""
        began, decode = time.perf_counter(), self._shared.weights.codec.decode
        async with self._lock, session.exclusive(None):
            span = await self._span(session, wanted)
            ids = await session.timeline.tokens(span.start, span.end)
            text = decode(ids)
            said = await self._shared.journal.run(said_in, session.folder.journal, [(span.start, span.end)])
            with _thread_for_files() as files:
                held, evidence = await self._forgotten(session, span, said, text, forks, verify, files)
                with _told_as_done():
                    await session.timeline.catch_up(on_progress)
                restored_from = session.timeline.restored_from
                rest = await session.timeline.tokens(0, session.timeline.position)
                known = None if self._shared.weights.codec.tokenizer is None else decode
                also_at = await files.run(quotations, ids, rest, known)
                gone = held.forks if forks else []
                proof = None
                if evidence is not None:
                    proof = await self._proof(session, evidence, gone, held.unreadable, files)
                put_aside = await files.run(_put_aside, self._folders(session, gone))
            names = [*held.checkpoints, *(name for one in gone for name in one.checkpoints)]
            ids_of_forks = tuple(one.session_id for one in held.forks)
            return ForgetReport(
                start=span.start,
                end=span.end,
                tokens=span.end - span.start,
                position=session.timeline.position,
                restored_from=restored_from,
                replayed_tokens=session.timeline.position - restored_from,
                forks=ids_of_forks if forks else (),
                checkpoints=tuple(names),
                still_held_by=() if forks else ids_of_forks,
                also_at=tuple(also_at),
                unreadable=tuple(map(str, held.unreadable)),
                put_aside=tuple(map(str, put_aside)),
                proof=proof,
                seconds=time.perf_counter() - began,
            )

    # -- what

    async def _span(self, session: Forgettable, wanted: Wanted) -> Span:
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
        return Span(max(start, int(keep_first)), end, keep_first)

    def _holders(self, folder: SessionFolder, said: Said) -> Holders:
        """On the journal thread: who holds it beside the session, those with an unfinished forget only if they do."""
        found = holders_of(folder, session_folders(self._shared.store, self._shared.tenant), said)
        return Holders(
            [one for one in found.forks if one.ranges or one.checkpoints], found.checkpoints, found.unreadable
        )

    # -- gone

    async def _forgotten(
        self, session: Forgettable, span: Span, said: Said, text: str, forks: bool, verify: bool, files: WorkerThread
    ) -> tuple[Holders, Evidence | None]:
        """Take the span out of the session and of who else holds it: they, and what the files held before."""
        while True:
            held = await self._shared.journal.run(self._holders, session.folder, said)
            going = held.forks if forks else []
            for one in going:
                if one.cut_off:
                    raise SessionError(
                        f"session {one.session_id!r} holds some of it, too, and has a forget that was cut off: open "
                        f"that session first, which goes on with it, then call again. Nothing was changed."
                    )
            evidence = await self._evidence(session, said, text, going, files) if verify else None
            held = await self._take_out(session, span, said, going, wide=forks)
            if held is not None:
                return held, evidence

    async def _take_out(
        self, session: Forgettable, span: Span, said: Said, going: list[Held], *, wide: bool
    ) -> Holders | None:
        """Forget it on disk, nobody using any of these files. Returns who held it; None if others do by now than were
        known, and nothing was done.
        """
        shared = self._shared
        try:
            async with AsyncExitStack() as stack:
                opened = [await self._offline(stack, one) for one in going]
                folder = await stack.enter_async_context(session.offline())

                def forget() -> Holders | None:
                    # nobody can copy from one that is locked, so whoever holds it now is known
                    held = self._holders(folder, said)
                    if wide and {one.folder for one in held.forks} - {one.folder for one in going}:
                        return None
                    forks = [fork for fork in opened if fork is not None]
                    self._with_reserve(
                        partial(begin, folder, span.start, span.end, keep_first=span.keep_first, wide=wide)
                    )
                    self._with_reserve(partial(go_on, folder, forks))
                    return held

                return await shared.journal.run(forget)
        except MemtierError as error:
            if session.closed:
                raise type(error)(
                    f"{error} What is to be forgotten is written down, and session {session.id!r} was closed: open it "
                    f"again and that goes on where it was cut off."
                ) from error
            raise
        finally:
            await shared.journal.run(shared.space.fill)

    def _with_reserve(self, step: Callable[[], None]) -> None:
        """A step of a forget, which takes room, too: what was set aside for it. It can be done again."""
        try:
            step()
        except StorageFullError:
            if not self._shared.space.release():
                raise
            step()

    async def _offline(self, stack: AsyncExitStack, one: Held) -> SessionFolder | None:
        """A fork's folder, used by nothing else; None if it was deleted meanwhile."""
        shared, other = self._shared, self._sessions.get(one.session_id)
        if other is not None:
            try:
                await stack.enter_async_context(other.exclusive(None, catch_up=False))
                return await stack.enter_async_context(other.offline())
            except SessionError:
                if not other.closed:
                    raise
                # it was being closed, and is free now
        try:
            fork = await shared.journal.run(open_copy, one.folder, shared.backends)
        except SessionNotFoundError:
            return None
        stack.push_async_callback(shared.journal.run, fork.close)
        return fork

    # -- proof

    async def _evidence(
        self, session: Forgettable, said: Said, text: str, going: list[Held], files: WorkerThread
    ) -> Evidence:
        await session.updater.index()  # opened, so that rows which it lost are written again
        await session.updater.flush()
        async with self._at_rest(session, going):
            evidence = await files.run(
                collect, self._folders(session, going), said, text, self._shared.weights.codec.decode
            )
            await files.run(erasure.control, evidence)
        return evidence

    async def _proof(
        self, session: Forgettable, evidence: Evidence, gone: list[Held], unreadable: list[Path], files: WorkerThread
    ) -> ErasureProof:
        try:
            index = await session.updater.index()
            async with self._at_rest(session, gone):
                await self._shared.journal.run(session.folder.journal.checkpoint)
                texts = (await index.rows(0, 2**62))["text"].to_pylist()
                hidden = [f"{path} cannot be read, and may hold it" for path in unreadable]
                return await files.run(erasure.prove, evidence, self._folders(session, gone), texts, hidden)
        except StorageError as error:
            return erasure.unfinished(evidence, f"the span is forgotten, and the scan after it failed: {error}")

    @asynccontextmanager
    async def _at_rest(self, session: Forgettable, held: list[Held]) -> AsyncGenerator[None]:
        """Nothing is written or merged, so that no file comes or goes while all are read."""
        others = [other for one in held if (other := self._sessions.get(one.session_id)) is not None]
        async with AsyncExitStack() as stack:
            for other in others:
                with suppress(SessionError):  # one that was closed meanwhile writes nothing
                    await stack.enter_async_context(other.exclusive(None, catch_up=False))
            for one in (session, *others):
                await one.updater.rest()
            yield

    def _folders(self, session: Forgettable, held: list[Held]) -> list[Path]:
        return [session.folder.paths.folder, *(one.folder for one in held)]


@contextmanager
def _thread_for_files():
    """Files are read in a thread of their own: those of the runtime serve other sessions meanwhile."""
    thread = WorkerThread("memtier-forget")
    try:
        yield thread
    finally:
        thread.close()


@contextmanager
def _told_as_done():
    try:
        yield
    except MemtierError as error:
        raise type(error)(
            f"the span is forgotten, and what follows it could not be read again: {error} The session's next call "
            f"tries that again."
        ) from error


def _put_aside(folders: list[Path]) -> list[Path]:
    return [path for folder in folders for path in sorted((folder / "quarantine").glob("*"))]
