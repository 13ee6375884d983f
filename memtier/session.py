"""A session: one line of tokens that a model remembers, and what a program may ask of it.

Calls on one session take turns; a new one ends a generation that was left unfinished. Looking (`inspect`, `blocks`,
`block`, `state`, `stats`) waits for no call. Over 300 lines, half of them docstrings: it is all that a program may ask.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, SupportsIndex

import pyarrow as pa
import torch

from memtier.arguments import check_progress, file_path, whole_number
from memtier.blocks import MemoryHit, RetrievalMode
from memtier.chat import ChatFeed
from memtier.errors import ConfigError
from memtier.feed import Feed
from memtier.folder import SessionFolder
from memtier.forgetting import Forgetter, Wanted
from memtier.generation import Generation, Sampler, check_stop
from memtier.lines import AsideLine, RememberedLine
from memtier.open_session import OpenSession
from memtier.parts import Parts, Shared
from memtier.reader import Manner
from memtier.recall import find
from memtier.recovery.copies import checkpoints, drop_checkpoint, make_checkpoint, restore_checkpoint
from memtier.recovery.portable import export_session
from memtier.recovery.reports import CheckpointInfo, ForgetReport
from memtier.replay import Progress
from memtier.reports import (
    BlockContent,
    MemoryReport,
    ObserveReport,
    SessionStats,
    TurnInfo,
)
from memtier.text import check_metadata, check_text
from memtier.threads import own_task, to_the_end
from memtier_backends.records import TurnRecord

__all__ = ["Session"]


class Session(OpenSession):
    """Made by `Runtime.session`."""

    def __init__(
        self, session_id: str, shared: Shared, folder: SessionFolder, parts: Parts, *, edition: str,
        fork: Callable[[Session, str], Awaitable[Session]], forgetter: Forgetter,
        on_close: Callable[[str], None],
    ) -> None:  # fmt: skip
        super().__init__(session_id, shared, folder, parts, edition=edition, on_close=on_close)
        self._manner = Manner(shared.config.retrieval, shared.settings.span_blocks)
        self._fork = fork
        self._forgetter = forgetter

    @property
    def id(self) -> str:
        """The id it was opened by."""
        return self._id

    @property
    def position(self) -> int:
        """Tokens of the session, the last sampled one included."""
        return self.timeline.position

    # -- reading and answering

    @own_task
    async def observe(
        self, x: Any, *, role: str = "user", source: str | None = None, metadata: Mapping[str, Any] | None = None,
        logits: bool = False, on_progress: Progress | None = None,
    ) -> ObserveReport:  # fmt: skip
        """Read, and remember.

        Args:
            x: text, UTF-8 bytes, token ids, or an (async) iterator of these. A plain iterator is advanced on the event
            loop. role, source, metadata: come back with every hit; metadata must be JSON.
            logits: return the outputs after each token, (tokens, vocabulary).
            on_progress: called after each step with the tokens read and the total, None if that is not known.

        Returns:
            What was read. An iterator that gives nothing makes a report of 0 tokens.

        Raises:
            ConfigError: empty or invalid input, or too much of it; nothing invalid was written.
            ModelError: the model refused a step, which was taken back; the steps before stand.
            StorageError: memory could not be read or written; what was acknowledged stands.
        """
        self._check_open()
        for name, value in (("role", role), ("source", source)):
            if value is not None or name == "role":
                _check_label(name, value)
        check_metadata(metadata)
        check_progress(on_progress)
        began = time.perf_counter()
        feed = Feed(x, self._weights.codec, self.model_thread, max_tokens=self._config.max_turn_tokens)
        await feed.open()
        nats, predicted, kept = 0.0, 0, []
        async with self.exclusive(None):
            timeline = self.timeline
            first = timeline.position
            turn: int | None = None
            manner = await timeline.in_a_new_turn(self._manner)
            async with aclosing(feed.steps(at_start=first == 0)) as steps:
                async for step in steps:
                    if turn is None:
                        about = None if metadata is None else dict(metadata)
                        turn = await timeline.begin_turn(role, manner, source=source, metadata=about)
                    result = await timeline.read(
                        turn, step.tokens, manner, text=step.text, score=True, keep_logits=logits
                    )
                    nats, predicted = nats + result.nats, predicted + result.predicted
                    if result.logits is not None:
                        kept.append(result.logits)
                    if on_progress is not None:
                        on_progress(timeline.position - first, feed.known_tokens)
            bits = nats / math.log(2)
            return ObserveReport(
                tokens=timeline.position - first,
                position=timeline.position,
                bits_per_byte=bits / feed.text_bytes if predicted and feed.text_bytes else None,
                bits_per_token=bits / predicted if predicted else None,
                seconds=time.perf_counter() - began,
                logits=self._stacked(kept) if logits else None,
            )

    def generate(
        self, prompt: Any = None, *, max_new_tokens: int = 256, stop: str | Sequence[str] = (),
        temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int | None = None, remember: bool = True,
        retrieval: RetrievalMode | None = None,
    ) -> Generation:  # fmt: skip
        """Answer. The prompt is read and the answer sampled as the returned iterator is advanced.

        Args:
            prompt: as in `observe`; None to go on from where the session stands.
            max_new_tokens: at most so many.
            stop: texts that end the answer; they are not part of it, though their tokens are in the session.
            temperature: 0 takes the most likely token each time.
            top_p, top_k: of these tokens only; 1 and 0 for all.
            seed: makes sampling repeatable.
            remember: False answers from a copy and leaves the session as it is, to the bit.
            retrieval: "on", "off", "random" or "recent" for this call; None for the configured mode.

        Raises:
            ConfigError: an argument out of its range.
        """
        feed = None
        if prompt is not None:
            feed = Feed(prompt, self._weights.codec, self.model_thread, max_tokens=self._config.max_turn_tokens)
        sampler = Sampler(temperature, top_p, top_k, seed)
        return self._answer(feed, sampler, max_new_tokens, stop, remember, retrieval, self._weights.end_tokens)

    def chat(
        self, message: str, *, role: str = "user", system: str | None = None, max_new_tokens: int = 256,
        stop: str | Sequence[str] = (), temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0,
        seed: int | None = None, remember: bool = True, retrieval: RetrievalMode | None = None,
    ) -> Generation:  # fmt: skip
        """Answer a message in the model's own chat template. As `generate`, but for:

        Args:
            message: what is said; the template's words are put around it, and the turn keeps the text as it is.
            role: who says it, as the template knows it.
            system: a system message, for the first message of a session only.

        Raises:
            ConfigError: no chat template, one that is not prefix-stable, or one that refuses the message.
        """
        self._check_open()
        _check_label("role", role)
        template, codec = self._weights.chat_template, self._weights.codec
        feed = ChatFeed(
            self.timeline, template, message, role, system, codec, self.model_thread,
            max_tokens=self._config.max_turn_tokens,
        )  # fmt: skip
        ends = self._weights.end_tokens
        if template.end_token is not None:
            ends = ends | {template.end_token}
        sampler = Sampler(temperature, top_p, top_k, seed)
        return self._answer(feed, sampler, max_new_tokens, stop, remember, retrieval, ends)

    @property
    def has_chat_template(self) -> bool:
        """True if the model's tokenizer has a chat template."""
        return bool(getattr(self._weights.codec.tokenizer, "chat_template", None))

    def _answer(
        self, feed: Feed | None, sampler: Sampler, max_new_tokens: int, stop: str | Sequence[str], remember: bool,
        retrieval: RetrievalMode | None, end_tokens: frozenset[int],
    ) -> Generation:  # fmt: skip
        self._check_open()
        max_new_tokens = whole_number(
            "max_new_tokens", max_new_tokens, lambda number: number >= 1, "a whole number of at least 1"
        )
        if not isinstance(remember, bool):
            # what is not to be remembered must not be for a slip
            raise ConfigError(f"remember is {remember!r}; it must be True or False.")
        if retrieval not in (None, "on", "off", "random", "recent"):
            raise ConfigError(f"retrieval is {retrieval!r}; it must be 'on', 'off', 'random', 'recent' or None.")
        codec = self._weights.codec
        manner = Manner(retrieval or self._manner.retrieval, self._manner.span_blocks)
        line = (RememberedLine if remember else AsideLine)(self, feed, manner)
        generation = Generation(
            line, codec, sampler, stop=check_stop(stop, codec), max_new_tokens=max_new_tokens, end_tokens=end_tokens
        )
        line.on_end = generation.note_closed
        return generation

    @own_task
    async def recall(self, query: str, k: int = 5) -> list[MemoryHit]:
        """Passages that hold the words of `query`, best first, from storage and from the newest tokens.

        Raises:
            ConfigError: an empty query, k below 1, or a model without a tokenizer.
            StorageError: memory could not be read or written.
        """
        async with self.exclusive(None, catch_up=False):
            index = await self.updater.index()
            await self.updater.flush()
            return await find(
                query, k, timeline=self.timeline, index=index, codec=self._weights.codec,
                block_tokens=self._storage.settings.span_block_tokens, sealed_blocks=self.updater.indexed,
                retained_from=self.timeline.retained_from, edition=self._edition,
            )  # fmt: skip

    # -- looking

    @own_task
    async def inspect(self) -> MemoryReport:
        """The four tiers as they stand. Waits for no other call."""
        await self._ready_to_look()
        return await self._views.report()

    def blocks(self, start: SupportsIndex = 0, end: SupportsIndex | None = None) -> pa.RecordBatchReader:
        """Contents of the blocks that hold tokens of [start, end): text, tokens, provenance, innovation, landmarks.

        Read batch by batch as the reader is advanced; K and V are in `block`.
        """
        self._check_open()
        return self._views.blocks(whole_number("start", start), None if end is None else whole_number("end", end))

    @own_task
    async def block(self, block_id: SupportsIndex) -> BlockContent:
        """One block of long-term memory with its K, V, landmarks and innovation, all read-only.

        Raises:
            SessionError: there is no such block.
        """
        self._check_open()
        return await self._views.block(whole_number("block_id", block_id))

    @own_task
    async def state(self, layer: SupportsIndex) -> dict[str, torch.Tensor]:
        """Copies of all that one layer carries on the device, by name."""
        layer = whole_number("layer", layer)
        await self._ready_to_look()
        return await self._views.state(layer)

    def stats(self) -> SessionStats:
        """Counters, at once."""
        cache, storage, updater = self.timeline.reader.cache, self._storage, self.updater
        return SessionStats(
            session=self._id,
            position=self.position,
            blocks=storage.blocks,
            dropped_blocks=self._views.dropped_blocks,
            segments=len(storage.segments()),
            merges=updater.merges,
            inbox_blocks=updater.pending,
            inbox_limit_blocks=self._config.inbox_blocks,
            waited_seconds=updater.waited_seconds,
            pinned_bytes=storage.pinned_bytes,
            hot_bytes=storage.hot_bytes,
            hot_limit_bytes=self._config.hot_bytes,
            landmark_bytes=storage.landmark_bytes,
            landmark_limit_bytes=self._config.landmark_bytes,
            device_bytes=0 if cache is None else cache.device_bytes(),
            segment_bytes=storage.segment_bytes,
            lag_tokens=(storage.blocks - updater.indexed) * storage.settings.span_block_tokens,
            blocks_from_hot=storage.blocks_from_hot,
            blocks_from_disk=storage.blocks_from_disk,
            snapshots=updater.snapshots,
            failure=updater.failure,
        )

    # -- keeping

    @own_task
    async def flush(self) -> None:
        """Return once every block sealed so far is in a segment and in the index.

        Raises:
            StorageError: it could not be written; nothing acknowledged is lost.
        """
        async with self.exclusive(None):
            await self.updater.flush()

    @own_task
    async def history(self, start: SupportsIndex = 0, end: SupportsIndex | None = None) -> list[TurnInfo]:
        """The turns that hold a token of [start, end), oldest first: role, time, span, text and provenance."""
        first, last = whole_number("start", start), None if end is None else whole_number("end", end)
        async with self.exclusive(None, catch_up=False):
            turns = await self.timeline.history.turns(first, self.position if last is None else last)
            return [await self._turn_info(turn) for turn in turns]

    @own_task
    async def checkpoint(self, name: str) -> None:
        """Keep the session as it stands, under a name. The journal is copied; blocks are shared.

        Raises:
            ConfigError: a name that cannot be one.
            SessionError: there is a checkpoint of that name.
            StorageError: it could not be written; nothing of it is left.
        """
        _check_label("the checkpoint's name", name)
        async with self.exclusive(None):
            await self._shared.journal.run(self._shared.space.check)
            await self._settle()
            await self._shared.journal.run(make_checkpoint, self.folder, name)

    @own_task
    async def checkpoints(self) -> list[CheckpointInfo]:
        """The checkpoints of the session, oldest first."""
        self._check_open()
        return await self._shared.journal.run(checkpoints, self.folder.paths)

    @own_task
    async def restore(self, name: str, *, on_progress: Progress | None = None) -> None:
        """Go back to a checkpoint, which stays: the session then is what it was, to the bit.

        What came after it is gone, unless it is in another checkpoint or in a fork.

        Args:
            on_progress: called, where tokens must be read again, after each step with how many were and the total.

        Raises:
            SessionError: there is no such checkpoint.
            CorruptMemoryError: it is damaged; the session is as it was.
        """
        _check_label("the checkpoint's name", name)
        check_progress(on_progress)
        async with self.exclusive(None, catch_up=False):
            async with self.offline() as folder:
                await self._shared.journal.run(restore_checkpoint, folder, name)
            await self.timeline.catch_up(on_progress)

    @own_task
    async def drop_checkpoint(self, name: str) -> None:
        """Remove a checkpoint. Raises SessionError if there is none of that name."""
        _check_label("the checkpoint's name", name)
        async with self.exclusive(None, catch_up=False):
            await self._shared.journal.run(drop_checkpoint, self.folder, name)

    @own_task
    async def export(self, path: str | Path) -> None:
        """Write the session to one new file, with a hash of every part: `Runtime.import_session` reads it.

        Raises:
            SessionError: there is such a file.
            StorageError: it cannot be written.
        """
        target = file_path(path)
        async with self.exclusive(None):
            await self._settle()
            await self._shared.journal.run(export_session, self.folder, target)

    @own_task
    async def fork(self, session_id: str) -> Session:
        """A new session that begins as this one stands, open. The journal is copied; blocks are shared.

        Raises:
            ConfigError: an id that cannot be one.
            SessionError: there is such a session, or too many are open.
            StorageError: it could not be written; nothing of it is left.
        """
        self._check_open()
        return await self._fork(self, session_id)

    @own_task
    async def forget(
        self, hit: MemoryHit | None = None, *, start: int | None = None, end: int | None = None,
        turn: int | None = None, forks: bool = True, verify: bool = False, on_progress: Progress | None = None,
    ) -> ForgetReport:  # fmt: skip
        """Forget a passage for good: afterwards the session is one that never saw it. Later positions move down.

        It leaves the journal, checkpoints and forks, with everything derived from it; then the session is read again
        from the last snapshot before it. A forget that is cut off goes on when the session is opened next. Exported
        files, and backups that you made, are beyond its reach.

        Args:
            hit: what `recall` found; or
            start, end: tokens [start, end); or
            turn: a turn of `history`, by number.
            forks: forget it in the forks too; False leaves them, and `still_held_by` names them.
            verify: look for its bytes in the raw files, before and after, and report a proof.
            on_progress: called after each step of reading again with the tokens read and the total.

        Raises:
            ConfigError: not exactly one of the three, or no tokens of this session.
            SessionError: there is no such turn, or the hit is not of the session as it stands.
            SessionBusyError: a fork that holds it is open elsewhere; nothing was changed.
            StorageError: it was cut off; the session is closed, and the next open goes on with it.
        """
        self._check_open()
        check_progress(on_progress)
        if hit is not None and not isinstance(hit, MemoryHit):
            raise ConfigError(f"hit is {hit!r}; it must be one that recall gave. Else give start= and end=, or turn=.")
        wanted = Wanted(hit, start, end, turn)
        return await self._forgetter.forget(self, wanted, forks=forks, verify=verify, on_progress=on_progress)

    @to_the_end
    async def close(self) -> None:
        """Keep a snapshot, write what waits, and free the session. Harmless when closed already.

        Raises:
            StorageError: something could not be written; the session is closed all the same, and the next open makes it
                again from the journal.
        """
        await self.close_within(write=True)

    async def _turn_info(self, turn: TurnRecord) -> TurnInfo:
        text = turn.text
        if text is None:
            text = self._weights.codec.decode(await self.timeline.tokens(turn.start, turn.end))
        return TurnInfo(
            turn=turn.turn, role=turn.role, start=turn.start, end=turn.end, text=text, source=turn.source,
            metadata=turn.metadata, created_at=turn.created_at,
        )  # fmt: skip

    def _stacked(self, kept: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(kept) if kept else torch.empty(0, self._weights.config.vocab_size)


def _check_label(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} is {value!r}; it must be a string of at least one character.")
    check_text(value, name)
