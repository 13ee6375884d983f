"""Where a generation's tokens come from: the session itself, or a copy that leaves no trace."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from functools import partial
from typing import Protocol

import anyio.lowlevel
import torch

from memtier.errors import ConfigError, SessionError
from memtier.feed import Feed, Step
from memtier.reader import Manner, Reader
from memtier.threads import WorkerThread
from memtier.timeline import Timeline
from memtier.turn_lock import TurnLock

__all__ = ["AsideLine", "Line", "RememberedLine", "SessionDoor"]


class SessionDoor(Protocol):
    """What a line needs of its session."""

    timeline: Timeline
    model_thread: WorkerThread

    lock: TurnLock

    @property
    def acknowledges_each_token(self) -> bool: ...

    @property
    def id(self) -> str: ...

    def exclusive(self, line: Line | None, *, catch_up: bool = True) -> AbstractAsyncContextManager[None]:
        """The session's lock, any other line ended, and the reader level with the journal (`catch_up`)."""
        ...


class Line(ABC):
    """A line of tokens that begins with a prompt. Subclasses say where they are kept.

    Args:
        session: whose memory answers.
        prompt: what the answer follows; None to go on from where the session stands.
        manner: how to retrieve.
    """

    remembers = True

    def __init__(self, session: SessionDoor, prompt: Feed | None, manner: Manner) -> None:
        self._session = session
        self._prompt = prompt
        self._manner = manner
        self._begun = False
        self.ended = False
        self.on_end: Callable[[], None] = lambda: None

    async def next(self, sample: Callable[[torch.Tensor], int]) -> int | None:
        """One step; see `TokenLine.next`."""
        if self.ended:
            return None
        if self._prompt is not None and not self._begun:
            await self._prompt.open()
        # once begun, the line itself keeps journal and reader level, but for the token it samples next from
        behind = self.remembers or self._session.timeline.reader.cache is None
        async with self._session.exclusive(self, catch_up=behind and not self._begun):
            if self.ended:
                return None
            if not self._begun:
                self._begun = True
                await self._begin()
            return await self._sample(sample)

    async def end(self) -> None:
        """Acknowledge what was sampled."""
        if not self.ended:
            async with self._session.lock:
                await self.end_within()

    async def end_within(self) -> None:
        """`end`, for a caller that has the session already."""
        if not self.ended:
            self.ended = True
            self.on_end()
            await self._end()

    @abstractmethod
    async def _begin(self) -> None:
        """Read the prompt."""

    @abstractmethod
    async def _sample(self, sample: Callable[[torch.Tensor], int]) -> int:
        """Read the token sampled last, and sample the next."""

    @abstractmethod
    async def _end(self) -> None:
        """Keep what was sampled, or let it go."""

    def _refuse_silence(self, position: int) -> None:
        if self._prompt is None and position == 0:
            raise SessionError(
                f"session {self._session.id!r} is empty and no prompt was given, so there is nothing to go on from. "
                f"Give a prompt, or observe some text first."
            )


class RememberedLine(Line):
    """Prompt and answer become two turns of the session."""

    async def _begin(self) -> None:
        timeline = self._session.timeline
        self._refuse_silence(timeline.position)
        if self._prompt is not None:
            self._manner = await timeline.in_a_new_turn(self._manner)
            turn = await timeline.begin_turn(self._prompt.role, self._manner)
            async with aclosing(_marked(self._prompt.steps(at_start=timeline.position == 0))) as steps:
                async for step, last in steps:
                    await timeline.read(turn, step.tokens, self._manner, text=step.text, mark=last)
        self._manner = await timeline.in_a_new_turn(self._manner)
        timeline.answer_in(self._manner)

    async def _sample(self, sample: Callable[[torch.Tensor], int]) -> int:
        return await self._session.timeline.sample(
            self._manner, sample, acknowledge=self._session.acknowledges_each_token
        )

    async def _end(self) -> None:
        await self._session.timeline.acknowledge()


class AsideLine(Line):
    """A copy of the session answers; the session stays as it was, to the bit."""

    remembers = False

    def __init__(self, session: SessionDoor, prompt: Feed | None, manner: Manner) -> None:
        super().__init__(session, prompt, manner)
        self._reader: Reader | None = None
        self._unread: int | None = None

    async def _begin(self) -> None:
        timeline = self._session.timeline
        self._refuse_silence(timeline.position)
        reader = self._reader = await self._session.model_thread.run(timeline.reader.aside)
        await timeline.replay(reader)
        self._manner = await timeline.in_a_new_turn(self._manner)
        if self._prompt is not None:
            async with aclosing(_marked(self._prompt.steps(at_start=timeline.position == 0))) as steps:
                async for step, last in steps:
                    marks = [reader.position + step.tokens.size - 1] if last else []
                    read = partial(reader.step, step.tokens, self._manner, marks=marks)
                    await self._session.model_thread.run(read)
                    await anyio.lowlevel.checkpoint()

    async def _sample(self, sample: Callable[[torch.Tensor], int]) -> int:
        assert self._reader is not None, "the line was begun"
        batcher = self._session.timeline.batcher
        self._unread, _ = await batcher.sample(self._reader, self._unread, self._manner, sample)
        return self._unread

    async def _end(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            await self._session.model_thread.run(reader.drop)


async def _marked(steps: AsyncGenerator[Step]) -> AsyncGenerator[tuple[Step, bool]]:
    """Each step, and whether it is the last: a mark stands at the last token of a prompt."""
    held: Step | None = None
    async with aclosing(steps):
        async for step in steps:
            if held is not None:
                yield held, False
            held = step
    if held is None:
        raise ConfigError(
            "the prompt is empty; give text or token ids, or None to go on from where the session stands."
        )
    yield held, True
