"""One message of a conversation as input of a session, rendered by where the session then stands."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from memtier.chat_template import ChatTemplate
from memtier.errors import ConfigError
from memtier.feed import Feed, Step
from memtier.text import Piece, TextCodec, check_text
from memtier.threads import WorkerThread
from memtier.timeline import Timeline

__all__ = ["ChatFeed"]


class ChatFeed(Feed):
    """One message of a conversation, rendered when it is read, by where the session then stands.

    Args:
        timeline: of the session; asked for anew, since it may be replaced.
        template: of the model.
        message: its text.
        role: who says it.
        system: stands before it, if it opens the session.
    """

    def __init__(
        self, timeline: Timeline, template: ChatTemplate, message: str, role: str, system: str | None, codec: TextCodec,
        thread: WorkerThread, *, max_tokens: int,
    ) -> None:  # fmt: skip
        super().__init__(message, codec, thread, max_tokens=max_tokens)
        self._timeline, self._template, self._message, self._system = timeline, template, message, system
        self.role = role

    async def open(self) -> None:
        """Check the message; its tokens are known when it is read.

        Raises:
            ConfigError: it is empty or no text.
        """
        if not isinstance(self._message, str) or not self._message:
            raise ConfigError(f"the message is {self._message!r}; it must be a text of at least one character.")
        check_text(self._message, "the message")

    async def steps(self, *, at_start: bool) -> AsyncGenerator[Step]:
        """See `Feed.steps`.

        Raises:
            ConfigError: the template refuses the message; or a system message came late.
        """
        if self._system is not None and not at_start:
            raise ConfigError("a system message opens a session, and this one has begun. Leave system out.")
        rendered = await self._rendered(at_start)
        ids = await self._thread.run(self._codec.encode, rendered)
        self._source = Piece(ids, self._message, len(self._message.encode()), framed=True)
        await super().open()
        async with aclosing(super().steps(at_start=at_start)) as steps:
            async for step in steps:
                yield step

    async def _rendered(self, at_start: bool) -> str:
        template, position = self._template, self._timeline.position
        turns = [] if at_start else await self._timeline.history.turns(position - 1, position)
        if not turns or turns[-1].role != "assistant":
            opening = template.opening(self.role, self._message, self._system)
            begin = self._codec.begin_text
            return opening.removeprefix(begin) if begin and not at_start else opening
        # the answer before ended with the token that closes it, or was cut before
        last = int((await self._timeline.tokens(position - 1, position))[0])
        end = self._codec.special_text(last)
        closing = template.closing
        if end and closing.startswith(end):
            closing = closing.removeprefix(end)
        return closing + template.following(self.role, self._message)
