"""Snapshots stand at multiples of their stride, are few, and a session opens from the newest that can be used."""

from __future__ import annotations

import pytest
import torch

from memtier.testing import tiny_model
from memtier.tiers.state import superseded
from memtier_backends.layout import SessionPaths, session_folder

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
