"""The write side of a session: sealed blocks become a segment, a manifest, index rows, a mark; then snapshots.

The order is what a crash relies on: a segment is named by the journal only once it is safe, the index is filled only
from what is in segments, and a snapshot is kept only once every block sealed before it is.

Blocks wait in the storage tier's memory and are counted here. A step is let in while fewer than `inbox_blocks` wait, so
at most that many, and one step's more, ever do. A failure that outlasts a few tries is kept, raised by the session's
next call, and then tried again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import numpy as np

from memtier.errors import MemtierError, StorageError
from memtier.folder import SessionFolder
from memtier.history import History
from memtier.text import TextCodec
from memtier.threads import WorkerThread
from memtier.tiers.retry import RETRY_AFTER_SECONDS, is_transient
from memtier.tiers.state import superseded
from memtier.tiers.storage import StorageTier
from memtier_backends.base import IndexRow, MemoryIndex, SegmentManifest, SnapshotRecord
from memtier_backends.segments import content_hash, pack_segment, read_innovation, read_landmarks

__all__ = ["Updater"]

log = logging.getLogger("memtier")

SEGMENT_BLOCKS = 64
"""Blocks that are written together unless someone waits for them."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    position: int
    blocks: int  # sealed by then; all must be in manifests before the snapshot is kept
    data: bytes


class Updater:
    """Writes what one session sealed.

    Args:
        name: the session's id, for messages.
        folder: its stores and journal.
        history: its journal, as a task may ask it.
        storage: its blocks.
        codec: makes the text of index rows.
        io: the thread that packs and writes files.
        inbox_blocks: blocks that may wait before the session does.
        indexed: blocks that are in the index.
    """

    def __init__(
        self, name: str, folder: SessionFolder, history: History, storage: StorageTier, codec: TextCodec,
        io: WorkerThread, *, inbox_blocks: int, indexed: int,
    ) -> None:  # fmt: skip
        self._name = name
        self._folder = folder
        self._history = history
        self._storage = storage
        self._codec = codec
        self._io = io
        self._inbox_blocks = inbox_blocks
        self._batch = min(SEGMENT_BLOCKS, inbox_blocks)
        self._sealed = storage.durable_blocks
        self._index: MemoryIndex | None = None
        self._index_lock = anyio.Lock()
        self._snapshot: _Snapshot | None = None
        self._urgent = self._stopping = False
        self._error: Exception | None = None
        self._trying_again = False
        self._changed = anyio.Event()
        self.indexed = indexed
        self.snapshots = 0
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
    def failure(self) -> str | None:
        """What keeps the updater from writing, if anything does."""
        return None if self._error is None else str(self._error)

    def offer(self, sealed: list[int] | tuple[int, ...] | Any) -> None:
        """Blocks were sealed and their tokens acknowledged; they wait from now on."""
        if sealed:
            self._sealed = max(self._sealed, sealed[-1] + 1)
            self._notify()

    def offer_snapshot(self, position: int, data: bytes) -> None:
        """Keep a snapshot once all that was sealed before it is on disk; an older one that still waits is let go."""
        self._snapshot = _Snapshot(position, self._sealed, data)
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
        while self._todo(everything=True):
            if self._error is not None:
                self._raise()
            self._urgent = True
            self._notify()
            await self._changed.wait()

    async def index(self) -> MemoryIndex:
        """The session's index, opened when first asked for."""
        async with self._index_lock:
            if self._index is None:
                sizes = [self._storage.block_shape[2] * self._storage.block_shape[3]] * len(self._storage.layers)
                index = await self._folder.backends.index(self._folder.paths.index, sizes)
                if await index.count() < self.indexed:
                    log.warning("session %r: the index has lost rows and is made again from the segments", self._name)
                    await self._history.call(self._folder.journal.set_indexed_through, 0)
                    self.indexed = 0
                self._index = index
            return self._index

    def stop(self) -> None:
        """Let `run` return after the write it is at; what waits is made again from the journal at the next open."""
        self._stopping = True
        self._notify()

    async def close(self) -> None:
        """Close the index. `run` has returned."""
        if self._index is not None:
            await self._index.close()

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
                    if work is None:
                        self._urgent = self._urgent and self._error is not None
                        await self._changed.wait()
                    else:
                        await self._attempt(work)
        finally:
            done.set()

    def _todo(self, *, everything: bool) -> Callable[[], Awaitable[None]] | None:
        """The next write, in the order that a crash relies on."""
        snapshot = self._snapshot
        if self.pending >= self._batch or (self.pending and (everything or snapshot is not None)):
            return self._write_segment
        if self.indexed < self._storage.durable_blocks:
            return self._write_rows
        if snapshot is not None and snapshot.blocks <= self._storage.durable_blocks:
            return self._write_snapshot
        return None

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

    # -- the writes

    async def _write_segment(self) -> None:
        first = self._storage.durable_blocks
        end = min(self._sealed, first + SEGMENT_BLOCKS)
        if self._snapshot is not None and self._snapshot.blocks > first:
            # no segment reaches over a snapshot, so that forgetting drops files and never rewrites one
            end = min(end, self._snapshot.blocks)

        def write() -> SegmentManifest:
            data, manifest = pack_segment(self._storage.payloads(first, end))
            self._folder.segments.put(manifest.name, data)
            return manifest

        manifest = await self._io.run(write)
        await self._history.call(self._add_segment, manifest)
        self._storage.on_disk(manifest)

    def _add_segment(self, manifest: SegmentManifest) -> None:
        # a record whose answer was lost must not be sent twice
        known = self._folder.journal.segments()
        if not known or known[-1].name != manifest.name:
            self._folder.journal.add_segment(manifest)

    async def _write_rows(self) -> None:
        manifest = next(m for m in self._storage.segments() if m.end_block > self.indexed)
        rows = await self._rows(manifest)
        index = await self.index()
        await index.add(rows)
        await self._history.call(self._folder.journal.set_indexed_through, manifest.end_block)
        self.indexed = manifest.end_block

    async def _rows(self, manifest: SegmentManifest) -> list[IndexRow]:
        """Rows of a segment's blocks. Their texts reach a block further to both sides, so that words are whole."""
        size = self._storage.settings.span_block_tokens
        origin = max(0, manifest.start - size)
        tokens = await self._history.tokens(origin, min(manifest.end + size, self._history.position))
        turns = await self._history.turns(manifest.start, manifest.end)

        def build() -> list[IndexRow]:
            store, channels = self._storage.store, self._storage.channels
            landmarks = [read_landmarks(store, manifest, layer) for layer in self._storage.layers.values()]
            innovation = read_innovation(store, manifest)
            rows = []
            for i in range(manifest.blocks):
                start = manifest.start + i * size
                text = self._codec.decode(tokens[max(0, start - size - origin) : start + 2 * size - origin])
                surprise = float(np.mean(innovation[i]))
                created_at = next(turn.created_at for turn in turns if turn.end > start)
                rows.append(
                    IndexRow(
                        block=manifest.first_block + i,
                        start=start,
                        end=start + size,
                        text=text,
                        created_at=created_at,
                        innovation=None if np.isnan(surprise) else surprise,
                        # the index has one vector a layer: the mean of a landmark's keys
                        landmarks=tuple(layer[i].reshape(-1, channels).mean(0) for layer in landmarks),
                    )
                )
            return rows

        return await self._io.run(build)

    async def _write_snapshot(self) -> None:
        snapshot = self._snapshot
        assert snapshot is not None
        digest = content_hash(snapshot.data)
        name = f"{snapshot.position:012d}-{digest[:16]}.safetensors"
        await self._io.run(self._folder.snapshots.put, name, snapshot.data)
        record = SnapshotRecord(snapshot.position, name, len(snapshot.data), digest, snapshot.blocks)
        old = await self._history.call(self._add_snapshot, record)
        for stale in old:
            await self._io.run(self._folder.snapshots.delete, stale)
        if self._snapshot is snapshot:
            self._snapshot = None
        self.snapshots += 1

    def _add_snapshot(self, record: SnapshotRecord) -> list[str]:
        journal = self._folder.journal
        journal.add_snapshot(record)
        known = journal.snapshots()
        gone = superseded([kept.position for kept in known])
        old = [kept.name for kept in known if kept.position in gone]
        for name in old:
            journal.drop_snapshot(name)
        return old
