"""One line of tokens in two places that must agree: the journal, which is the truth, and the reader, its cache.

`catch_up` makes the reader what the journal says: it serves open, recovery, a failed step and a cancelled call. `read`
and `sample` move both on. The caller holds the session's lock. A commit and its step are shielded from cancellation,
which acts between steps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from memtier.batching import Choose, DecodeBatcher
from memtier.errors import IncompatibleMemoryError, MemtierError, ModelError, StorageError
from memtier.history import History
from memtier.reader import Manner, Reader, StepResult
from memtier.replay import Progress, Replay
from memtier.retention import Retention
from memtier.threads import WorkerThread, shielded
from memtier.tiers.retry import retry
from memtier.updater import Updater
from memtier_backends.base import SegmentStore
from memtier_backends.records import SnapshotRecord

__all__ = ["Timeline"]

log = logging.getLogger("memtier")


class Timeline:
    """Tokens of one session, read and remembered.

    Args:
        name: the session's id, for messages.
        history: its journal.
        reader: its device side.
        updater: takes what is sealed.
        model: the model thread.
        batcher: reads sampled tokens there.
        io: reads snapshots.
        snapshots: where they lie.
        snapshot_every_tokens: tokens between two of them.
        retention: what is dropped when a turn begins.
        decode: makes the text of an answer; None for a model without a tokenizer.
    """

    def __init__(
        self, name: str, history: History, reader: Reader, updater: Updater, model: WorkerThread,
        batcher: DecodeBatcher, io: WorkerThread, snapshots: SegmentStore, snapshot_every_tokens: int,
        retention: Retention, retained_from: int,
        decode: Callable[[NDArray[np.int32]], str] | None = None,
    ) -> None:  # fmt: skip
        self._name = name
        self.history = history
        self.reader = reader
        self._updater = updater
        self._model = model
        self.batcher = batcher
        self._io = io
        self._snapshots = snapshots
        self._snapshot_every = snapshot_every_tokens
        self._replay = Replay(name, history, updater, model, snapshot_every_tokens)
        self._retention = retention
        self._decode = decode
        self.retained_from = retained_from  # of the newest turn: see `Manner`
        self._snapshot_at = 0
        self.restored_from = 0  # the snapshot that the reader was last begun from
        self._sampled: list[int] = []  # not in the journal yet
        self._unread: int | None = None  # the last sampled token, which the model has not read
        self._answer_turn: int | None = None
        self._answer_from = 0
        self._answer_manner: Manner | None = None

    @property
    def position(self) -> int:
        """Tokens of the session, those sampled and not yet acknowledged included."""
        return self.history.position + len(self._sampled)

    async def tokens(self, start: int, end: int) -> NDArray[np.int32]:
        """Token ids [start, end), those sampled and not yet acknowledged included."""
        known, sampled = self.history.position, list(self._sampled)
        journaled = await self.history.tokens(min(start, known), min(end, known))
        return np.concatenate([journaled, np.array(sampled[max(0, start - known) : max(0, end - known)], np.int32)])

    # -- what the journal holds, read

    async def catch_up(self, on_progress: Progress | None = None) -> None:
        """Make the reader what the journal says.

        Args:
            on_progress: told after each step how many tokens were read again, and of how many.

        Raises:
            ModelError: the model refuses tokens that it once read.
            StorageError: memory cannot be read or written.
        """
        await self._end_answer()
        try:
            await self._read_on(on_progress)
        except ModelError as error:
            await self._take_back_unread(error)

    async def replay(self, reader: Reader) -> None:
        """Let a reader aside read the journal from its position on; see `Replay.read`."""
        await self._replay.read(reader)

    async def _read_on(self, on_progress: Progress | None = None, *, until: int | None = None) -> None:
        if self.reader.cache is None:
            await self._restore()
        await self._replay.read(self.reader, self._after, on_progress, until=until)

    async def _take_back_unread(self, error: ModelError) -> None:
        """Take back what was committed last and refused, if the record that says so was never written.

        Whatever else the model refuses it has read before, and that stays: another model or another machine may read
        it.
        """
        unread = await self.history.call(self.history.journal.newest_commit)
        if unread is None:
            raise error
        start, end = unread
        (turn,) = await self.history.turns(end - 1, end)
        # of an answer all but the last token were read, to sample what followed them
        for position in (end - 1, start) if turn.role == "assistant" else (start,):
            try:
                await self._read_on(until=position)
                break
            except ModelError:
                continue
        else:
            raise error
        try:
            await self._read_on()
        except ModelError as again:
            log.warning("session %r: tokens from %d on are taken back: %s", self._name, position, again)
            await self.history.rollback(position, f"the model refused a step: {again}")
            await self._read_on()

    async def _restore(self) -> None:
        """Begin from the newest snapshot that can be read, else from nothing."""
        records = await self.history.call(self.history.journal.snapshots)
        first, end = self._updater.first_block, self._updater.durable_blocks
        for record in reversed(records):
            usable = record.first_block >= first and record.blocks <= end
            if record.position <= self.history.position and usable and await self._load(record):
                self._snapshot_at = self.restored_from = record.position
                return
        if first:
            log.warning(
                "session %r: no snapshot can be used, and old blocks were dropped: all is read again", self._name
            )
            await self._updater.start_over()
        self._snapshot_at = self.restored_from = 0
        await self._model.run(self.reader.begin)

    async def _load(self, record: SnapshotRecord) -> bool:
        try:
            read = partial(self._io.run, self._snapshots.get, record.name)
            data = await retry(read, f"reading snapshot {record.name}")
            await self._model.run(
                self.reader.restore, data, record.name, record.hash, record.position, record.first_block
            )
        except (StorageError, IncompatibleMemoryError) as error:
            # a snapshot only saves time: the journal holds the same, and an older snapshot or none will do
            log.warning("session %r: the snapshot at %d is left out: %s", self._name, record.position, error)
            return False
        return True

    # -- new tokens

    async def read(
        self, turn: int, tokens: NDArray[np.int32], manner: Manner, *, text: str | None = None, mark: bool = False,
        score: bool = False, keep_logits: bool = False,
    ) -> StepResult:  # fmt: skip
        """Commit at most STEP_TOKENS tokens, then read them; two commits where a snapshot is due among them.

        Raises:
            ModelError: the model refused them; they were taken back by a record.
            StorageError: they were not acknowledged, or memory cannot be read or written.
        """
        due = self._next_snapshot(self.history.position) - self.history.position
        if due < tokens.size:
            one = await self.read(turn, tokens[:due], manner, score=score, keep_logits=keep_logits)
            two = await self.read(
                turn, tokens[due:], manner, text=text, mark=mark, score=score, keep_logits=keep_logits
            )
            return one.followed_by(two)

        async def commit_and_step() -> StepResult:
            before = self.history.position
            await self.history.commit(turn, tokens, text=text, mark=mark)
            marks = [self.history.position - 1] if mark else []
            step = partial(self.reader.step, tokens, manner, marks=marks, score=score, keep_logits=keep_logits)
            try:
                result = await self._model.run(step)
            except StorageError:
                raise  # no fault of these tokens: they are acknowledged, and read again by the next call
            except Exception as error:
                await self.history.rollback(before, f"the model refused a step: {error}")
                raise _refused(error) from error
            await self._after(result)
            return result

        await self._updater.ready()
        return await shielded(commit_and_step())

    async def sample(self, manner: Manner, choose: Choose, *, acknowledge: bool) -> int:
        """Read the token sampled last, and sample the next.

        Args:
            manner: how to retrieve.
            choose: a token id from logits.
            acknowledge: commit the new token before returning.

        Raises:
            ModelError: the model refused the token sampled last; it was taken back.
            StorageError: memory cannot be read or written.
        """

        async def step_and_commit() -> int:
            try:
                # here and not when it is committed: what was sampled and told must end where it is, room or not
                await self.history.ask_for_room()
                token, result = await self.batcher.sample(self.reader, self._unread, manner, choose)
            except StorageError:
                await self.acknowledge()
                raise
            except Exception as error:
                await self._take_back(error)
                raise _refused(error) from error
            self._unread = token
            self._sampled.append(token)
            if acknowledge or result.sealed or self.snapshot_due:
                await self._commit_sampled()
            await self._after(result)
            return token

        await self._updater.ready()
        assert self.reader.position + (self._unread is not None) == self.position, "only the newest token is unread"
        return await shielded(step_and_commit())

    async def acknowledge(self) -> None:
        """Commit what was sampled: the answer ends here, and its text is known."""
        await self._commit_sampled()
        if self._answer_turn is not None and self._answer_from < self.history.position and self._decode is not None:
            answer = await self.history.tokens(self._answer_from, self.history.position)
            await self.history.commit(self._answer_turn, [], text=self._decode(answer), has_room=True)
        self._unread = self._answer_turn = None

    async def _end_answer(self) -> None:
        """Acknowledge an answer that was left before it could be: whoever calls this is not sampling."""
        if self._sampled:
            await shielded(self.acknowledge())

    async def _commit_sampled(self) -> None:
        if self._sampled:
            if self._answer_turn is None:
                assert self._answer_manner is not None, "an answer was begun"
                self._answer_turn = await self.begin_turn("assistant", self._answer_manner)
                self._answer_from = self.history.position
            await self.history.commit(self._answer_turn, np.array(self._sampled, np.int32), has_room=True)
            self._sampled = []

    async def _take_back(self, error: Exception) -> None:
        """Without the token sampled last, which the model refused to read."""
        if self._unread is not None:
            if self._sampled:
                self._sampled.pop()
            else:
                await self.history.rollback(self.history.position - 1, f"the model refused a step: {error}")
                # a text that was cut is not known
                self._answer_from = self.history.position
        await self.acknowledge()

    # -- turns and snapshots

    async def begin_turn(
        self, role: str, manner: Manner, *, source: str | None = None, metadata: dict[str, object] | None = None
    ) -> int:
        """Begin a turn in the journal, and return its number."""
        turn = await self.history.begin_turn(
            role=role, source=source, metadata=metadata, created_at=time.time(), retrieval=manner.retrieval,
            span_blocks=manner.span_blocks, retained_from=manner.retained_from,
        )  # fmt: skip
        self.retained_from = manner.retained_from
        return turn

    async def in_a_new_turn(self, manner: Manner) -> Manner:
        """The manner of a turn that begins here and now: without the blocks that it drops."""
        kept = await self._retention.retained_from(self.history, self.retained_from, time.time())
        return replace(manner, retained_from=kept)

    def answer_in(self, manner: Manner) -> None:
        """What is sampled from here on is an answer, in this manner."""
        self._answer_turn, self._answer_manner = None, manner

    async def snapshot(self) -> None:
        """Offer a snapshot of this moment, unless there is one or nothing was read."""
        await self._end_answer()
        if self.reader.cache is not None and self.reader.position > self._snapshot_at:
            position = self.reader.position
            self._updater.offer_snapshot(position, *await self._model.run(self.reader.snapshot))
            self._snapshot_at = position

    @property
    def snapshot_due(self) -> bool:
        """True once the reader stands at a multiple of the stride that has no snapshot."""
        return self.reader.position >= self._next_snapshot(self._snapshot_at)

    def _next_snapshot(self, position: int) -> int:
        """Snapshots stand at the multiples of their stride, whatever calls were made; this is the next one."""
        return (position // self._snapshot_every + 1) * self._snapshot_every

    async def _after(self, result: StepResult) -> None:
        """Everything read so far is acknowledged: sealed blocks may go to disk."""
        self._updater.offer(result.sealed)
        if self.snapshot_due:
            await self.snapshot()


def _refused(error: Exception) -> MemtierError:
    """What the caller is told; the cause is named, and the kind of error kept where it is one of ours."""
    kind = type(error) if isinstance(error, MemtierError) else ModelError
    return kind(
        f"{error} The step was taken back: what was acknowledged before it is safe, and the session can be used."
    )
