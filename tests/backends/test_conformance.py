"""Every shipped adapter passes its suite, bare and inside a fault wrapper without faults."""

from pathlib import Path

from memtier_backends.base import Journal, MemoryIndex, SegmentStore
from memtier_backends.index_lance import LanceIndex
from memtier_backends.index_memory import MemoryIndexAdapter
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.segment_store import FileSegmentStore
from memtier_backends.testing import (
    Faults,
    FaultyIndex,
    FaultyJournal,
    FaultySegmentStore,
    IndexSuite,
    JournalSuite,
    SegmentStoreSuite,
)


class TestSqliteJournal(JournalSuite):
    def open(self, path: Path) -> Journal:
        return SqliteJournal.open(path)


class TestFaultyJournalWithoutFaults(JournalSuite):
    def open(self, path: Path) -> Journal:
        return FaultyJournal(SqliteJournal.open(path), Faults())


class TestFileSegmentStore(SegmentStoreSuite):
    def open(self, folder: Path) -> SegmentStore:
        return FileSegmentStore(folder)


class TestFaultySegmentStoreWithoutFaults(SegmentStoreSuite):
    def open(self, folder: Path) -> SegmentStore:
        return FaultySegmentStore(FileSegmentStore(folder), Faults())


class TestLanceIndex(IndexSuite):
    async def open(self, folder: Path) -> MemoryIndex:
        return await LanceIndex.open(folder, self.layers)


class TestLanceIndexThatCompactsAtEveryAdd(IndexSuite):
    async def open(self, folder: Path) -> MemoryIndex:
        return await LanceIndex.open(folder, self.layers, compact_every_adds=1)


class TestMemoryIndexAdapter(IndexSuite):
    durable = False

    async def open(self, folder: Path) -> MemoryIndex:
        return MemoryIndexAdapter(self.layers)


class TestFaultyIndexWithoutFaults(IndexSuite):
    durable = False

    async def open(self, folder: Path) -> MemoryIndex:
        return FaultyIndex(MemoryIndexAdapter(self.layers), Faults())
