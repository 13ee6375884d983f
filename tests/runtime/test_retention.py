"""What retention drops is no longer retrieved or recalled, is journaled, survives everything, and is not erased."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from memtier.errors import SessionError
from memtier.retention import Retention
from memtier.tiers.storage import StorageTier
from memtier_backends.layout import SessionPaths, session_folder

pytestmark = pytest.mark.anyio

EXACT = {"rtol": 0.0, "atol": 1e-9}
STRIDE = 64


def paths_of(tmp_path, name: str = "a", store: str = "store") -> SessionPaths:
    return SessionPaths(session_folder(tmp_path / store, "default", name))


async def in_pieces(session, ids, size: int = 50) -> None:
    for at in range(0, len(ids), size):
        await session.observe(ids[at : at + size])


async def outputs(session, ids) -> torch.Tensor:
    return (await session.observe(ids, logits=True)).logits


def retrieved(report) -> set[int]:
    return {block.block_id for layer in report.storage.last_selection for block in layer.blocks}


@pytest.mark.parametrize("mode", ["on", "recent", "random"])
async def test_blocks_further_back_are_not_retrieved(open_store, ids, mode) -> None:
    async with open_store(retain_tokens=80, retrieval=mode, snapshot_every_tokens=STRIDE) as runtime:
        session = await runtime.session("a")
        await in_pieces(session, ids)
        # the last turn began at 250: tokens before 170, and so blocks of 4 tokens before 42, were dropped
        report = await session.inspect()
        assert report.storage.dropped_blocks == session.stats().dropped_blocks == 42
        assert retrieved(report) and min(retrieved(report)) >= 42
        with pytest.raises(SessionError, match="was dropped"):
            await session.block(41)
        assert (await session.block(42)).start == 168
        assert session.blocks().read_all()["block"].to_pylist()[0] == 42
    async with open_store("all", retrieval=mode) as runtime:
        session = await runtime.session("a")
        await in_pieces(session, ids)
        oldest = min(retrieved(await session.inspect()))
        assert oldest < 42 or mode == "recent", "else nothing was shown"


async def test_recall_gives_nothing_of_what_was_dropped(open_store) -> None:
    async with open_store(retain_tokens=60) as runtime:
        session = await runtime.session("a")
        await session.observe("Zebras graze behind the barn. ")
        for _ in range(3):
            await session.observe("It rained on the hills, and the river rose. ")
        (hit, *_) = await session.recall("zebras barn hills")
        assert "hills" in hit.text and "Zebras" not in hit.text
        assert await session.recall("zebras") == []
        # nothing was erased: the journal has it
        assert "Zebras" in (await session.history())[0].text


async def test_bytes_bound_the_segments(open_store, ids, tmp_path, monkeypatch) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        block_bytes = session.timeline._updater._storage.bytes_a_block
    monkeypatch.setattr("memtier.updater.SEGMENT_BLOCKS", 4)
    async with open_store("bytes", retain_bytes=20 * block_bytes + 1, snapshot_every_tokens=32) as runtime:
        session = await runtime.session("a")
        await in_pieces(session, ids, 20)
        await session.updater.rest()
        stats = session.stats()
        # 300 tokens, the last turn began at 280: blocks before 50 were dropped
        assert stats.dropped_blocks == 50
        # files go with the next snapshot, at most 32 tokens later, and whole segments at a time
        assert stats.segment_bytes <= (20 + 32 // 4 + 4) * block_bytes + 4 * 500 * stats.segments
        on_disk = sum(path.stat().st_size for path in paths_of(tmp_path, store="bytes").segments.iterdir())
        assert on_disk == stats.segment_bytes
        assert session.folder.journal.first_block > 30


async def test_age_drops_turns_that_began_long_ago(open_store, ids, monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("memtier.timeline.time", SimpleNamespace(time=lambda: now[0]))
    async with open_store(retain_seconds=100) as runtime:
        session = await runtime.session("a")
        for at in range(0, 300, 50):
            await session.observe(ids[at : at + 50])
            now[0] += 40
        # the last turn began at 1200: those of 1000, 1040 and 1080 were too old, and the fourth begins at token 150
        assert session.timeline.retained_from == 150
        now[0] += 1000
        await session.observe(ids[:1])
        assert session.timeline.retained_from == 300


@pytest.mark.parametrize("how", ["reopen", "crash", "no snapshots", "another config"])
async def test_a_session_is_what_it_was_after_reopening(open_store, ids, tmp_path, how) -> None:
    config = {"retain_tokens": 80, "snapshot_every_tokens": STRIDE}
    async with open_store(**config) as runtime:
        session = await runtime.session("a")
        await in_pieces(session, ids[:230])
        if how == "crash":
            await session.flush()
            shutil.copytree(tmp_path / "store", tmp_path / "left")
        await session.checkpoint("x")
        whole = await outputs(session, ids[230:])
        await session.restore("x")
        torch.testing.assert_close(await outputs(session, ids[230:]), whole, **EXACT)
        await session.restore("x")
    if how == "no snapshots":
        # what was dropped is made again from the first token on, and dropped again
        for path in paths_of(tmp_path).snapshots.iterdir():
            path.unlink()  # the checkpoint has another name of it
            path.write_bytes(b"damaged")
    if how == "another config":
        config["retain_tokens"] = 100
    async with open_store("left" if how == "crash" else "store", **config) as runtime:
        session = await runtime.session("a")
        if how == "no snapshots":
            assert session.timeline.restored_from == 0
        assert session.timeline.retained_from == 200 - 80
        assert session.stats().dropped_blocks == 30
        again = await outputs(session, ids[230:])
        assert session.timeline.retained_from == 230 - config["retain_tokens"]
        if how != "another config":
            torch.testing.assert_close(again, whole, **EXACT)
        await session.flush()
        assert session.stats().lag_tokens == 0
        await session.close()
        (health,) = await runtime.doctor(full=True)
        assert health.healthy, health


async def test_copies_keep_what_was_dropped_dropped(open_store, ids, tmp_path) -> None:
    async with open_store(retain_tokens=80, snapshot_every_tokens=STRIDE) as runtime:
        session = await runtime.session("a")
        await in_pieces(session, ids[:250])
        fork = await session.fork("b")
        await session.export(tmp_path / "a.memtier")
        moved = await runtime.import_session(tmp_path / "a.memtier", "c")
        assert {one.stats().dropped_blocks for one in (session, fork, moved)} == {30}
        first, *others = [await outputs(one, ids[250:]) for one in (session, fork, moved)]
        for other in others:
            torch.testing.assert_close(other, first, **EXACT)
        assert {one.timeline.retained_from for one in (session, fork, moved)} == {170}


async def test_what_was_dropped_stays_so_when_tokens_are_forgotten(open_store, ids, monkeypatch) -> None:
    async with open_store(retain_tokens=80, snapshot_every_tokens=STRIDE) as runtime:
        session, never = await runtime.session("a"), await runtime.session("never")
        await in_pieces(session, ids)
        # a turn of 50 that was dropped long ago, so that all has to be read again
        report = await session.forget(start=50, end=100)
        assert report.position == 250 and report.restored_from == 0
        turns = await session.timeline.history.turns(0, 250)
        # of 0, 20, 70, 120, 170: positions move down with the tokens before them
        floors = [turn.retained_from for turn in turns]
        assert floors == [0, 20, 50, 70, 120]
        seen = await outputs(session, ids[:40])

        told = iter([*floors, 170])

        async def as_told(*_: object) -> int:
            return next(told)

        monkeypatch.setattr(Retention, "retained_from", as_told)
        await in_pieces(never, ids[:50] + ids[100:])
        torch.testing.assert_close(seen, await outputs(never, ids[:40]), **EXACT)


async def test_fewer_blocks_may_be_left_than_are_retrieved_at_a_time(open_store, ids) -> None:
    async with open_store(retain_tokens=20, snapshot_every_tokens=32) as runtime:
        session = await runtime.session("a")
        await in_pieces(session, ids[:150])
        await session.flush()
        # the file of block 0 is gone, and nothing may be read from it where blocks are missing
        assert session.folder.journal.first_block > 0
        await in_pieces(session, ids[150:200])
        assert min(retrieved(await session.inspect())) >= (150 - 20) // 4


async def test_a_session_may_be_left_without_segments(open_store, ids) -> None:
    async with open_store(retain_tokens=1, snapshot_every_tokens=32) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:22])
        await session.observe(ids[22:60])
        await session.flush()
        # back to the snapshot at 32, by when all blocks had been dropped
        await session.forget(start=40, end=60)
        journal = session.folder.journal
        assert journal.first_block > 0 and not journal.segments()
        await session.flush()
        assert session.stats().lag_tokens == 0
        await session.observe(ids[60:100])
        await session.flush()
        assert session.stats().lag_tokens == 0 and journal.indexed_through > 4


async def test_an_answer_aside_drops_nothing(open_store, ids) -> None:
    async with open_store(retain_tokens=80) as runtime:
        session = await runtime.session("a")
        await in_pieces(session, ids[:200])
        before = session.timeline.retained_from
        _ = [piece async for piece in session.generate(ids[:30], max_new_tokens=5, remember=False)]
        assert session.timeline.retained_from == before == 70
        _ = [piece async for piece in session.generate(ids[:30], max_new_tokens=5)]
        # of the question that began at 200, then of the answer that began at 230
        assert session.timeline.retained_from == 150


async def test_a_segment_that_is_merged_while_it_is_read_is_looked_up_again(open_store, ids, monkeypatch) -> None:
    async with open_store(hot_bytes=0, landmark_bytes=0) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:100])
        await session.flush()
        storage: StorageTier = session.timeline._updater._storage
        layer = next(iter(storage.layers))
        kv = storage.fetch(layer, [3])[0]
        (manifest,) = storage.segments()
        asked = []

        def gone(block: int):
            asked.append(block)
            return manifest if len(asked) > 1 else replace(manifest, name="merged-away")

        monkeypatch.setattr(storage, "_manifest", gone)
        assert torch.equal(storage.fetch(layer, [3])[0], kv)
        assert asked == [3, 3, 3]
