"""Snapshots stand at multiples of their stride, are few, and a session opens from the newest that can be used."""

from __future__ import annotations

import threading

import pytest
import torch

from memtier.errors import StorageError
from memtier.testing import tiny_model
from memtier.tiers.state import superseded
from memtier.timeline import Timeline
from memtier_backends.layout import SessionPaths, session_folder
from memtier_backends.segment_store import FileSegmentStore

pytestmark = pytest.mark.anyio

EXACT = {"rtol": 0.0, "atol": 1e-9}
STRIDE = 64


def replayed(session) -> int:
    return session.position - session.timeline.restored_from


def snapshot_positions(store) -> list[int]:
    folder = SessionPaths(session_folder(store, "default", "a")).snapshots
    return sorted(int(path.name.partition("-")[0]) for path in folder.iterdir())


async def test_snapshots_stand_at_multiples_of_the_stride_whatever_the_calls(open_store, ids, tmp_path) -> None:
    async with open_store(snapshot_every_tokens=STRIDE) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:150])
        _ = [piece async for piece in session.generate(ids[150:180], max_new_tokens=20)]
        await session.observe(ids[200:])
        await session.flush()
        assert snapshot_positions(tmp_path / "store") == [128, 192, 256]


@pytest.mark.parametrize("cut", [3 * STRIDE - 1, 3 * STRIDE, 3 * STRIDE + 1])
async def test_a_session_left_without_a_word_replays_less_than_a_stride(open_store, ids, cut) -> None:
    async with open_store("whole") as runtime:
        whole = (await (await runtime.session("a")).observe(ids, logits=True)).logits
    async with open_store(snapshot_every_tokens=STRIDE) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:cut])
        await session.flush()
        # as a crash leaves it: nothing is written at the end
        await session.close_within(write=False)
    async with open_store(snapshot_every_tokens=STRIDE) as runtime:
        session = await runtime.session("a")
        assert session.position == cut
        assert replayed(session) == cut % STRIDE
        rest = (await session.observe(ids[cut:], logits=True)).logits
    torch.testing.assert_close(rest, whole[cut:], **EXACT)


@pytest.mark.parametrize("cut", [1, 40, 2 * STRIDE - 1, 2 * STRIDE, 2 * STRIDE + 1, 299])
async def test_a_restore_that_need_not_catch_up_is_bit_equal_in_float32(open_store, ids, cut) -> None:
    model = tiny_model()
    async with open_store("whole", model=model, snapshot_every_tokens=STRIDE) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:cut])
        state = [await session.state(layer) for layer in range(3)]
        whole = (await session.observe(ids[cut:], logits=True)).logits
    async with open_store(model=model, snapshot_every_tokens=STRIDE) as runtime:
        await (await runtime.session("a")).observe(ids[:cut])
    async with open_store(model=model, snapshot_every_tokens=STRIDE) as runtime:
        session = await runtime.session("a")
        assert replayed(session) == 0
        for layer, kept in enumerate(state):
            again = await session.state(layer)
            assert again.keys() == kept.keys()
            assert all(torch.equal(again[name], kept[name]) for name in kept), layer
        rest = (await session.observe(ids[cut:], logits=True)).logits
    assert torch.equal(rest, whole)


async def test_a_snapshot_whose_blocks_are_not_on_disk_is_not_used(open_store, ids) -> None:
    async with open_store("whole") as runtime:
        whole = (await (await runtime.session("a")).observe(ids, logits=True)).logits
    async with open_store(snapshot_every_tokens=STRIDE) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:200])
        await session.flush()
        journal = session.timeline.history.journal
        lost = journal.segments()[1]
        await session.close()
    async with open_store(snapshot_every_tokens=STRIDE) as runtime:
        session = await runtime.session("a")
        async with session.lock, session.offline() as folder:
            kept = folder.journal.snapshots()
            folder.journal.drop_after(lost.start)
            for record in kept:
                folder.journal.add_snapshot(record)
        await session.timeline.catch_up()
        assert session.timeline.restored_from <= lost.start + 20
        rest = (await session.observe(ids[200:], logits=True)).logits
    torch.testing.assert_close(rest, whole[200:], **EXACT)


async def test_a_snapshot_that_cannot_be_read_at_first_is_read_at_the_next_try(open_store, ids, monkeypatch) -> None:
    async with open_store() as runtime:
        await (await runtime.session("a")).observe(ids)
    reading, tries = FileSegmentStore.get, []

    def busy_at_first(store: FileSegmentStore, name: str, *part) -> bytes:
        if "snapshots" in str(store.folder):
            tries.append(name)
            if len(tries) == 1:
                raise StorageError("the disk is busy.")
        return reading(store, name, *part)

    monkeypatch.setattr(FileSegmentStore, "get", busy_at_first)
    async with open_store() as runtime:
        assert replayed(await runtime.session("a")) == 0
        assert len(tries) == 2 and tries[0] == tries[1]


class Progress:
    """What was told of reading again."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int | None]] = []

    def __call__(self, done: int, total: int | None) -> None:
        assert threading.current_thread() is threading.main_thread(), "where the event loop runs"
        self.told.append((done, total))

    def is_of(self, total: int) -> bool:
        """True if the numbers ascend and end at `total`."""
        done = [one for one, _ in self.told]
        totals = {end for _, end in self.told}
        return done == sorted(set(done)) and done[-1] == total and totals == {total}


async def test_progress_is_told_of_tokens_that_are_read_again(open_store, ids, tmp_path, monkeypatch, caplog) -> None:
    caplog.set_level("INFO", "memtier")
    async with open_store(snapshot_every_tokens=STRIDE) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:200])
        await session.checkpoint("kept")
        await session.export(tmp_path / "a.memtier")
        await session.observe(ids[200:])
        await session.flush()
        await session.close_within(write=False)
    monkeypatch.setattr("memtier.replay.TOLD_TOKENS", 100)
    async with open_store(snapshot_every_tokens=STRIDE) as runtime:
        opened, asked_again, restored, imported = Progress(), Progress(), Progress(), Progress()
        session = await runtime.session("a", on_progress=opened)
        assert opened.is_of(300 - 256)
        assert "tokens again" not in caplog.text
        await runtime.session("a", on_progress=asked_again)
        assert not asked_again.told

        async def damaged(*_) -> bool:
            return False

        monkeypatch.setattr(Timeline, "_load", damaged)
        await session.restore("kept", on_progress=restored)
        assert restored.is_of(200)
        assert "session 'a': reading 200 tokens again, from token 0 on" in caplog.text
        await runtime.import_session(tmp_path / "a.memtier", "b", on_progress=imported)
        assert imported.is_of(200)
        forgotten = Progress()
        report = await session.forget(start=10, end=50, on_progress=forgotten)
        assert forgotten.is_of(report.replayed_tokens) and report.replayed_tokens == 160


async def test_no_segment_reaches_over_a_snapshot(open_store, ids) -> None:
    async with open_store(snapshot_every_tokens=STRIDE) as runtime:
        session = await runtime.session("a")
        await session.observe(ids)
        await session.flush()
        journal = session.timeline.history.journal
        for snapshot in journal.snapshots():
            for segment in journal.segments():
                assert not segment.first_block < snapshot.blocks < segment.end_block


def test_snapshots_thin_out_with_their_distance() -> None:
    kept: list[int] = []
    for position in range(1, 1001):
        kept.append(position)
        gone = superseded(kept)
        kept = [p for p in kept if p not in gone]
        assert kept[-2:] == ([position - 1, position] if position > 1 else [1])
        for back in range(1, position):
            older = max((p for p in kept if p <= back), default=0)
            assert position - older <= 2 * (position - back) + 2
    assert len(kept) <= 16
