"""On a full disk nothing acknowledged is lost, nothing new is taken, and what frees space still works."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest
import torch

import memtier
from memtier.errors import StorageError, StorageFullError
from memtier.folder import SessionFolder
from memtier.runtime import Runtime
from memtier_backends.segment_store import FileSegmentStore
from memtier_backends.space import Space

pytestmark = pytest.mark.anyio

EXACT = {"rtol": 0.0, "atol": 1e-9}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


async def test_below_the_watermark_nothing_is_taken_and_all_can_be_read(open_store, ids, monkeypatch) -> None:
    async with open_store(min_free_bytes=1000) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:200])
        stats = runtime.stats()
        assert stats.free_bytes > stats.min_free_bytes == 1000
        monkeypatch.setattr(Space, "free_bytes", 999)
        with pytest.raises(StorageFullError, match="999 bytes free, and min_free_bytes is 1,000"):
            await session.observe(ids[200:])
        assert session.position == 200
        assert (await session.block(3)).start == 12
        assert len(await session.history()) == 1
        for more in (session.checkpoint("kept"), session.fork("b")):
            with pytest.raises(StorageFullError, match="nothing new is taken"):
                await more
        report = await session.forget(start=50, end=100)
        assert report.position == 150
        monkeypatch.undo()
        assert (await session.observe(ids[200:])).position == 250


@pytest.mark.parametrize("durability", ["turn", "token"])
async def test_below_the_watermark_an_answer_ends_where_it_is(open_store, ids, monkeypatch, durability) -> None:
    async with open_store(min_free_bytes=1000, durability=durability) as runtime:
        session = await runtime.session("a")
        generation = session.generate(ids[:60], max_new_tokens=20)
        await anext(generation)
        await anext(generation)
        monkeypatch.setattr(Space, "free_bytes", 999)
        with pytest.raises(StorageFullError):
            await anext(generation)
        assert session.position == 62
        assert (await session.timeline.tokens(60, 62)).tolist() == list(generation.token_ids)
        assert (await session.forget(start=10, end=20)).position == 52
        other = await runtime.session("b")
        monkeypatch.undo()
        generation = other.generate(ids[:60], max_new_tokens=20)
        await anext(generation)
        monkeypatch.setattr(Space, "free_bytes", 999)
        # another call ends it
        assert (await other.forget(start=10, end=20)).position == 51
        assert [turn.role for turn in await other.history()] == ["user", "assistant"]
        await other.close()


def fill(ballast: Path) -> None:
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(4096))


async def observe_for_ever(session, ids: list[int]) -> None:
    while True:
        await session.observe(ids)


async def test_a_disk_that_fills_up_loses_nothing_and_goes_on_when_there_is_room(
    small_disk, model, ids, tmp_path, open_store
) -> None:
    def opened() -> Runtime:
        config = memtier.MemoryConfig(min_free_bytes=0, reserve_bytes=1_000_000, snapshot_every_tokens=64)
        return memtier.open(small_disk / "store", model=model, config=config)

    ballast = small_disk / "ballast"
    async with opened() as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:100])
        await session.flush()
        fill(ballast)
        with pytest.raises(StorageFullError):
            await observe_for_ever(session, ids[100:200])
        # a step of the refused call may have been acknowledged before the one that failed
        acknowledged = session.position
        tokens = (await session.timeline.tokens(0, acknowledged)).tolist()
        assert (await session.timeline.tokens(0, 100)).tolist() == ids[:100]
        report = await session.forget(start=10, end=60)
        assert report.position == acknowledged - 50
        tokens = tokens[:10] + tokens[60:]
    ballast.unlink()
    async with opened() as runtime, open_store("whole") as whole:
        session, never = await runtime.session("a"), await whole.session("never")
        assert (await session.timeline.tokens(0, session.position)).tolist() == tokens
        await session.flush()
        await never.observe(tokens)
        logits = [(await one.observe(ids[:50], logits=True)).logits for one in (session, never)]
        torch.testing.assert_close(*logits, **EXACT)
        assert (small_disk / "store" / ".reserve").stat().st_size == 1_000_000
    shutil.rmtree(small_disk / "store")


async def test_a_closed_session_is_opened_on_a_full_disk_and_can_be_read(small_disk, model, tokenizer) -> None:
    def opened() -> Runtime:
        config = memtier.MemoryConfig(min_free_bytes=0, reserve_bytes=1_000_000, snapshot_every_tokens=64)
        return memtier.open(small_disk / "store", model=model, tokenizer=tokenizer, config=config)

    async with opened() as runtime:
        await (await runtime.session("a")).observe("Zebras graze. " * 20)
    fill(small_disk / "ballast")
    async with opened() as runtime:
        session = await runtime.session("a")
        assert "Zebras" in (await session.recall("zebras"))[0].text
        assert (await session.history())[0].text == "Zebras graze. " * 20
        assert (await session.block(0)).text == "Zeb"


async def test_a_session_that_finds_no_room_is_opened_with_what_was_set_aside(
    open_store, ids, tmp_path, monkeypatch
) -> None:
    async with open_store(min_free_bytes=0, reserve_bytes=1000) as runtime:
        await (await runtime.session("a")).observe(ids[:50])
    reserve = tmp_path / "store" / ".reserve"
    opening = SessionFolder.open

    def full_while_reserved(*arguments, **more) -> SessionFolder:
        if reserve.exists():
            raise StorageFullError("no room for the journal's shared memory")
        return opening(*arguments, **more)

    monkeypatch.setattr(SessionFolder, "open", full_while_reserved)
    async with open_store(min_free_bytes=0, reserve_bytes=1000) as runtime:
        assert reserve.exists()
        assert (await runtime.session("a")).position == 50
        # there is room for it again
        assert reserve.stat().st_size == 1000


async def test_limits_and_waiting_are_shown(open_store, ids, monkeypatch) -> None:
    released, seconds = threading.Event(), itertools.count()

    class HeldStore(FileSegmentStore):
        def put(self, name: str, data: bytes) -> None:
            assert released.wait(60)
            super().put(name, data)

    def clock() -> int:
        # it is looked at where the session begins to wait
        released.set()
        return next(seconds)

    monkeypatch.setattr("memtier.updater.time", SimpleNamespace(perf_counter=clock))
    async with open_store(segments=HeldStore, inbox_blocks=8, hot_bytes=2**20, landmark_bytes=None) as runtime:
        session = await runtime.session("a")
        with anyio.fail_after(60):
            for at in range(0, 300, 20):
                await session.observe(ids[at : at + 20])
        (stats,) = runtime.stats().sessions
    assert stats.waited_seconds >= 1
    assert stats.inbox_blocks <= stats.inbox_limit_blocks + 20 // 4
    assert (stats.inbox_limit_blocks, stats.hot_limit_bytes, stats.landmark_limit_bytes) == (8, 2**20, None)


async def test_a_reserve_is_set_aside_only_where_there_is_room(tmp_path, monkeypatch) -> None:
    space = Space(tmp_path, min_free_bytes=100, reserve_bytes=50)
    monkeypatch.setattr(Space, "free_bytes", 149)
    space.fill()
    assert not space.release()
    monkeypatch.setattr(Space, "free_bytes", 150)
    space.fill()
    space.fill()
    assert space.reserve.stat().st_size == 50
    assert space.release() and not space.release()
    monkeypatch.setattr(Space, "free_bytes", 99)
    with pytest.raises(StorageError, match="min_free_bytes"):
        space.check()
