"""The fault wrappers do what they say, and count writes over the whole store."""

from pathlib import Path

import pytest

from memtier.errors import StorageError, StorageFullError
from memtier_backends.faults import Faults, FaultyIndex, FaultyJournal, FaultySegmentStore
from memtier_backends.index_memory import MemoryIndexAdapter
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.segment_store import FileSegmentStore
from memtier_backends.testing import begin_turn, make_rows

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_writes_are_counted_and_calls_logged_in_one_order(tmp_path: Path) -> None:
    faults = Faults()
    journal = FaultyJournal(SqliteJournal.open(tmp_path / "journal"), faults)
    store = FaultySegmentStore(FileSegmentStore(tmp_path / "segments"), faults)
    snapshots = FaultySegmentStore(FileSegmentStore(tmp_path / "snapshots"), faults, name="snapshots")
    index = FaultyIndex(MemoryIndexAdapter((4,)), faults)
    journal.commit(begin_turn(journal), [1])
    store.put("a", b"1")
    snapshots.put("b", b"2")
    await index.add(make_rows(["plum"]))
    await index.search_text("plum", 1)
    assert store.list() == ["a"]
    assert faults.writes == 5
    assert faults.calls == [
        *("journal.begin_turn", "journal.commit", "segments.put", "snapshots.put"),
        *("index.add", "index.search_text", "segments.list"),
    ]
    journal.close()


async def test_a_write_fails_n_times_and_then_recovers() -> None:
    index = FaultyIndex(MemoryIndexAdapter((4,)), Faults(fail_times=2))
    for _ in range(2):
        with pytest.raises(StorageError, match=r"index\.add was made to fail"):
            await index.add(make_rows(["plum"]))
        assert await index.count() == 0
    await index.add(make_rows(["plum"]))
    assert await index.count() == 1


async def test_a_chosen_operation_fails_always_and_others_do_not(tmp_path: Path) -> None:
    faults = Faults(fail_always=True, operations=frozenset({"segments.put"}), error=StorageFullError)
    store = FaultySegmentStore(FileSegmentStore(tmp_path), faults)
    for _ in range(3):
        with pytest.raises(StorageFullError):
            store.put("a", b"1")
    store.delete("a")
    assert store.list() == []
    faults.fail_always = False
    store.put("a", b"1")
    assert store.list() == ["a"]


async def test_latency_delays_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    faults = Faults(latency_seconds=3.5, operations=frozenset({"segments.get"}))
    store = FaultySegmentStore(FileSegmentStore(tmp_path), faults)
    store.put("a", b"1")
    assert slept == []
    assert store.get("a") == b"1"
    assert slept == [3.5]
