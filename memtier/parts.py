"""What a session is made of while it is open, put together and taken apart by what all sessions of a runtime share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import anyio.abc

from memtier.batching import DecodeBatcher
from memtier.blocks import MemorySettings
from memtier.config import MemoryConfig
from memtier.errors import StorageError, StorageFullError
from memtier.folder import Backends, SessionFolder
from memtier.history import History
from memtier.reader import Reader
from memtier.recovery.forget import resume
from memtier.retention import Retention
from memtier.threads import WorkerThread, shielded
from memtier.tiers.device_pool import DevicePool
from memtier.tiers.landmarks import Held
from memtier.tiers.retry import is_transient, retry
from memtier.tiers.storage import StorageTier
from memtier.tiers.weights import WeightsTier
from memtier.timeline import Timeline
from memtier.updater import Updater
from memtier.views import Views
from memtier.writing import Writer
from memtier_backends.layout import session_folders
from memtier_backends.records import SegmentManifest
from memtier_backends.space import Space

__all__ = ["Parts", "Shared"]

log = logging.getLogger("memtier")

OPENING_BYTES = 2**20  # SQLite writes far less to open a journal


@dataclass(frozen=True, slots=True)
class Parts:
    """One open session: its tokens, its blocks, the task that writes them, and its thread for files."""

    timeline: Timeline
    storage: StorageTier
    updater: Updater
    views: Views
    io: WorkerThread
    updater_done: anyio.Event


@dataclass(frozen=True, slots=True)
class Shared:
    """What the sessions of a runtime share.

    Args:
        store, tenant: whose sessions.
        space: on the store's disk.
        model: the thread that owns every tensor.
        journal: the thread that owns every journal.
        tasks: where updaters run.
    """

    store: Path
    tenant: str
    config: MemoryConfig
    settings: MemorySettings
    weights: WeightsTier
    pool: DevicePool | None
    batcher: DecodeBatcher
    backends: Backends
    space: Space
    model: WorkerThread
    journal: WorkerThread
    tasks: anyio.abc.TaskGroup

    async def open_folder(self, session_id: str, folder: Path) -> SessionFolder:
        """Take the lock of a session, check whose it is, and go on with a forget that was cut off.

        Raises as `SessionFolder.open`; SessionBusyError also where that forget concerns a fork that is open elsewhere.
        """
        try:
            return await self._open_folder(session_id, folder)
        except StorageError as error:
            # to open takes room, too, if only to read: what was set aside for what must still work
            if not await self.journal.run(self._is_full, error) or not await self.journal.run(self.space.release):
                raise
        try:
            return await self._open_folder(session_id, folder)
        finally:
            with anyio.CancelScope(shield=True):
                await self._fill_reserve()

    def _is_full(self, error: StorageError) -> bool:
        # where SQLite finds no room for its shared memory it speaks of a disk I/O error
        full = is_transient(error) and self.space.free_bytes < OPENING_BYTES
        return full or isinstance(error, StorageFullError)

    async def _fill_reserve(self) -> None:
        try:
            await self.journal.run(self.space.fill)
        except StorageError as error:
            log.warning("nothing was set aside again: %s", error)

    async def _open_folder(self, session_id: str, folder: Path) -> SessionFolder:
        identity = {"id": session_id, "tenant": self.tenant}
        opening = partial(
            SessionFolder.open, folder, self.backends, identity=identity, weights=self.weights, settings=self.settings
        )
        opened = await retry(lambda: self.journal.run(opening), f"opening session {session_id!r}")
        try:
            if await self.journal.run(resume, opened, session_folders(self.store, self.tenant)):
                log.info("session %r: a forget that had been cut off is done", session_id)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.journal.run(opened.close)
            raise
        return opened

    async def assemble(self, session_id: str, opened: SessionFolder, landmarks: Sequence[Held] | None = None) -> Parts:
        """A session's parts, not yet caught up with its journal.

        Args:
            landmarks: of the session that this one is a fork of; None to read them.

        Raises:
            StorageError: what is on disk cannot be read.
        """
        io = WorkerThread("memtier-files")
        try:
            return await self._assemble(io, session_id, opened, landmarks)
        except BaseException:
            io.close()
            raise

    async def take_apart(self, parts: Parts) -> None:
        """Stop writing and let go of everything; what waits is made again from the journal. Not to be cancelled."""
        parts.updater.stop()
        await parts.updater_done.wait()
        try:
            await parts.updater.close()
        finally:
            await self.model.run(parts.timeline.reader.drop)
            parts.io.close()

    async def _assemble(
        self, io: WorkerThread, session_id: str, opened: SessionFolder, landmarks: Sequence[Held] | None
    ) -> Parts:
        config, settings, model = self.config, self.settings, self.weights.config
        storage = StorageTier(
            settings, model.num_key_value_heads, model.head_dim, opened.segments, hot_bytes=config.hot_bytes,
            landmark_bytes=config.landmark_bytes,
        )  # fmt: skip
        marks = await self.journal.run(_read_marks, opened)
        await io.run(storage.load, marks.manifests, marks.first_block, landmarks)
        history = History(opened.journal, self.journal, marks.position, self.space.check)
        writer = Writer(session_id, opened, history, storage, self.weights.codec, io, indexed=marks.indexed)
        snapshots = partial(history.call, opened.journal.snapshots)
        updater = Updater(session_id, writer, storage, snapshots, inbox_blocks=config.inbox_blocks)
        retention = Retention(config, settings.span_block_tokens, storage.bytes_a_block)
        timeline = Timeline(
            session_id, history, Reader(self.weights, settings, storage, self.pool), updater, self.model, self.batcher,
            io, opened.snapshots, config.snapshot_every_tokens, retention, marks.retained_from,
            None if self.weights.codec.tokenizer is None else self.weights.codec.decode,
        )  # fmt: skip
        views = Views(
            session_id, self.weights, timeline, storage, updater, model=self.model, io=io, journal=self.journal
        )
        # a cancel between its start and its word would wait for a task that nobody has told to stop
        done = await shielded(self.tasks.start(updater.run))
        return Parts(timeline, storage, updater, views, io, done)


@dataclass(frozen=True, slots=True)
class _Marks:
    """Where a session stands, as its journal says."""

    position: int
    manifests: list[SegmentManifest]
    first_block: int
    indexed: int
    retained_from: int


def _read_marks(opened: SessionFolder) -> _Marks:
    journal = opened.journal
    newest = journal.turns(journal.position - 1) if journal.position else []
    retained_from = newest[-1].retained_from if newest else 0
    return _Marks(journal.position, journal.segments(), journal.first_block, journal.indexed_through, retained_from)
