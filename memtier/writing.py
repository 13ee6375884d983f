"""What a session writes, each piece in the order that a crash relies on: a file first, then its record in the journal,
then whatever stands on it. A file that a record no longer names goes last.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import anyio
import numpy as np

from memtier.folder import SessionFolder
from memtier.history import History
from memtier.text import TextCodec
from memtier.threads import WorkerThread
from memtier.tiers.state import superseded
from memtier.tiers.storage import StorageTier
from memtier_backends.base import MemoryIndex
from memtier_backends.folder_seal import FolderSeal
from memtier_backends.merging import merged
from memtier_backends.records import IndexRow, SegmentManifest, SnapshotRecord
from memtier_backends.segments import pack_segment, read_innovation, read_landmarks
from memtier_backends.tensors import content_hash

__all__ = ["Snapshot", "Writer"]

log = logging.getLogger("memtier")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A moment of a session, on its way to the disk. `blocks` and `first_block`: see `SnapshotRecord`."""

    position: int
    blocks: int
    first_block: int
    data: bytes


class Writer:
    """The files, records and rows of one session.

    Args:
        name: the session's id, for messages.
        folder: its stores and journal.
        history: its journal, as a task may ask it.
        storage: its blocks.
        codec: makes the text of index rows.
        io: the thread that packs and writes files.
        indexed: blocks that are in the index.
    """

    def __init__(
        self, name: str, folder: SessionFolder, history: History, storage: StorageTier, codec: TextCodec,
        io: WorkerThread, *, indexed: int,
    ) -> None:  # fmt: skip
        self._name = name
        self._folder = folder
        self._history = history
        self._storage = storage
        self._codec = codec
        self._io = io
        self._index: MemoryIndex | None = None
        self._seal = FolderSeal(folder.paths.index)
        self._index_lock = anyio.Lock()
        self._indexed = indexed

    @property
    def indexed(self) -> int:
        """Blocks that are in the index, or were dropped."""
        return max(self._indexed, self._storage.first_block)

    async def index(self) -> MemoryIndex:
        """The session's index, opened when first asked for; one that is not as it was written is made again."""
        async with self._index_lock:
            if self._index is None:
                self._index = await self._opened_index()
            return self._index

    async def _opened_index(self) -> MemoryIndex:
        folder, storage = self._folder, self._storage
        if await self._io.run(self._seal.read) != await self._history.call(lambda: folder.journal.index_seal):
            # damaged, or written to by whoever died before the journal could say so
            if self._indexed:
                log.warning("session %r: the index is not as it was written; it is made again", self._name)
            await self._history.call(folder.drop_index)
            self._indexed = 0
        index = await folder.backends.index(folder.paths.index, [storage.channels] * len(storage.layers))
        first = storage.first_block
        if await index.count(first) < self.indexed - first:
            log.warning("session %r: the index has lost rows and is made again from the segments", self._name)
            await self._mark_indexed(0)
        elif await index.count(self._indexed):
            # rows of blocks that the journal has let go since; others may come in their place
            await index.drop_from(self._indexed)
            await self._mark_indexed(self._indexed)
        return index

    async def _mark_indexed(self, blocks: int) -> None:
        seal = await self._io.run(self._seal.read)
        mark = partial(self._folder.journal.set_indexed_through, blocks, seal=seal)
        await self._history.call(mark)
        self._indexed = blocks

    async def close(self) -> None:
        """Close the index."""
        if self._index is not None:
            await self._index.close()

    async def segment(self, end: int) -> None:
        """Write the blocks that are not on disk, up to block `end`, as one segment."""

        def write() -> SegmentManifest:
            data, manifest = pack_segment(self._storage.payloads(self._storage.durable_blocks, end))
            self._folder.segments.put(manifest.name, data)
            return manifest

        manifest = await self._io.run(write)
        await self._history.call(self._folder.journal.add_segment, manifest)
        self._storage.on_disk(manifest)

    async def merge(self, neighbours: list[SegmentManifest]) -> None:
        """Write one segment for several."""

        def write() -> SegmentManifest:
            data, manifest = merged(self._folder.segments, neighbours)
            self._folder.segments.put(manifest.name, data)
            return manifest

        # there must be room for both
        await self._history.call(self._history.check_room)
        manifest = await self._io.run(write)
        await self._history.call(self._folder.journal.merge_segments, manifest)
        self._storage.merged(manifest)
        await self._delete([m.name for m in neighbours])

    async def rows(self) -> None:
        """Send the rows of the oldest segment that is not in the index."""
        # opened first: an index that was not as it was written begins anew
        index = await self.index()
        manifest = next(m for m in self._storage.segments() if m.end_block > self.indexed)
        await index.add(await self._rows(manifest))
        await self._mark_indexed(manifest.end_block)

    async def snapshot(self, snapshot: Snapshot) -> None:
        """Keep a snapshot, and let go of older ones, and of blocks that nobody can ask for any more."""
        digest = content_hash(snapshot.data)
        name = f"{snapshot.position:012d}-{digest[:16]}.safetensors"
        await self._io.run(self._folder.snapshots.put, name, snapshot.data)
        record = SnapshotRecord(
            snapshot.position, name, len(snapshot.data), digest, snapshot.blocks, snapshot.first_block
        )
        gone, first_block = await self._history.call(self._add_snapshot, record)
        if first_block > self._storage.first_block:
            self._storage.drop_before(first_block)
            if self._index is not None:
                await self._index.drop_before(first_block)
                await self._mark_indexed(self._indexed)
        await self._delete(gone)

    async def start_over(self) -> None:
        """Let go of all that is derived: it is made again from the journal, from the first token on."""
        journal = self._folder.journal
        await self._history.call(journal.drop_after, 0)
        await self._io.run(self._storage.load, ())
        self._indexed = 0

    def _add_snapshot(self, record: SnapshotRecord) -> tuple[list[str], int]:
        journal = self._folder.journal
        journal.add_snapshot(record)
        known = journal.snapshots()
        gone = superseded([kept.position for kept in known])
        old = [kept.name for kept in known if kept.position in gone]
        for name in old:
            journal.drop_snapshot(name)
        return old + journal.drop_before(record.first_block), journal.first_block

    async def _delete(self, names: list[str]) -> None:
        for name in names:
            await self._io.run(self._folder.delete, name)

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
