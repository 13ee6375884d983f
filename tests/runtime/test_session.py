"""Observing, resuming, recalling, and what is refused."""

from __future__ import annotations

import gc
import inspect
import json
import math
import threading
import weakref
from contextlib import closing
from pathlib import Path

import anyio
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import memtier
from memtier.errors import (
    ConfigError,
    IncompatibleMemoryError,
    SessionBusyError,
    SessionError,
    SessionNotFoundError,
)
from memtier.runtime import Runtime
from memtier.testing import tiny_model
from memtier.tiers.weights import WeightsTier
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.segment_store import FileSegmentStore

pytestmark = pytest.mark.anyio

FACT = "The code for Bodiv is 4821. "
RAIN = "It rained on the hills, and the river rose slowly. "
EXACT = {"rtol": 0.0, "atol": 1e-9}


async def test_observing_tells_how_surprised_the_model_was(open_store, model, ids) -> None:
    async with open_store() as runtime:
        report = await (await runtime.session("a")).observe(ids, logits=True)
    wanted = torch.nn.functional.cross_entropy(report.logits[:-1], torch.tensor(ids[1:])) / math.log(2)
    assert report.bits_per_token == pytest.approx(float(wanted))
    assert report.tokens == report.position == len(ids)
    assert "logits" not in report.model_dump_json()


async def test_bos_stands_once_before_text_and_never_before_ids(open_store, ids) -> None:
    async with open_store() as runtime:
        text, tokens = await runtime.session("text"), await runtime.session("ids")
        await text.observe("ab")
        await text.observe("cd")
        await tokens.observe(ids[:3])
        await tokens.observe("ab")
        assert (await text.timeline.tokens(0, 5)).tolist() == [256, *b"abcd"]
        assert (await tokens.timeline.tokens(0, 5)).tolist() == [*ids[:3], *b"ab"]


async def test_tokens_are_in_the_journal_before_the_model_reads_them(open_store, ids, monkeypatch) -> None:
    gaps = []
    async with open_store() as runtime:
        session = await runtime.session("a")
        original = WeightsTier.step

        def step(weights, tokens, cache, keep):
            with closing(SqliteJournal.open(session.folder.paths.journal, read_only=True)) as on_disk:
                gaps.append(on_disk.position - (cache.position + tokens.numel()))
            return original(weights, tokens, cache, keep)

        monkeypatch.setattr(WeightsTier, "step", step)
        await session.observe(ids * 4)
        assert gaps == [0, 0, 0]


@pytest.mark.parametrize("cut", [1, 37, 150, 299])
async def test_half_now_and_half_after_reopening_is_all_at_once(open_store, ids, cut) -> None:
    async with open_store("whole") as runtime:
        whole = (await (await runtime.session("a")).observe(ids, logits=True)).logits
    async with open_store(snapshot_every_tokens=64) as runtime:
        await (await runtime.session("a")).observe(ids[:cut])
    async with open_store() as runtime:
        session = await runtime.session("a")
        assert session.position == cut
        rest = (await session.observe(ids[cut:], logits=True)).logits
    torch.testing.assert_close(rest, whole[cut:], **EXACT)


async def test_a_damaged_snapshot_costs_time_and_nothing_else(open_store, ids, tmp_path) -> None:
    async with open_store("whole") as runtime:
        whole = (await (await runtime.session("a")).observe(ids, logits=True)).logits
    async with open_store() as runtime:
        await (await runtime.session("a")).observe(ids[:200])
    snapshots = list((tmp_path / "store").rglob("snapshots/*.safetensors"))
    assert snapshots
    for snapshot in snapshots:
        data = bytearray(snapshot.read_bytes())
        data[len(data) // 2] ^= 1
        snapshot.write_bytes(data)
    async with open_store() as runtime:
        rest = (await (await runtime.session("a")).observe(ids[200:], logits=True)).logits
    torch.testing.assert_close(rest, whole[200:], **EXACT)


async def test_turns_read_in_other_ways_are_replayed_as_they_were(open_store, ids, tmp_path) -> None:
    async def rest(name: str, *, replayed: bool) -> torch.Tensor:
        for at, choice in ((0, {"retrieval": "on"}), (100, {"retrieval": "recent", "span_blocks": 4})):
            async with open_store(name, **choice) as runtime:
                session = await runtime.session("a")
                await session.observe(ids[at : at + 95])
                _ = [
                    piece
                    async for piece in session.generate(ids[at + 95 : at + 100], max_new_tokens=3, retrieval="off")
                ]
        if replayed:
            snapshots = list((tmp_path / name).rglob("snapshots/*"))
            assert snapshots
            for snapshot in snapshots:
                snapshot.unlink()
        async with open_store(name) as runtime:
            return (await (await runtime.session("a")).observe(ids[200:], logits=True)).logits

    replayed, restored = await rest("replayed", replayed=True), await rest("restored", replayed=False)
    torch.testing.assert_close(replayed, restored, **EXACT)


async def test_recall_finds_a_passage_with_its_provenance(open_store) -> None:
    wide = {"window_tokens": 64, "span_block_tokens": 16, "span_refresh_tokens": 8}
    async with open_store(**wide) as runtime:
        session = await runtime.session("a")
        await session.observe(RAIN * 3)
        await session.observe(FACT, role="system", source="codes.txt", metadata={"page": 3})
        await session.observe(RAIN * 6)
        await session.observe("Zebras graze here.", source="zoo")
        (far, *_) = await session.recall("Bodiv code")
        (near, *_) = await session.recall("zebras")
        assert await session.recall("nowhere") == []
        assert far.tier == "storage"
        assert "Bodiv" in far.text
        assert (far.role, far.source, far.metadata) == ("system", "codes.txt", {"page": 3})
        assert near.tier == "context"
        assert "Zebras" in near.text
        assert near.source == "zoo"
        assert near.created_at >= far.created_at > 0


async def test_pending_blocks_bytes_and_lag_are_shown(open_store, ids) -> None:
    released = threading.Event()

    class HeldStore(FileSegmentStore):
        def put(self, name: str, data: bytes) -> None:
            assert released.wait(60)
            super().put(name, data)

    async with open_store(segments=HeldStore) as runtime:
        try:
            session = await runtime.session("a")
            await session.observe(ids)
            (before,) = runtime.stats().sessions
        finally:
            released.set()
        await session.flush()
        (after,) = runtime.stats().sessions
    assert before.inbox_blocks == before.lag_tokens / 4 == 70
    assert before.pinned_bytes == 70 * 2 * 2 * 4 * 8 * 2
    assert after.inbox_blocks == after.lag_tokens == after.pinned_bytes == 0
    assert after.segment_bytes > before.pinned_bytes


async def test_a_block_in_memory_owns_its_bytes(open_store, ids) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids)
        for layer in (1, 2):
            for tensor in session._storage.fetch(layer, list(range(70))):
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


async def test_the_report_is_json(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(FACT + RAIN * 3)
        told = json.loads((await session.inspect()).model_dump_json())
    assert told["context"]["window_text"] == RAIN[-(told["context"]["window_end"] - told["context"]["window_start"]) :]
    assert set(told) >= {"weights", "state", "context", "storage", "attention_mass"}
    assert told["storage"]["last_selection"][0]["blocks"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ("a\ud800b", "surrogate"),
        (b"ab\xff", "UTF-8"),
        ([1, 260], "outside"),
        ([-1], "outside"),
        ([1.5], "whole numbers"),
        (object(), "cannot read"),
        ([[1, 2]], "whole numbers"),
    ],
    ids=["no text", "no ids", "surrogate", "bytes", "too large", "negative", "fraction", "object", "rows"],
)
async def test_bad_input_is_refused_before_anything_is_written(open_store, given, message) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        with pytest.raises(ConfigError, match=message):
            await session.observe(given)
        assert session.position == 0
        assert (await session.observe(iter(()))).tokens == 0


async def test_too_long_a_turn_is_refused_whole_or_cut_cleanly(open_store, ids) -> None:
    async with open_store(max_turn_tokens=100) as runtime:
        session = await runtime.session("a")
        with pytest.raises(ConfigError, match="max_turn_tokens is 100"):
            await session.observe(ids)
        assert session.position == 0

        async def forever():
            while True:
                yield ids[:30]

        with pytest.raises(ConfigError, match="max_turn_tokens"):
            await session.observe(forever())
        assert session.position == 90
        assert (await session.observe(ids[:5])).position == 95


@pytest.mark.parametrize("name", ["a/b", "..", "../../etc", "ü ñ", "x" * 5000])
async def test_any_id_is_a_session_of_its_own(open_store, tmp_path, name) -> None:
    async with open_store() as runtime:
        session = await runtime.session(name)
        assert await runtime.session(name) is session
        await session.observe("hello")
        assert [info.id for info in await runtime.sessions()] == [name]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


async def test_ids_that_cannot_be_are_refused(open_store) -> None:
    async with open_store() as runtime:
        for name in ("", None, 3, "\ud800"):
            with pytest.raises(ConfigError):
                await runtime.session(name)


async def test_another_model_or_other_sizes_are_refused_by_name(open_store, ids) -> None:
    async with open_store() as runtime:
        await (await runtime.session("a")).observe(ids[:50])
    others = [
        ({"model": tiny_model(seed=1, dtype=torch.float64)}, "values"),
        ({"model": tiny_model(dtype=torch.float64, hidden_size=32)}, "config"),
        ({"tokenizer": None}, "tokenizer"),
        ({"window_tokens": 32}, "window_tokens=16.*window_tokens=32"),
        ({"memory_layers": (2,)}, "memory_layers"),
    ]
    for choice, message in others:
        async with open_store(**choice) as runtime:
            with pytest.raises(IncompatibleMemoryError, match=message):
                await runtime.session("a")


async def test_another_dtype_of_the_same_weights_is_accepted(open_store, ids) -> None:
    single = tiny_model()
    async with open_store(model=single) as runtime:
        await (await runtime.session("a")).observe(ids[:100])
    async with open_store() as runtime:
        assert (await runtime.session("a")).position == 100


@pytest.mark.parametrize(
    "fields",
    [
        {"window": 3},
        {"window_tokens": 0},
        {"window_tokens": "16"},
        {"retrieval": "maybe"},
        {"hot_bytes": -1},
        {"durability": "never"},
        {"memory_layers": (1.5,)},
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused(fields) -> None:
    with pytest.raises(ConfigError, match="MemoryConfig"):
        memtier.MemoryConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"span_block_tokens": 32}, {"memory_layers": (0,)}, {"memory_layers": (9,)}, {"span_blocks": 0}],
    ids=str,
)
async def test_a_config_that_contradicts_the_model_is_refused_at_open(open_store, fields) -> None:
    with pytest.raises(ConfigError):
        async with open_store(**fields):
            pass


async def test_a_store_that_is_a_file_is_refused(tmp_path, model) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="file"):
        memtier.open(tmp_path / "file", model=model)


async def test_a_model_of_another_kind_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="PreTrainedModel"):
        async with memtier.open(tmp_path / "store", model=torch.nn.Linear(1, 1)):
            pass
    with pytest.raises(ConfigError, match="cannot be loaded"):
        async with memtier.open(tmp_path / "store", model=str(tmp_path / "nothing")):
            pass


async def test_a_session_has_one_owner(open_store) -> None:
    async with open_store() as one, open_store() as two:
        await one.session("a")
        with pytest.raises(SessionBusyError):
            await two.session("a")
        await (await one.session("a")).close()
        await two.session("a")


async def test_sessions_are_limited_and_freed(open_store) -> None:
    async with open_store(max_open_sessions=1) as runtime:
        first = await runtime.session("a")
        with pytest.raises(SessionError, match="max_open_sessions"):
            await runtime.session("b")
        await first.close()
        with pytest.raises(SessionError, match="closed"):
            await first.observe("x")
        await runtime.session("b")


async def test_sessions_that_open_at_once_keep_the_limit_and_leave_no_lock_behind(open_store) -> None:
    async with open_store(max_open_sessions=2) as runtime:
        told: list[str] = []

        async def start(session_id: str) -> None:
            try:
                await runtime.session(session_id)
            except SessionError as error:
                told.append(str(error))

        async with anyio.create_task_group() as tasks:
            for session_id in ("a", "b", "c", "b"):
                tasks.start_soon(start, session_id)
        assert len(told) == 1 and "2 sessions are open, and max_open_sessions is 2" in told[0]
        assert runtime.stats().open_sessions == 2
        assert not runtime._sessions._opening


async def test_a_deleted_session_is_gone(open_store, tmp_path) -> None:
    async with open_store() as runtime:
        await (await runtime.session("a")).observe("hello")
        await runtime.delete_session("a")
        assert await runtime.sessions() == []
        with pytest.raises(SessionNotFoundError):
            await runtime.delete_session("a")
        assert (await runtime.session("a")).position == 0


async def test_closing_in_another_task_is_refused_clearly(open_store) -> None:
    runtime: Runtime = open_store()
    await runtime.__aenter__()
    with pytest.RaisesGroup(pytest.RaisesExc(SessionError, match="task")):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(runtime.__aexit__, None, None, None)
    await runtime.__aexit__(None, None, None)


async def test_the_model_is_given_back_as_it_came(open_store) -> None:
    model = tiny_model().train()
    async with open_store(model=model):
        assert not model.training
    assert model.training


def test_the_blocking_names_and_signatures_are_the_async_ones() -> None:
    pairs = [(memtier.Runtime, memtier.SyncRuntime), (memtier.Session, memtier.SyncSession)]
    for asynchronous, blocking in pairs:
        for name, method in inspect.getmembers(blocking, inspect.isfunction):
            if not name.startswith("_"):
                assert inspect.signature(method) == inspect.signature(getattr(asynchronous, name)), name
        internal = {"acknowledges_each_token", "close_within", "exclusive", "offline", "fork_to", "abandon"}
        missing = {n for n in vars(asynchronous) if not n.startswith("_")} - set(dir(blocking)) - internal
        assert not missing
    wanted = inspect.signature(memtier.open).replace(return_annotation=None)
    assert inspect.signature(memtier.open_sync).replace(return_annotation=None) == wanted


def test_everything_public_is_there() -> None:
    for name in memtier.__all__:
        assert getattr(memtier, name) is not None


def test_the_blocking_store_does_what_the_async_one_does(tmp_path: Path, tokenizer) -> None:
    with memtier.open_sync(tmp_path / "store", model=tiny_model(), tokenizer=tokenizer) as runtime:
        session = runtime.session("a")
        assert runtime.session("a") is session
        session.observe(FACT + RAIN * 2)
        for _ in session.generate("What", max_new_tokens=20):
            break
        text = "".join(session.generate("What", max_new_tokens=5, remember=False))
        assert isinstance(text, str)
        assert session.recall("Bodiv")
        assert session.inspect().position == session.position
        assert session.blocks().read_all().num_rows > 10
    assert [info.id for info in memtier.list_sessions(tmp_path / "store")] == ["a"]


async def test_whole_numbers_of_any_kind_are_taken_and_others_are_refused_by_name(open_store, ids) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:100])
        first, last, block = np.int64(50), np.uint32(60), np.int16(3)
        assert len(await session.history(first, last)) == 1
        assert session.blocks(first, last).read_all().num_rows == 3
        assert (await session.block(block)).block_id == 3
        with pytest.raises(ConfigError, match=r"start is 1\.5"):
            await session.history(1.5)
        with pytest.raises(ConfigError, match="end is '9'"):
            session.blocks(0, "9")
        with pytest.raises(ConfigError, match="block_id is None"):
            await session.block(None)


def test_the_blocking_store_keeps_no_session_that_was_closed(tmp_path: Path, tokenizer) -> None:
    with memtier.open_sync(tmp_path / "store", model=tiny_model(), tokenizer=tokenizer) as runtime:
        session = runtime.session("a")
        assert runtime.session("a") is session
        session.observe("It holds blocks in memory.")
        inner = weakref.ref(session._inner)
        session.close()
        del session
        gc.collect()
        assert inner() is None


async def test_how_a_tokenizer_was_called_last_is_no_part_of_it(open_store, ids, tmp_path) -> None:
    other = AutoTokenizer.from_pretrained(Path(memtier.__file__).parent / "models" / "nano")
    async with open_store() as runtime:
        await (await runtime.session("a")).observe(ids)
    other.pad_token = other.pad_token or other.eos_token or other.bos_token
    other(["a", "abc"], padding=True, truncation=True, max_length=2)
    async with open_store(tokenizer=other) as runtime:
        assert (await runtime.session("a")).position == len(ids)
