"""A session that is flushed after every few tokens keeps few segments, and reads what it read before."""

from __future__ import annotations

import pytest
import torch

from memtier_backends.faults import Faults
from memtier_backends.layout import SessionPaths, session_folder
from memtier_backends.merging import next_merge
from memtier_backends.segments import pack_segment
from memtier_backends.testing import make_payloads

pytestmark = pytest.mark.anyio

EXACT = {"rtol": 0.0, "atol": 1e-9}
CONFIG = {"hot_bytes": 0, "landmark_bytes": 0, "snapshot_every_tokens": 128}


def segments_of(tmp_path, name: str = "a"):
    return SessionPaths(session_folder(tmp_path / "store", "default", name)).segments


async def in_drops(session, ids) -> None:
    for at in range(0, len(ids), 5):
        await session.observe(ids[at : at + 5])
        await session.flush()


async def test_many_flushes_leave_few_files_and_the_same_session(open_store, ids, tmp_path) -> None:
    async with open_store(**CONFIG) as runtime:
        whole, session = await runtime.session("whole"), await runtime.session("a")
        await whole.observe(ids[:250])
        await in_drops(session, ids[:250])
        await session.updater.rest()
        stats = session.stats()
        journal = session.folder.journal
        assert stats.merges > 2
        # at most seven wait after the last snapshot, and each stretch before it is one
        assert stats.segments <= 7 + len(journal.snapshots())
        assert sorted(path.name for path in segments_of(tmp_path).iterdir()) == sorted(
            manifest.name for manifest in journal.segments()
        )
        for snapshot in journal.snapshots():
            for segment in journal.segments():
                assert not segment.first_block < snapshot.blocks < segment.end_block
        logits = [(await one.observe(ids[250:], logits=True)).logits for one in (whole, session)]
        torch.testing.assert_close(*logits, **EXACT)
    async with open_store(**CONFIG) as runtime:
        session, whole = await runtime.session("a"), await runtime.session("whole")
        for block in (0, 20, 50):
            one, other = await session.block(block), await whole.block(block)
            assert all((a == b).all() for a, b in zip(one.keys, other.keys, strict=True))
        await session.close()
        (health, *_) = [health for health in await runtime.doctor(full=True) if health.id == "a"]
        assert all(finding.what == "index" for finding in health.findings)


async def test_forks_and_checkpoints_keep_their_own_names_of_what_is_merged(
    open_store, ids, tmp_path, monkeypatch
) -> None:
    async with open_store(**CONFIG) as runtime:
        session = await runtime.session("a")
        with monkeypatch.context() as patch:
            patch.setattr("memtier.updater.next_merge", lambda *_, **__: [])
            await in_drops(session, ids[:60])
            await session.checkpoint("x")
            kept = {manifest.name for manifest in session.folder.journal.segments()}
            fork = await session.fork("b")
        after = (await fork.observe(ids[60:90], logits=True)).logits
        await in_drops(session, ids[60:200])
        await session.updater.rest()
        assert kept - {path.name for path in segments_of(tmp_path).iterdir()}, "else nothing was shown"
        assert kept == {path.name for path in session.folder.paths.checkpoint("x").segments.iterdir()}
        await session.restore("x")
        torch.testing.assert_close((await session.observe(ids[60:90], logits=True)).logits, after, **EXACT)
        report = await session.forget(start=20, end=30)
        assert report.checkpoints == ("x",) and report.forks == ("b",)
        logits = [(await one.observe(ids[90:120], logits=True)).logits for one in (session, fork)]
        torch.testing.assert_close(*logits, **EXACT)


async def test_a_damaged_segment_is_left_alone_and_the_rest_is_merged(open_store, ids, tmp_path) -> None:
    async with open_store(snapshot_every_tokens=10_000) as runtime:
        session = await runtime.session("a")
        await in_drops(session, ids[:35])
        broken = sorted(segments_of(tmp_path).iterdir())[0]
        broken.write_bytes(broken.read_bytes()[:-1])
        await in_drops(session, ids[35:200])
        await session.updater.rest()
        assert broken.exists() and session.stats().merges > 0 and session.stats().failure is None


@pytest.mark.parametrize("operation", ["segments.put", "journal.merge_segments", "segments.delete"])
async def test_a_merge_that_fails_disturbs_nothing(open_store, ids, monkeypatch, operation) -> None:
    monkeypatch.setattr("memtier.tiers.retry.RETRY_AFTER_SECONDS", (0.0,))
    faults = Faults(operations=frozenset({operation}))
    async with open_store(faults=faults, snapshot_every_tokens=10_000) as runtime:
        session = await runtime.session("a")
        await in_drops(session, ids[:100])
        await session.updater.rest()
        before = session.stats()
        monkeypatch.setattr("memtier.updater.MERGE_SEGMENTS", 2)
        faults.fail_always = True
        session.updater._may_merge = True
        session.updater._notify()
        await session.updater.rest()
        assert session.stats().failure is None and session.stats().merges == before.merges
        faults.fail_always = False
        await session.observe(ids[100:200])
        await session.flush()
        await session.updater.rest()
        assert session.stats().merges > before.merges
        assert session.folder.journal.segments()[0].first_block == 0


@pytest.mark.parametrize(
    ("sizes", "cuts", "merged"),
    [
        ([1] * 7, (), []),
        ([1] * 8, (), [0, 8]),
        ([57, *[1] * 8], (), [0, 64]),
        ([64, 64, 64], (192,), []),
        ([1, 1, 1], (2,), [0, 2]),
        ([1, 1, 1], (1, 2), []),
        ([40, 40, 2, 2], (84,), [40, 84]),
    ],
    ids=str,
)
async def test_neighbours_are_merged_up_to_a_cut(sizes, cuts, merged) -> None:
    first, manifests = 0, []
    for size in sizes:
        manifests.append(pack_segment(make_payloads(first, size, layers=1))[1])
        first += size
    found = next_merge(manifests, cuts, most_blocks=64, patience=8)
    assert ([found[0].first_block, found[-1].end_block] if found else []) == merged
