"""Sessions that generate at the same time share forward passes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from memtier.config import MemoryConfig
from memtier.errors import ModelError
from memtier.folder import Backends
from memtier.reader import Reader
from memtier.runtime import Runtime
from memtier.session import Session
from memtier.tiers.weights import WeightsTier
from memtier_backends.index_memory import MemoryIndexAdapter

pytestmark = pytest.mark.anyio

PROMPTS = [
    "The code for Bodiv is 4821. ",
    "It rained on the hills, and the river rose slowly. " * 3,
    "naïve café",
    "A list: one, two, three, four. " * 2,
    "x",
]


Call = Callable[[], Coroutine[Any, Any, None]]


async def sessions_of(runtime: Runtime) -> list[Session]:
    """Sessions that have read something, each standing somewhere else."""
    sessions = [await runtime.session(f"s{i}") for i in range(len(PROMPTS))]
    for i, session in enumerate(sessions):
        await session.observe("Read before. " * (2 * i + 1))
    return sessions


async def at_once(calls: list[Call]) -> None:
    with anyio.fail_after(90):
        async with anyio.create_task_group() as tasks:
            for call in calls:
                tasks.start_soon(call)


async def answers_of(runtime: Runtime, *, together: bool, **choices: Any) -> list[tuple[int, ...]]:
    sessions = await sessions_of(runtime)
    answers: list[tuple[int, ...]] = [()] * len(sessions)

    def answer(i: int) -> Call:
        async def call() -> None:
            generation = sessions[i].generate(PROMPTS[i], max_new_tokens=20 + i, **choices)
            async for _ in generation:
                pass
            answers[i] = generation.token_ids

        return call

    calls = [answer(i) for i in range(len(sessions))]
    if together:
        await at_once(calls)
    else:
        for call in calls:
            await call()
    return answers


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: Any) -> list[tuple[int, ...]]:
    """What each session answers by itself."""

    async def index(folder: Path, layers: list[int]) -> MemoryIndexAdapter:
        return MemoryIndexAdapter(layers)

    async def ask() -> list[tuple[int, ...]]:
        folder, config = tmp_path_factory.mktemp("alone"), MemoryConfig(max_batch_sessions=1)
        backends = Backends(index=index)
        async with Runtime(folder, model, tokenizer, config, "default", "auto", "auto", backends=backends) as runtime:
            return await answers_of(runtime, together=False)

    return anyio.run(ask)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"temperature": 1.0, "top_k": 20, "seed": 3},
        {"remember": False},
        {"retrieval": "recent"},
        {"retrieval": "off", "remember": False},
    ],
    ids=str,
)
async def test_sessions_at_once_say_what_each_says_alone(open_store, choices) -> None:
    async with open_store("alone", max_batch_sessions=1) as runtime:
        alone = await answers_of(runtime, together=False, **choices)
        assert set(runtime.stats().decode_batches) == {1}
    async with open_store("together") as runtime:
        together = await answers_of(runtime, together=True, **choices)
        batches = runtime.stats().decode_batches
    assert together == alone
    assert max(batches) > 1


@pytest.mark.parametrize("durability", ["turn", "token"])
@pytest.mark.parametrize("limit", [2, 8])
async def test_batches_keep_their_limit_and_the_journal_holds_every_token(open_store, alone, durability, limit) -> None:
    async with open_store("together", durability=durability, max_batch_sessions=limit) as runtime:
        assert await answers_of(runtime, together=True) == alone
        batches = runtime.stats().decode_batches
        for i, answer in enumerate(alone):
            session = await runtime.session(f"s{i}")
            kept = await session.timeline.tokens(session.position - len(answer), session.position)
            assert kept.tolist() == list(answer)
    assert 1 < max(batches) <= limit
    # the first token of an answer is chosen from the prompt's logits
    assert sum(size * count for size, count in batches.items()) == sum(len(answer) - 1 for answer in alone)


async def test_a_batched_session_goes_on_as_one_that_was_alone(open_store, ids) -> None:
    logits = []
    for name, together in (("alone", False), ("together", True)):
        async with open_store(name) as runtime:
            await answers_of(runtime, together=together)
        async with open_store(name) as runtime:
            sessions = [await runtime.session(f"s{i}") for i in range(len(PROMPTS))]
            logits.append([(await session.observe(ids[:40], logits=True)).logits for session in sessions])
    for one, two in zip(*logits, strict=True):
        torch.testing.assert_close(one, two, rtol=0.0, atol=1e-9)


async def test_looking_and_copying_in_the_middle_of_a_batch_change_nothing(open_store, alone) -> None:
    async with open_store("together") as runtime:
        sessions = await sessions_of(runtime)
        sizes = [session.stats().device_bytes for session in sessions]
        answers: list[tuple[int, ...]] = [()] * len(sessions)

        async def answer(i: int) -> None:
            generation = sessions[i].generate(PROMPTS[i], max_new_tokens=20 + i)
            async for _ in generation:
                assert sessions[i].stats().device_bytes == sizes[i]
                if len(generation.token_ids) == 10:
                    state = await sessions[i].state(1)
                    assert state["attention.keys"].shape[0] == 1
                    assert (await sessions[i].inspect()).position == sessions[i].position
            answers[i] = generation.token_ids

        await at_once([lambda i=i: answer(i) for i in range(len(sessions))])
        assert answers == alone
        assert max(runtime.stats().decode_batches) > 1


async def test_a_session_that_reads_takes_turns_with_those_that_generate(open_store, alone, ids) -> None:
    async with open_store("alone") as runtime:
        reading = await runtime.session("reading")
        wanted = (await reading.observe(ids * 4, logits=True)).logits
    async with open_store("together") as runtime:
        reading = await runtime.session("reading")
        seen = []

        async def read() -> None:
            for start in range(0, 4 * len(ids), 100):
                seen.append((await reading.observe((ids * 4)[start : start + 100], logits=True)).logits)

        async def answer() -> None:
            assert await answers_of(runtime, together=True) == alone

        await at_once([read, answer])
    torch.testing.assert_close(torch.cat(seen), wanted, rtol=0.0, atol=1e-9)


async def test_only_the_session_whose_step_is_refused_sees_the_error(open_store, alone, monkeypatch) -> None:
    async with open_store("together") as runtime:
        sessions = await sessions_of(runtime)
        guilty = sessions[1].timeline.reader
        steps = {"left": 8}
        step, decode = Reader.step, WeightsTier.decode

        def refusing_step(reader: Reader, tokens: Any, *rest: Any, **named: Any) -> Any:
            if reader is guilty and len(tokens) == 1 and steps["left"] <= 0:
                steps["left"] = 10_000
                reader.drop()
                raise ModelError("not finite.")
            return step(reader, tokens, *rest, **named)

        def refusing_decode(weights: WeightsTier, tokens: Any, batch: Any) -> torch.Tensor:
            steps["left"] -= 1
            logits = decode(weights, tokens, batch)
            if steps["left"] <= 0 and guilty.cache in batch.caches:
                raise ModelError("not finite.")
            return logits

        monkeypatch.setattr(Reader, "step", refusing_step)
        monkeypatch.setattr(WeightsTier, "decode", refusing_decode)
        answers: list[tuple[int, ...]] = [()] * len(sessions)
        errors: list[tuple[int, str]] = []

        async def answer(i: int) -> None:
            generation = sessions[i].generate(PROMPTS[i], max_new_tokens=20 + i)
            try:
                async for _ in generation:
                    pass
            except ModelError as error:
                errors.append((i, str(error)))
            answers[i] = generation.token_ids

        await at_once([lambda i=i: answer(i) for i in range(len(sessions))])
        ((refused, told),) = errors
        assert refused == 1
        assert "taken back" in told
        assert [a for i, a in enumerate(answers) if i != 1] == [a for i, a in enumerate(alone) if i != 1]
        # the guilty session lost the token that was refused, and goes on
        kept = answers[1][:-1]
        assert kept == alone[1][: len(kept)]
        rest = sessions[1].generate(max_new_tokens=5)
        async for _ in rest:
            pass
        assert rest.token_ids == alone[1][len(kept) : len(kept) + 5]


async def test_a_cancelled_generation_leaves_the_others_of_its_batch(open_store, alone) -> None:
    async with open_store("together") as runtime:
        sessions = await sessions_of(runtime)
        answers: list[tuple[int, ...]] = [()] * len(sessions)

        async def answer(i: int) -> None:
            generation = sessions[i].generate(PROMPTS[i], max_new_tokens=20 + i)
            with anyio.CancelScope() as scope:
                async for _ in generation:
                    if i == 2 and len(generation.token_ids) >= 12:
                        scope.cancel()
            answers[i] = generation.token_ids

        await at_once([lambda i=i: answer(i) for i in range(len(sessions))])
        assert answers[2] == alone[2][: len(answers[2])]
        assert len(answers[2]) < len(alone[2])
        assert [a for i, a in enumerate(answers) if i != 2] == [a for i, a in enumerate(alone) if i != 2]
        assert (await sessions[2].observe("more")).tokens == 4


async def test_a_session_that_rests_holds_up_no_other_and_keeps_no_batch_alive(open_store, alone) -> None:
    async with open_store("together") as runtime:
        sessions = await sessions_of(runtime)
        answers: list[tuple[int, ...]] = [()] * len(sessions)
        others_left, done = {0, 1, 2, 4}, anyio.Event()

        async def answer(i: int) -> None:
            generation = sessions[i].generate(PROMPTS[i], max_new_tokens=20 + i)
            async for _ in generation:
                if i == 3 and len(generation.token_ids) >= 8 and not done.is_set():
                    await done.wait()
                    cache = sessions[i].timeline.reader.cache
                    assert cache is not None
                    assert cache.held[1] is None, "its states are its own"
            answers[i] = generation.token_ids
            others_left.discard(i)
            if not others_left:
                done.set()

        await at_once([lambda i=i: answer(i) for i in range(len(sessions))])
        assert answers == alone


async def test_a_choice_that_fails_takes_the_token_before_it_back(open_store, ids) -> None:
    def fail(logits: torch.Tensor) -> int:
        raise RuntimeError("no choice")

    async with open_store(tokenizer=None) as runtime:
        session = await runtime.session("a")
        generation = session.generate(ids[:61], max_new_tokens=10)
        await anext(generation)
        await anext(generation)
        generation._sampler = fail  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(ModelError, match="no choice"):
            await anext(generation)
        assert session.position == 62
        seen = (await session.observe(ids[:40], logits=True)).logits
    async with open_store("reference", tokenizer=None) as runtime:
        session = await runtime.session("a")
        _ = [token async for token in session.generate(ids[:61], max_new_tokens=1)]
        wanted = (await session.observe(ids[:40], logits=True)).logits
    torch.testing.assert_close(seen, wanted, rtol=0.0, atol=1e-9)
