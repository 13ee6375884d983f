"""Failures are loud, local, and lose nothing that was acknowledged."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import anyio
import pytest
import torch

import memtier.runtime as runtime_module
from memtier.errors import (
    CorruptMemoryError,
    IncompatibleMemoryError,
    ModelError,
    StorageError,
    StorageFullError,
)
from memtier.reader import Reader
from memtier.tiers.weights import WeightsTier
from memtier_backends.faults import Faults
from memtier_backends.layout import session_folder
from memtier_backends.segment_store import FileSegmentStore

pytestmark = pytest.mark.anyio

EXACT = {"rtol": 0.0, "atol": 1e-9}


@pytest.fixture
async def after_all(open_store, ids) -> torch.Tensor:
    """Logits of the last 100 of 300 tokens."""
    async with open_store("reference") as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:200])
        return (await session.observe(ids[200:], logits=True)).logits


@pytest.mark.parametrize(
    "operation", ["segments.put", "journal.add_segment", "index.add", "journal.set_indexed_through"]
)
async def test_a_store_that_keeps_failing_raises_at_the_next_call_and_loses_nothing(
    open_store, ids, after_all, operation
) -> None:
    faults = Faults(fail_always=True, operations=frozenset({operation}), error=StorageFullError)
    with anyio.fail_after(60):
        async with open_store(faults=faults) as runtime:
            session = await runtime.session("a")
            await session.observe(ids[:200])
            with pytest.raises(StorageFullError, match=r"session 'a'.*made to fail"):
                await session.flush()
            assert session.position == 200
            faults.fail_always = False
            seen = await session.observe(ids[200:], logits=True)
            await session.flush()
            assert session.stats().lag_tokens == 0
    torch.testing.assert_close(seen.logits, after_all, **EXACT)


async def test_a_session_whose_store_failed_for_good_is_whole_at_the_next_open(open_store, ids, after_all) -> None:
    faults = Faults(fail_always=True, operations=frozenset({"segments.put"}))
    with anyio.fail_after(60):
        async with open_store(faults=faults) as runtime:
            session = await runtime.session("a")
            await session.observe(ids[:200])
            with pytest.raises(StorageError):
                await session.flush()
        async with open_store() as runtime:
            session = await runtime.session("a")
            assert session.position == 200
            seen = await session.observe(ids[200:], logits=True)
    torch.testing.assert_close(seen.logits, after_all, **EXACT)


async def test_whatever_stops_a_merge_stops_nothing_else(open_store, ids, after_all, monkeypatch) -> None:
    def no_memory(*_):
        raise MemoryError("no memory for a merge")

    monkeypatch.setattr("memtier.writing.merged", no_memory)
    async with open_store() as runtime:
        session = await runtime.session("a")
        for at in range(0, 200, 5):
            await session.observe(ids[at : at + 5])
            await session.flush()
        await session.updater.rest()
        assert session.stats().merges == 0 and session.stats().segments > 20
        seen = await session.observe(ids[200:], logits=True)
    torch.testing.assert_close(seen.logits, after_all, **EXACT)


@pytest.mark.parametrize("durability", ["turn", "token"])
async def test_an_answer_whose_end_could_not_be_written_is_written_by_the_next_call(
    open_store, ids, durability
) -> None:
    faults = Faults()
    async with open_store(faults=faults, durability=durability) as runtime:
        session = await runtime.session("a")
        generation = session.generate(ids[:60], max_new_tokens=20)
        await anext(generation)
        await anext(generation)
        faults.fail_always, faults.operations = True, frozenset({"journal.commit"})
        with pytest.raises(StorageError):
            await session.observe(ids[60:100])
        faults.fail_always = False
        assert session.position == 62
        await session.observe(ids[60:100])
        assert (await session.timeline.tokens(60, 102)).tolist() == [*generation.token_ids, *ids[60:100]]
        await session.flush()
        await session.close()
        assert (await runtime.session("a")).position == 102


async def test_a_failing_session_stops_no_other(open_store, ids) -> None:
    faults = Faults()
    with anyio.fail_after(60):
        async with open_store(faults=faults) as runtime:
            good, bad = await runtime.session("good"), await runtime.session("bad")
            await bad.observe(ids[:200])
            faults.fail_always, faults.operations = True, frozenset({"segments.put"})
            with pytest.raises(StorageError, match="session 'bad'"):
                await bad.flush()
            faults.fail_always = False
            await good.observe(ids)
            await good.flush()
            assert runtime.stats().sessions[0].failure is None


async def test_a_disk_that_hangs_for_one_session_holds_up_no_other(open_store, ids, tmp_path) -> None:
    released, hung = threading.Event(), []

    class HangingStore(FileSegmentStore):
        def put(self, name: str, data: bytes) -> None:
            if hung and hung[0] == self.folder:
                released.wait(30)
            super().put(name, data)

    with anyio.fail_after(60):
        async with open_store(segments=HangingStore) as runtime:
            slow, quick = await runtime.session("slow"), await runtime.session("quick")
            hung.append(session_folder(tmp_path / "store", "default", "slow") / "segments")
            try:
                await slow.observe(ids[:200])
                await quick.observe(ids[:200])
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(slow.flush)
                    await quick.flush()
                    assert quick.stats().inbox_blocks == 0
                    assert slow.stats().inbox_blocks > 0
                    released.set()
            finally:
                released.set()
            assert slow.stats().inbox_blocks == 0


async def test_a_commit_that_fails_acknowledges_nothing(open_store, ids) -> None:
    faults = Faults(operations=frozenset({"journal.commit"}))
    with anyio.fail_after(60):
        async with open_store(faults=faults) as runtime:
            session = await runtime.session("a")
            await session.observe(ids[:50])
            faults.fail_always = True
            with pytest.raises(StorageError):
                await session.observe(ids[50:100])
            assert session.position == 50
            faults.fail_always = False
            assert (await session.observe(ids[50:100])).position == 100


class Refusal:
    """Makes the model refuse the n-th step from now."""

    def __init__(self, monkeypatch, step: int, error: Exception) -> None:
        self.left, self.error = step, error
        original = Reader._take_sealed

        def take_sealed(reader, cache):
            self.left -= 1
            if self.left == 0:
                raise self.error
            return original(reader, cache)

        monkeypatch.setattr(Reader, "_take_sealed", take_sealed)


@pytest.mark.parametrize("error", [ModelError("not finite."), RuntimeError("out of memory")], ids=["ours", "torch's"])
async def test_a_refused_step_is_taken_back_and_the_session_goes_on(
    open_store, ids, after_all, monkeypatch, error
) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:200])
        Refusal(monkeypatch, 1, error)
        with pytest.raises(ModelError, match="taken back"):
            await session.observe(ids[100:250])
        assert session.position == 200
        seen = await session.observe(ids[200:], logits=True)
        assert (await session.inspect()).position == 300
    torch.testing.assert_close(seen.logits, after_all, **EXACT)


def refuse(monkeypatch, *refused: int) -> None:
    """Makes the model refuse every step that holds one of these tokens."""
    original = WeightsTier.step

    def step(weights, ids, *arguments, **more):
        if set(ids.flatten().tolist()) & set(refused):
            raise ModelError("not finite.")
        return original(weights, ids, *arguments, **more)

    monkeypatch.setattr(WeightsTier, "step", step)


@pytest.mark.parametrize("killed", [False, True], ids=["rollback-failed", "killed-before-it"])
async def test_a_refused_step_that_no_record_took_back_is_taken_back_by_the_next_catch_up(
    open_store, monkeypatch, caplog, killed
) -> None:
    refuse(monkeypatch, 7)
    faults = Faults(fail_always=True, operations=frozenset({"journal.rollback"}))
    async with open_store(faults=faults, snapshot_every_tokens=64) as runtime:
        session = await runtime.session("a")
        await session.observe([1, 2, 3] * 30)
        with pytest.raises(StorageError):
            await session.observe([4, 5, 7])
        assert session.position == 93
        faults.fail_always = False
        if killed:
            await session.close_within(write=False)
            session = await runtime.session("a")
        assert (await session.observe([4, 5])).position == 92
        assert "tokens from 90 on are taken back" in caplog.text
        assert (await session.timeline.tokens(88, 92)).tolist() == [2, 3, 4, 5]
        assert (await session.inspect()).position == 92


async def test_only_the_unread_token_of_an_answer_is_taken_back(open_store, ids, monkeypatch) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:60])
        generation = session.generate(max_new_tokens=6)
        _ = [piece async for piece in generation]
        *read, last = generation.token_ids
        await session.close_within(write=False)
    refuse(monkeypatch, *({last} - {*read, *ids[:60]}))
    async with open_store() as runtime:
        session = await runtime.session("a")
        told = (await session.timeline.tokens(60, session.position)).tolist()
        assert told == (read if last not in {*read, *ids[:60]} else [*read, last])


async def test_what_was_read_once_is_never_taken_back(open_store, monkeypatch) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe([1, 2, 3] * 10)
        await session.observe([4, 5, 6])
        await session.close_within(write=False)
    with monkeypatch.context() as patch:
        # of the newest commit nobody knows whether it was read, of what stands before it everybody does
        refuse(patch, 2, 5)
        async with open_store() as runtime:
            with pytest.raises(ModelError):
                await runtime.session("a")
    async with open_store() as runtime:
        session = await runtime.session("a")
        assert session.position == 33
        refuse(monkeypatch, 5, 9)
        with pytest.raises(ModelError):
            await session.observe([9])
        await session.close_within(write=False)
        # something follows that commit: it was read, and a model that refuses it now is not the one that did
        with pytest.raises(ModelError):
            await runtime.session("a")
    monkeypatch.undo()
    async with open_store() as runtime:
        assert (await runtime.session("a")).position == 33


@pytest.mark.parametrize("durability", ["turn", "token"])
async def test_a_refused_sampled_token_is_taken_back(open_store, ids, monkeypatch, durability) -> None:
    async with open_store("plain", durability=durability) as runtime:
        session = await runtime.session("a")
        whole = session.generate(ids[:60], max_new_tokens=20)
        async for _ in whole:
            pass
    async with open_store(durability=durability) as runtime:
        session = await runtime.session("a")
        generation = session.generate(ids[:60], max_new_tokens=20)
        await anext(generation)
        Refusal(monkeypatch, 5, ModelError("not finite."))
        with pytest.raises(ModelError):
            async for _ in generation:
                pass
        tokens = list(generation.token_ids)
        assert session.position == 60 + len(tokens) - 1
        rest = session.generate(max_new_tokens=20 - len(tokens) + 1)
        async for _ in rest:
            pass
    assert tokens[:-1] + list(rest.token_ids) == list(whole.token_ids)


async def test_real_non_finite_weights_are_refused(open_store, ids, model) -> None:
    import copy

    broken = copy.deepcopy(model)
    async with open_store(model=broken) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:100])
        with torch.no_grad():
            kept = broken.lm_head.weight.clone()
            broken.lm_head.weight.fill_(float("nan"))
        with pytest.raises(ModelError):
            await session.observe(ids[100:])
        assert session.position == 100
        with torch.no_grad():
            broken.lm_head.weight.copy_(kept)
        assert (await session.observe(ids[100:])).position == 300


async def test_a_damaged_segment_is_loud_and_the_tokens_stay_acknowledged(open_store, ids, tmp_path) -> None:
    async with open_store(hot_bytes=0) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:200])
        await session.flush()
        segments = list(tmp_path.rglob("segments/*"))
        whole = [segment.read_bytes() for segment in segments]
        for segment, data in zip(segments, whole, strict=True):
            segment.write_bytes(data[:8000] + bytes(len(data) - 8000))
        with pytest.raises(CorruptMemoryError, match="damaged"):
            await session.observe(ids[200:])
        assert session.position == 300
        for segment, data in zip(segments, whole, strict=True):
            segment.write_bytes(data)
        assert (await session.observe(ids[:10])).position == 310


async def test_what_a_removal_left_goes_when_the_store_is_opened_next(
    open_store, tmp_path, monkeypatch, caplog
) -> None:
    async with open_store() as runtime:
        await (await runtime.session("a")).observe("hello")
    tenant = session_folder(tmp_path / "store", "default", "a").parent
    left = [tmp_path / "store" / ".removed-tenant", tenant / ".removed-session"]
    for folder in left:
        (folder / "segments").mkdir(parents=True)
    sweep = runtime_module.sweep_removed

    def refused(folder: Path) -> None:
        raise StorageError(f"cannot remove what is in {folder}")

    monkeypatch.setattr(runtime_module, "sweep_removed", refused)
    async with open_store() as runtime:
        assert (await runtime.session("a")).position > 0
        assert caplog.text.count("what a removal left could not be removed") == 2
    monkeypatch.setattr(runtime_module, "sweep_removed", sweep)
    async with open_store():
        assert not any(folder.exists() for folder in left)


async def test_a_store_of_a_newer_version_is_refused(open_store, tmp_path) -> None:
    async with open_store() as runtime:
        await (await runtime.session("a")).observe("hello")
    (journal,) = tmp_path.rglob("journal.sqlite3")
    connection = sqlite3.connect(journal)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    async with open_store() as runtime:
        with pytest.raises(IncompatibleMemoryError, match="99"):
            await runtime.session("a")
