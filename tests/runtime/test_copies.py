"""Checkpoints and forks: what was is what comes back, to the bit, and no copy is made of the blocks."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import anyio
import pytest
import torch

from memtier.errors import ConfigError, CorruptMemoryError, SessionError
from memtier.testing import tiny_model
from memtier_backends.faults import Faults
from memtier_backends.layout import SessionPaths, session_folder

pytestmark = pytest.mark.anyio


def paths_of(tmp_path: Path, session_id: str) -> SessionPaths:
    return SessionPaths(session_folder(tmp_path / "store", "default", session_id))


async def everything(session) -> list[dict[str, torch.Tensor]]:
    return [await session.state(layer) for layer in range(3)]


def same(one: list[dict[str, torch.Tensor]], two: list[dict[str, torch.Tensor]]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("cut", [63, 64, 65, 200])
async def test_restoring_gives_the_session_that_was_to_the_bit(open_store, ids, cut) -> None:
    async with open_store(model=tiny_model(), snapshot_every_tokens=64) as runtime:
        session, twin = await runtime.session("a"), await runtime.session("twin")
        await session.observe(ids[:cut])
        await twin.observe(ids[:cut])
        was = await everything(session)
        await session.checkpoint("here")
        await session.observe(ids[150:])
        await session.restore("here")
        assert session.position == cut
        assert session.timeline.restored_from == cut
        assert same(await everything(session), was)
        logits = [(await one.observe(ids[cut:], logits=True)).logits for one in (session, twin)]
        assert torch.equal(*logits)


async def test_a_checkpoint_survives_a_restart_and_later_checkpoints_an_earlier_one(open_store, ids) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:100])
        await session.checkpoint("one")
        await session.observe(ids[100:200])
        await session.checkpoint("two")
        await session.restore("one")
        await session.observe(ids[:30])
        await session.checkpoint("other way")
    async with open_store() as runtime:
        session = await runtime.session("a")
        assert [(c.name, c.position) for c in await session.checkpoints()] == [
            ("one", 100),
            ("two", 200),
            ("other way", 130),
        ]
        await session.restore("two")
        assert (await session.timeline.tokens(0, 200)).tolist() == ids[:200]
        await session.restore("other way")
        assert (await session.timeline.tokens(0, 130)).tolist() == ids[:100] + ids[:30]
        await session.flush()
        assert session.stats().lag_tokens == 0


async def test_an_answer_is_the_same_after_a_restore(open_store, ids) -> None:
    async def answer(session) -> list[int]:
        generation = session.generate(ids[:40], max_new_tokens=30)
        async for _ in generation:
            pass
        return list(generation.token_ids)

    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids)
        await session.checkpoint("before")
        first = await answer(session)
        await session.restore("before")
        assert session.position == 300
        assert await answer(session) == first


async def test_names_are_used_once_and_dropped_by_name(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe("hello")
        for name in ("x", "../../etc", "ü ñ/.."):
            await session.checkpoint(name)
        with pytest.raises(SessionError, match="there is a checkpoint 'x' already"):
            await session.checkpoint("x")
        with pytest.raises(ConfigError):
            await session.checkpoint("")
        with pytest.raises(SessionError, match="there are: 'x'"):
            await session.restore("y")
        await session.drop_checkpoint("x")
        with pytest.raises(SessionError, match="no checkpoint 'x'"):
            await session.drop_checkpoint("x")
        assert [c.name for c in await session.checkpoints()] == ["../../etc", "ü ñ/.."]
        assert session.position == 6


async def test_a_damaged_checkpoint_changes_nothing(open_store, ids, tmp_path) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:100])
        await session.checkpoint("x")
        await session.observe(ids[100:200])
        kept = paths_of(tmp_path, "a").checkpoint("x").journal
        data = bytearray(kept.read_bytes())
        at = data.index(torch.tensor(ids[:100], dtype=torch.int32).numpy().tobytes()[:40])
        data[at] ^= 1
        kept.write_bytes(data)
        with pytest.raises(CorruptMemoryError):
            await session.restore("x")
        assert session.position == 200
        await session.observe(ids[200:])


async def test_a_fork_goes_its_own_way_and_shares_the_blocks(open_store, ids, tmp_path) -> None:
    async with open_store(model=tiny_model()) as runtime:
        session, twin = await runtime.session("a"), await runtime.session("twin")
        await session.observe(ids[:200])
        await twin.observe(ids[:200])
        fork = await session.fork("b")
        assert (fork.id, fork.position, fork.timeline.restored_from) == ("b", 200, 200)
        assert await runtime.session("b") is fork
        mine = {path.name: path.stat().st_ino for path in paths_of(tmp_path, "a").segments.iterdir()}
        its = {path.name: path.stat().st_ino for path in paths_of(tmp_path, "b").segments.iterdir()}
        assert mine == its and mine
        await session.observe(ids[:50])
        logits = [(await one.observe(ids[200:], logits=True)).logits for one in (fork, twin)]
        assert torch.equal(*logits)
        assert (session.position, fork.position) == (250, 300)
        await runtime.delete_session("a")
        await fork.flush()
    async with open_store() as runtime:
        assert [info.id for info in await runtime.sessions()] == ["b", "twin"]


async def test_a_fork_finds_what_its_origin_read(tmp_path, tokenizer) -> None:
    import memtier

    async with memtier.open(tmp_path / "store", model=tiny_model(), tokenizer=tokenizer) as runtime:
        session = await runtime.session("a")
        await session.observe("The code for Bodiv is 4821. " + "It rained on the hills. " * 8)
        fork = await session.fork("b")
        assert fork.stats().lag_tokens == 0
        await fork.observe("Zebras graze here. " * 4)
        assert "Bodiv" in (await fork.recall("Bodiv"))[0].text
        assert await session.recall("zebras") == []
        await session.checkpoint("x")
        await session.restore("x")
        assert "Bodiv" in (await session.recall("Bodiv"))[0].text


async def test_a_fork_needs_a_new_id_and_room(open_store) -> None:
    async with open_store(max_open_sessions=2) as runtime:
        session, other = await runtime.session("a"), await runtime.session("b")
        await session.observe("hello")
        await other.observe("there")
        with pytest.raises(SessionError, match="max_open_sessions"):
            await session.fork("c")
        await other.close()
        with pytest.raises(SessionError, match="'b' exists already"):
            await session.fork("b")
        assert (await session.fork("c")).position == 6
        assert {info.id for info in await runtime.sessions()} == {"a", "b", "c"}


async def test_a_copy_that_fails_leaves_nothing(open_store, ids, tmp_path) -> None:
    faults = Faults(operations=frozenset({"journal.copy_to"}))
    async with open_store(faults=faults) as runtime:
        session = await runtime.session("a")
        await session.observe(ids)
        faults.fail_always = True
        before = sorted(path.name for path in paths_of(tmp_path, "a").folder.iterdir())
        with pytest.raises(Exception, match="made to fail"):
            await session.fork("b")
        with pytest.raises(Exception, match="made to fail"):
            await session.checkpoint("x")
        after = sorted(path.name for path in paths_of(tmp_path, "a").folder.iterdir())
        assert set(after) - set(before) <= {"segments", "snapshots", "checkpoints", "index.lance"}
        assert not paths_of(tmp_path, "b").journal.exists()
        assert await session.checkpoints() == []


async def test_what_a_crash_leaves_of_a_copy_is_dropped(open_store, ids, tmp_path) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids)
        await session.checkpoint("x")
    paths = paths_of(tmp_path, "a")
    shutil.copytree(paths.checkpoint("x").folder, paths.partial())

    async with open_store() as runtime:
        assert [c.name for c in await (await runtime.session("a")).checkpoints()] == ["x"]
    assert not list(paths.folder.glob(".partial*"))


async def test_a_disk_without_links_gets_copies(open_store, ids, tmp_path, monkeypatch) -> None:
    def refuse(source, target) -> None:
        raise OSError(1, "Operation not permitted")

    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids)
        monkeypatch.setattr(os, "link", refuse)
        fork = await session.fork("b")
        await fork.observe(ids)
        assert fork.position == 600


async def test_history_tells_the_turns(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe("one", source="book", metadata={"page": 1})
        _ = [piece async for piece in session.generate("two", max_new_tokens=4)]
        first, second, answer = await session.history()
        assert (first.role, first.text, first.start, first.end) == ("user", "one", 0, 4)
        assert (first.source, first.metadata) == ("book", {"page": 1})
        assert (second.text, second.start, second.end) == ("two", 4, 7)
        assert (answer.role, answer.start, answer.end) == ("assistant", 7, session.position)
        assert answer.created_at >= first.created_at > 0
        assert [turn.start for turn in await session.history(5, 6)] == [4]


async def test_a_damaged_checkpoint_hides_no_other(open_store, ids, caplog) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:50])
        for name in ("good", "bad"):
            await session.checkpoint(name)
        session.folder.paths.checkpoint("bad").journal.write_bytes(b"no journal" * 1000)
        assert [info.name for info in await session.checkpoints()] == ["good"]
        assert "is left out" in caplog.text
        with pytest.raises(SessionError, match="there are: 'good'"):
            await session.restore("other")
        await session.drop_checkpoint("bad")


async def test_a_session_that_is_being_closed_is_opened_again_when_it_is_free(open_store, ids, monkeypatch) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids)
        closing, may_go_on, free = anyio.Event(), anyio.Event(), session._free
        again = []

        async def slowly() -> None:
            closing.set()
            await may_go_on.wait()
            await free()

        async def ask() -> None:
            again.append(await runtime.session("a"))

        monkeypatch.setattr(session, "_free", slowly)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(session.close)
            await closing.wait()
            tasks.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            may_go_on.set()
        (other,) = again
        assert other is not session
        assert (await other.observe(ids[:3])).position == len(ids) + 3


async def test_a_snapshot_that_is_lost_costs_time_and_no_copy(open_store, ids, tmp_path) -> None:
    async with open_store(snapshot_every_tokens=64) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:200])
        await session.checkpoint("before")
        kept = session.folder.paths.checkpoint("before")
        for paths in (session.folder.paths, kept):
            files = sorted(paths.snapshots.iterdir())
            assert files
            files[-1].unlink()
        fork = await session.fork("b")
        await session.checkpoint("after")
        await session.restore("before")
        logits = [(await one.observe(ids[200:], logits=True)).logits for one in (session, fork)]
        torch.testing.assert_close(*logits, rtol=0.0, atol=1e-9)
