"""The write side of a session: sealed blocks become a segment, a manifest, index rows, a mark; then snapshots.

The order is what a crash relies on: a segment is named by the journal only once it is safe, the index is filled only
from what is in segments, and a snapshot is kept only once every block sealed before it is. When nothing else waits,
small segments are merged.

Blocks wait in the storage tier's memory and are counted here. A step is let in while fewer than `inbox_blocks` wait, so
at most that many, and one step's more, ever do. A failure that outlasts a few tries is kept, raised by the session's
next call, and then tried again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel

from memtier.errors import MemtierError, StorageError
from memtier.tiers.retry import RETRY_AFTER_SECONDS, is_transient
from memtier.tiers.storage import StorageTier
from memtier.writing import Snapshot, Writer
from memtier_backends.base import MemoryIndex
from memtier_backends.merging import next_merge
from memtier_backends.records import SegmentManifest, SnapshotRecord

__all__ = ["Updater"]

log = logging.getLogger("memtier")

SEGMENT_BLOCKS = 64
"""Blocks that are written together unless someone waits for them."""
MERGE_SEGMENTS = 8
"""So many smaller ones become one."""


class Updater:
    """Writes what one session sealed.

    Args:
        name: the session's id, for messages.
        writer: writes each piece.
        storage: its blocks.
        snapshots: its snapshots, asked of the journal.
        inbox_blocks: blocks that may wait before the session does.
    """

    def __init__(
        self, name: str, writer: Writer, storage: StorageTier,
        snapshots: Callable[[], Awaitable[list[SnapshotRecord]]], *, inbox_blocks: int,
    ) -> None:  # fmt: skip
        self._name = name
        self._writer = writer
        self._storage = storage
        self._kept_snapshots = snapshots
        self._inbox_blocks = inbox_blocks
        self._batch = min(SEGMENT_BLOCKS, inbox_blocks)
        self._sealed = storage.durable_blocks
        self._snapshot: Snapshot | None = None
        self._urgent = self._stopping = self._starting_over = False
        self._may_merge = True
        self._left_alone: set[int] = set()  # where damaged segments begin and end
        self._error: Exception | None = None
        self._trying_again = False
        self._changed = anyio.Event()
        self.snapshots = 0
        self.merges = 0
        self.waited_seconds = 0.0
        self.error_was_told = False

    # -- the session's side

    @property
    def pending(self) -> int:
        """Blocks that wait for the disk."""
        return self._sealed - self._storage.durable_blocks

    @property
    def durable_blocks(self) -> int:
        """Blocks in segments that the journal names."""
        return self._storage.durable_blocks

    @property
    def first_block(self) -> int:
        """Segments begin with this block: older ones were dropped."""
        return self._storage.first_block

    @property
    def indexed(self) -> int:
        """Blocks that are in the index."""
        return self._writer.indexed

    @property
    def failure(self) -> str | None:
        """What keeps the updater from writing, if anything does."""
        return None if self._error is None else str(self._error)

    def offer(self, sealed: list[int] | tuple[int, ...] | Any) -> None:
        """Blocks were sealed and their tokens acknowledged; they wait from now on."""
        if sealed:
            self._sealed = max(self._sealed, sealed[-1] + 1)
            self._notify()

    def offer_snapshot(self, position: int, data: bytes, first_block: int) -> None:
        """Keep a snapshot once all that was sealed before it is on disk; an older one that still waits is let go.

        Args:
            first_block: the oldest block that whoever goes on from it may need.
        """
        self._snapshot = Snapshot(position, self._sealed, first_block, data)
        self._notify()

    async def ready(self) -> None:
        """Return once a step may seal more blocks: too few wait, and no snapshot does. Cancellation acts here.

        Raises:
            StorageError: writing failed; it is tried again after this.
        """
        # a step is shielded, so this is where a cancelled call stops
        await anyio.lowlevel.checkpoint()
        while True:
            if self._error is not None:
                self._raise()
            if not self._trying_again and self.pending < self._inbox_blocks and self._snapshot is None:
                return
            began = time.perf_counter()
            await self._changed.wait()
            self.waited_seconds += time.perf_counter() - began

    async def flush(self) -> None:
        """Return once every offered block is in a segment and in the index, and the offered snapshot is kept.

        Raises:
            StorageError: writing failed; it is tried again after this.
        """
        await self._until(lambda: self._todo(everything=True) is None)

    async def rest(self) -> None:
        """As `flush`, and return only once no segments are left to be merged; or once it was stopped."""
        await self._until(lambda: self._stopping or (self._todo(everything=True) is None and not self._may_merge))

    async def _until(self, finished: Callable[[], bool]) -> None:
        while not finished():
            if self._error is not None:
                self._raise()
            self._urgent = True
            self._notify()
            await self._changed.wait()

    async def start_over(self) -> None:
        """Let go of all that is derived from the journal, on disk and in memory. Nothing is being read.

        Raises:
            StorageError: it could not be written down; it is tried again after this.
        """
        self._starting_over = True
        await self.flush()

    async def index(self) -> MemoryIndex:
        """The session's index, opened when first asked for."""
        return await self._writer.index()

    def stop(self) -> None:
        """Let `run` return after the write it is at; what waits is made again from the journal at the next open."""
        self._stopping = True
        self._notify()

    async def close(self) -> None:
        """Close the index. `run` has returned."""
        await self._writer.close()

    # -- the task

    async def run(self, *, task_status: anyio.abc.TaskStatus[anyio.Event]) -> None:
        """Write until stopped. Gives its starter an event that is set on return.

        Shielded: a write once begun is finished, and closing is the session's business.
        """
        done = anyio.Event()
        task_status.started(done)
        try:
            with anyio.CancelScope(shield=True):
                while not self._stopping:
                    work = self._todo(everything=self._urgent) if self._error is None else None
                    if work is not None:
                        await self._attempt(work)
                    elif self._may_merge and self._error is None:
                        await self._merge()
                    else:
                        self._urgent = self._urgent and self._error is not None
                        await self._changed.wait()
        finally:
            done.set()

    def _todo(self, *, everything: bool) -> Callable[[], Awaitable[None]] | None:
        """The next write, in the order that a crash relies on."""
        snapshot = self._snapshot
        if self._starting_over:
            return self._start_over
        if self.pending >= self._batch or (self.pending and (everything or snapshot is not None)):
            return self._write_segment
        if self.indexed < self._storage.durable_blocks:
            return self._writer.rows
        if snapshot is not None and snapshot.blocks <= self._storage.durable_blocks:
            return self._write_snapshot
        return None

    async def _write_segment(self) -> None:
        first = self._storage.durable_blocks
        end = min(self._sealed, first + SEGMENT_BLOCKS)
        if self._snapshot is not None and self._snapshot.blocks > first:
            # no segment reaches over a snapshot, so that forgetting drops files and never rewrites one
            end = min(end, self._snapshot.blocks)
        await self._writer.segment(end)
        self._may_merge = True

    async def _write_snapshot(self) -> None:
        snapshot = self._snapshot
        assert snapshot is not None
        await self._writer.snapshot(snapshot)
        if self._snapshot is snapshot:
            self._snapshot = None
        self.snapshots += 1
        self._may_merge = True

    async def _start_over(self) -> None:
        await self._writer.start_over()
        self._sealed, self._snapshot, self._starting_over = 0, None, False

    async def _merge(self) -> None:
        """One merge, if there is one to make. What cannot be merged stays as it is: only files are saved by it."""
        neighbours: list[SegmentManifest] = []
        merged = False
        try:
            cuts = {record.blocks for record in await self._kept_snapshots()} | self._left_alone
            if self._snapshot is not None:
                cuts.add(self._snapshot.blocks)
            neighbours = next_merge(self._storage.segments(), cuts, most_blocks=SEGMENT_BLOCKS, patience=MERGE_SEGMENTS)
            if neighbours:
                await self._writer.merge(neighbours)
                self.merges += 1
                merged = True
        except Exception as error:  # noqa: BLE001  only files are saved by it: what stops a merge stops nothing else
            log.warning("session %r: small segments were not merged: %s", self._name, error)
            if not is_transient(error):
                self._left_alone |= {block for m in neighbours for block in (m.first_block, m.end_block)}
                merged = bool(neighbours)
        self._may_merge = merged  # then there may be another one
        self._notify()

    async def _attempt(self, work: Callable[[], Awaitable[None]]) -> None:
        for wait in (*RETRY_AFTER_SECONDS, None):
            try:
                await work()
            except Exception as error:  # noqa: BLE001  kept, and raised by the session's next call
                if wait is None or self._stopping or not is_transient(error):
                    log.error("session %r: a background write failed: %s", self._name, error)
                    self._error, self.error_was_told = error, False
                    break
                log.warning("session %r: a write failed and is tried again in %s s: %s", self._name, wait, error)
                self._trying_again = True
                await anyio.sleep(wait)
            else:
                self.error_was_told = False
                break
        self._trying_again = False
        self._notify()

    def _raise(self) -> None:
        error, self._error = self._error, None
        assert error is not None
        self.error_was_told = True
        self._notify()
        kind = type(error) if isinstance(error, MemtierError) else StorageError
        raise kind(
            f"session {self._name!r}: writing memory failed: {error} Nothing acknowledged is lost: {self.pending} "
            f"blocks wait in memory, and the journal holds their tokens. It is tried again now."
        ) from error

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
