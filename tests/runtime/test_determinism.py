"""The same tokens give the same logits, however calls are split and whatever storage does meanwhile."""

from __future__ import annotations

import anyio
import pytest
import torch

from memtier.session import Session
from memtier_backends.faults import Faults

pytestmark = pytest.mark.anyio

EXACT = {"rtol": 0.0, "atol": 1e-9}


async def logits_of(session: Session, ids: list[int], calls: list[int]) -> torch.Tensor:
    """Logits of `ids` observed in calls of the given lengths, the last call taking the rest."""
    parts, at = [], 0
    for length in [*calls, len(ids)]:
        piece = ids[at : at + length]
        if piece:
            parts.append((await session.observe(piece, logits=True)).logits)
        at += length
    return torch.cat(parts)


@pytest.fixture
async def whole(open_store, ids) -> torch.Tensor:
    async with open_store("whole") as runtime:
        return await logits_of(await runtime.session("a"), ids, [])


@pytest.mark.parametrize(
    "calls",
    [[1] * 299, [7] * 42, [64, 1, 3, 100, 2], [16, 16, 16, 17], [299]],
    ids=["one by one", "sevens", "ragged", "windows", "all but one"],
)
async def test_any_split_of_tokens_into_calls_gives_the_same_logits(open_store, ids, whole, calls) -> None:
    async with open_store() as runtime:
        split = await logits_of(await runtime.session("a"), ids, calls)
    torch.testing.assert_close(split, whole, **EXACT)


async def test_an_iterator_of_ids_gives_what_one_call_gives(open_store, ids, whole) -> None:
    async with open_store() as runtime:
        report = await (await runtime.session("a")).observe(iter(ids), logits=True)
    torch.testing.assert_close(report.logits, whole, **EXACT)


async def test_text_split_inside_a_character_gives_what_the_whole_text_gives(open_store) -> None:
    text = "naïve café — déjà vu " * 8
    data = text.encode()
    async with open_store() as runtime:
        one = await (await runtime.session("one")).observe(text, logits=True)
        cut = await (await runtime.session("cut")).observe((data[i : i + 1] for i in range(len(data))), logits=True)
    assert one.tokens == cut.tokens == len(data) + 1
    torch.testing.assert_close(cut.logits, one.logits, **EXACT)


@pytest.mark.parametrize(
    "limits",
    [
        {"hot_bytes": 0},
        {"hot_bytes": 2**20},
        {"hot_bytes": None},
        {"landmark_bytes": 0},
        {"landmark_bytes": 600, "hot_bytes": 1000},
        {"landmark_bytes": None},
        {"inbox_blocks": 1},
    ],
    ids=str,
)
async def test_host_memory_limits_change_no_logit(open_store, ids, whole, limits) -> None:
    async with open_store(**limits) as runtime:
        session = await runtime.session("a")
        seen = []
        for at in range(0, len(ids), 50):
            seen.append((await session.observe(ids[at : at + 50], logits=True)).logits)
            await session.flush()
        stats = session.stats()
    torch.testing.assert_close(torch.cat(seen), whole, **EXACT)
    if limits.get("hot_bytes") == 0:
        assert stats.hot_bytes == 0
        assert stats.blocks_from_disk > 0
    if limits.get("landmark_bytes") == 0:
        # those of the newest blocks, which were not on disk yet when they came
        assert stats.landmark_bytes < stats.blocks * 2 * 8 * 4 / 4


async def test_hot_bytes_change_not_a_bit(open_store, ids) -> None:
    seen = []
    for hot in (0, 2**20, None):
        async with open_store(f"hot-{hot}", hot_bytes=hot) as runtime:
            session = await runtime.session("a")
            await session.observe(ids[:150])
            await session.flush()
            seen.append((await session.observe(ids[150:], logits=True)).logits)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])


async def test_a_slow_store_changes_no_token(open_store, ids, whole) -> None:
    slow = Faults(latency_seconds=0.2, operations=frozenset({"segments.put", "journal.add_segment", "index.add"}))
    async with open_store(faults=slow) as runtime:
        seen = await logits_of(await runtime.session("a"), ids, [100, 100])
    torch.testing.assert_close(seen, whole, **EXACT)


@pytest.mark.parametrize("operation", ["segments.put", "journal.add_segment", "index.add", "journal.commit"])
async def test_a_store_that_fails_twice_and_recovers_changes_no_token(open_store, ids, whole, operation) -> None:
    faults = Faults(operations=frozenset({operation}))
    async with open_store(faults=faults) as runtime:
        session = await runtime.session("a")
        faults.fail_times = 2
        seen = await logits_of(session, ids, [100, 100])
        await session.flush()
        assert faults.fail_times == 0
        assert session.stats().lag_tokens == 0
    torch.testing.assert_close(seen, whole, **EXACT)


async def test_two_sessions_interleaved_give_what_each_gives_alone(open_store, ids, whole) -> None:
    backwards = ids[::-1]
    async with open_store("alone") as runtime:
        alone = await logits_of(await runtime.session("b"), backwards, [])
    async with open_store() as runtime:
        a, b = await runtime.session("a"), await runtime.session("b")
        seen: dict[str, torch.Tensor] = {}

        async def run(name: str, session: Session, tokens: list[int]) -> None:
            seen[name] = await logits_of(session, tokens, [11] * 20)

        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run, "a", a, ids)
                tasks.start_soon(run, "b", b, backwards)
    torch.testing.assert_close(seen["a"], whole, **EXACT)
    torch.testing.assert_close(seen["b"], alone, **EXACT)


@pytest.mark.parametrize("mode", ["off", "random", "recent", "on"])
async def test_a_control_depends_on_positions_alone(open_store, ids, mode) -> None:
    async with open_store("one", retrieval=mode) as runtime:
        one = await logits_of(await runtime.session("a"), ids, [])
    async with open_store("two", retrieval=mode, hot_bytes=0, landmark_bytes=0) as runtime:
        two = await logits_of(await runtime.session("a"), ids, [33, 50, 1])
    torch.testing.assert_close(one, two, **EXACT)


async def test_the_controls_differ_from_retrieval(open_store, ids, whole) -> None:
    for mode in ("off", "random", "recent"):
        async with open_store(mode, retrieval=mode) as runtime:
            session = await runtime.session("a")
            seen = await logits_of(session, ids, [])
            chosen = [b.block_id for layer in (await session.inspect()).storage.last_selection for b in layer.blocks]
            newest = session.stats().blocks
        assert not torch.allclose(seen, whole, atol=1e-6)
        if mode == "off":
            assert chosen == []
        if mode == "recent":
            assert min(chosen) >= newest - 4
