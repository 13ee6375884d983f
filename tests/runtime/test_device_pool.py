"""The device pool changes where blocks lie and not a bit of what the model sees."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from memtier.errors import ConfigError, ModelError, StorageError
from memtier.reader import Reader
from memtier.testing import tiny_model
from memtier.tiers.device_pool import DevicePool

BLOCK = (4, 1, 8)
BLOCK_BYTES = 2 * 4 * 8 * 2  # K and V of the tiny model, float16
CPU = torch.device("cpu")


def blocks_of(keys: Any) -> list[torch.Tensor]:
    """K and V that tell which key they are of."""
    return [torch.full((2, *BLOCK), float(hash(key) % 1000), dtype=torch.float16) for key in keys]


def held(pool: DevicePool) -> list[tuple[int, int, int]]:
    return list(pool._slot_of)


def make_pool(slots: int) -> DevicePool:
    pool = DevicePool(slots, BLOCK, torch.float16, CPU)
    pool.begin_step()
    return pool


class TestSlots:
    def test_the_least_recently_used_block_gives_way_and_a_slot_holds_the_bits_that_were_loaded(self) -> None:
        pool = make_pool(3)
        a, b, c, d = ((1, 0, block) for block in range(4))
        pool.place([a, b, c], blocks_of)
        pool.begin_step()
        pool.place([a], blocks_of)
        slots = pool.place([d], blocks_of)
        assert slots is not None
        (slot,) = slots
        assert held(pool) == [c, a, d]
        assert torch.equal(pool.keys[slot], blocks_of([d])[0][0])
        assert torch.equal(pool.values[slot], blocks_of([d])[0][1])
        assert (pool.hits, pool.misses, pool.hit_rate) == (1, 4, 0.2)

    def test_a_block_that_the_running_step_uses_stays(self) -> None:
        pool = make_pool(3)
        first = pool.place([(1, 0, 0), (1, 0, 1)], blocks_of)
        assert pool.place([(1, 1, 0), (1, 1, 1)], blocks_of) is None
        assert pool.place([(1, 0, 1), (1, 1, 0)], blocks_of) is not None
        assert pool.place([(1, 0, 0), (1, 0, 1)], blocks_of) == first
        assert pool.refusals == 1
        pool.begin_step()
        assert pool.place([(1, 1, 1)], blocks_of) is not None

    def test_a_read_that_fails_changes_nothing(self) -> None:
        pool = make_pool(2)
        pool.place([(1, 0, 0), (1, 0, 1)], blocks_of)
        pool.begin_step()

        def fail(keys: Any) -> list[torch.Tensor]:
            raise StorageError("damaged")

        with pytest.raises(StorageError):
            pool.place([(1, 0, 0), (1, 0, 5)], fail)
        assert held(pool) == [(1, 0, 0), (1, 0, 1)]
        assert pool.place([(1, 0, 5), (1, 0, 6)], blocks_of) is not None

    def test_an_owner_lets_go_of_its_own_blocks_only(self) -> None:
        pool = make_pool(4)
        pool.place([(1, 0, 0), (1, 0, 7), (2, 0, 7)], blocks_of)
        pool.free(1, 5)
        assert held(pool) == [(1, 0, 0), (2, 0, 7)]
        pool.free(1)
        assert held(pool) == [(2, 0, 7)]
        pool.begin_step()
        assert pool.place([(3, 0, i) for i in range(3)], blocks_of) is not None


pytestmark = pytest.mark.anyio


async def logits_of(runtime, ids: list[int]) -> torch.Tensor:
    session = await runtime.session("a")
    seen = []
    for start in range(0, len(ids), 37):
        seen.append((await session.observe(ids[start : start + 37], logits=True)).logits)
        await session.flush()
    one_by_one = [(await session.observe([i], logits=True)).logits for i in ids[:20]]
    return torch.cat(seen + one_by_one)


VARIANTS = {
    "compact": {},
    "sinks, no positions": {"far_positions": "none", "sink_tokens": 2},
    "sinks, true positions": {"far_positions": "true", "sink_tokens": 2},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
async def test_no_pool_a_small_one_and_a_large_one_give_the_same_bits(open_store, ids, overrides, dtype) -> None:
    model = tiny_model(dtype=dtype, **overrides)
    seen, refusals = [], []
    # a step here may need some 20 blocks a layer: 8 and 30 slots serve a few steps and let others pass by
    for pool in (0, 8 * BLOCK_BYTES, 30 * BLOCK_BYTES, 10_000 * BLOCK_BYTES):
        async with open_store(f"pool-{pool}", model=model, device_pool_bytes=pool, hot_bytes=0) as runtime:
            seen.append(await logits_of(runtime, ids))
            stats = runtime.stats()
            refusals.append(stats.pool_refusals)
            assert stats.pool_bytes == pool
            assert (stats.pool_hits > 0) == (pool > 0)
    assert all(torch.equal(logits, seen[0]) for logits in seen)
    assert refusals[1] > 0 == refusals[-1]


async def test_the_pool_never_grows_and_reads_a_block_once_while_it_has_room(open_store, ids) -> None:
    async with open_store(device_pool_bytes=10_000 * BLOCK_BYTES, hot_bytes=0) as runtime:
        pool = runtime._pool
        pointers = pool.keys.data_ptr(), pool.values.data_ptr()
        session = await runtime.session("a")
        for start in range(0, len(ids), 50):
            await session.observe(ids[start : start + 50])
        stats = runtime.stats()
        assert (pool.keys.data_ptr(), pool.values.data_ptr()) == pointers
        assert stats.pool_misses == stats.pool_blocks <= 2 * stats.sessions[0].blocks
        assert 0.5 < stats.pool_hit_rate < 1


async def test_a_step_that_failed_leaves_none_of_its_blocks_in_the_pool(open_store, ids, monkeypatch) -> None:
    async with open_store(device_pool_bytes=10_000 * BLOCK_BYTES) as runtime:
        session, other = await runtime.session("a"), await runtime.session("b")
        await session.observe(ids[:200])
        await other.observe(ids[:100])
        others = [key for key in held(runtime._pool) if key[0] == other.timeline.reader._selector.owner]

        def refuse(reader: Reader, cache: Any) -> Any:
            raise ModelError("not finite.")

        with monkeypatch.context() as patched:
            patched.setattr(Reader, "_take_sealed", refuse)
            with pytest.raises(ModelError):
                await session.observe(ids[100:250])
        assert held(runtime._pool) == others
        seen = await session.observe(ids[200:], logits=True)
    async with open_store("reference") as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:200])
        wanted = await session.observe(ids[200:], logits=True)
    torch.testing.assert_close(seen.logits, wanted.logits, rtol=0.0, atol=1e-9)


async def test_blocks_of_an_answer_that_is_not_remembered_are_never_the_sessions(open_store, ids) -> None:
    answers, logits = [], []
    for pool in (0, 10_000 * BLOCK_BYTES):
        async with open_store(f"pool-{pool}", device_pool_bytes=pool) as runtime:
            session = await runtime.session("a")
            await session.observe(ids[:150])
            generation = session.generate(ids[:90], max_new_tokens=20, remember=False)
            answers.append([piece async for piece in generation])
            if pool:
                owners = {key[0] for key in held(runtime._pool)}
                assert owners == {session.timeline.reader._selector.owner}
                newest = max(key[2] for key in held(runtime._pool))
                assert newest < session.stats().blocks
            logits.append((await session.observe(ids[150:], logits=True)).logits)
    assert answers[0] == answers[1]
    assert torch.equal(logits[0], logits[1])


async def test_an_answer_in_progress_keeps_its_blocks_under_a_name_of_its_own(open_store, ids) -> None:
    async with open_store(device_pool_bytes=10_000 * BLOCK_BYTES) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:60])
        sealed = session.stats().blocks
        async with session.generate(ids[60:200], max_new_tokens=20, remember=False) as generation:
            await anext(generation)
            newer = {key[0] for key in held(runtime._pool) if key[2] >= sealed}
            assert len(newer) == 1
            assert session.timeline.reader._selector.owner not in newer
        assert all(key[2] < sealed for key in held(runtime._pool))


async def test_a_closed_session_leaves_the_pool(open_store, ids) -> None:
    async with open_store(device_pool_bytes=10_000 * BLOCK_BYTES) as runtime:
        session = await runtime.session("a")
        await session.observe(ids)
        assert runtime.stats().pool_blocks > 0
        await session.close()
        assert runtime.stats().pool_blocks == 0


async def test_on_a_cpu_there_is_no_pool_unless_it_is_asked_for(open_store, ids) -> None:
    async with open_store() as runtime:
        await (await runtime.session("a")).observe(ids)
        stats = runtime.stats()
    assert (stats.pool_bytes, stats.pool_hits, stats.pool_misses, stats.pool_hit_rate) == (0, 0, 0, None)


async def test_a_model_without_memory_layers_has_no_pool(open_store, ids) -> None:
    async with open_store(model=tiny_model(memory_layers=[]), device_pool_bytes=2**20) as runtime:
        await (await runtime.session("a")).observe(ids)
        assert runtime.stats().pool_bytes == 0


@pytest.mark.parametrize("size", [1, BLOCK_BYTES - 1, 2**60])
async def test_a_pool_that_cannot_be_is_refused_with_what_would_do(open_store, size) -> None:
    with pytest.raises(ConfigError, match=r"device_pool_bytes is \d+.*0 for no pool"):
        async with open_store(device_pool_bytes=size):
            pass


async def test_a_pool_smaller_than_a_step_says_so(open_store, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="memtier"):
        async with open_store(device_pool_bytes=8 * BLOCK_BYTES):
            pass
    (message,) = [record.message for record in caplog.records if "device pool" in record.message]
    assert "holds 8 blocks" in message
    assert f"device_pool_bytes={2 * 129 * 2 * BLOCK_BYTES}" in message
