"""Generating: what is remembered, what is not, and how it may end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from memtier.errors import ConfigError, SessionError
from memtier.session import Session

pytestmark = pytest.mark.anyio

TEXT = "The code for Bodiv is 4821. " + "It rained on the hills, and the river rose — slowly. " * 4


async def state_of(session: Session) -> dict[str, torch.Tensor]:
    cache = session.timeline.reader.cache
    assert cache is not None
    return {name: tensor.clone() for name, tensor in cache.state_dict().items()}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.name.endswith("-shm")
    }


async def text_of(session: Session, prompt: Any, **choices: Any) -> str:
    return "".join([piece async for piece in session.generate(prompt, **choices)])


async def test_what_is_generated_is_part_of_the_session(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        generation = session.generate(TEXT, max_new_tokens=10)
        text = "".join([piece async for piece in generation])
        assert generation.text == text
        assert session.position == 1 + len(TEXT.encode()) + len(generation.token_ids)
        turns = await session.timeline.history.turns(0, session.position)
        assert [turn.role for turn in turns] == ["user", "assistant"]
        assert turns[0].text == TEXT


async def test_greedy_and_seeded_answers_repeat(open_store) -> None:
    async with open_store() as runtime:
        said = {}
        for name, choices in (("greedy", {}), ("seeded", {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": 5})):
            one, other = [
                await text_of(await runtime.session(f"{name} {i}"), TEXT, max_new_tokens=12, **choices)
                for i in range(2)
            ]
            assert one == other
            said[name] = one
        assert said["greedy"] != said["seeded"]


@pytest.mark.parametrize("durability", ["turn", "token"])
async def test_an_answer_in_parts_is_the_answer_at_once(open_store, durability) -> None:
    async with open_store(durability=durability) as runtime:
        one, parts = await runtime.session("one"), await runtime.session("parts")
        whole = one.generate(TEXT[:80], max_new_tokens=12)
        _ = [piece async for piece in whole]
        tokens = []
        for i, n in enumerate((1, 5, 6)):
            part = parts.generate(TEXT[:80] if i == 0 else None, max_new_tokens=n)
            _ = [piece async for piece in part]
            tokens += part.token_ids
        assert tuple(tokens[: len(whole.token_ids)]) == whole.token_ids


async def test_leaving_the_loop_early_leaves_the_session_usable(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        generation = session.generate(TEXT, max_new_tokens=50)
        async for _ in generation:
            break
        sampled = len(generation.token_ids)
        report = await session.observe("more")
        assert generation.finish_reason == "closed"
        assert report.position == 1 + len(TEXT.encode()) + sampled + 4
        assert [piece async for piece in generation] == []


async def test_a_cancelled_generation_leaves_the_session_usable(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        generation = session.generate(TEXT, max_new_tokens=10_000)
        with anyio.CancelScope() as scope:
            async for _ in generation:
                if len(generation.token_ids) >= 3:
                    scope.cancel()
        assert scope.cancelled_caught
        assert generation.finish_reason == "cancelled"
        assert session.position == 1 + len(TEXT.encode()) + len(generation.token_ids)
        assert (await session.observe("more")).tokens == 4


async def test_a_cancelled_observe_keeps_what_was_acknowledged(open_store, ids) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        with anyio.CancelScope() as scope:
            await session.observe(ids * 10, on_progress=lambda done, total: scope.cancel())
        assert scope.cancelled_caught
        assert session.position == 512
        assert (await session.observe(ids[:5])).position == 517


@pytest.mark.parametrize("prompt", [None, "What is the code for Bodiv?"])
async def test_what_is_not_remembered_leaves_the_session_as_it_was(open_store, tmp_path, prompt) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(TEXT)
        _ = await text_of(session, None, max_new_tokens=3)
        await session.flush()
        folder = next(path.parent for path in tmp_path.rglob("journal.sqlite3"))
        before = await state_of(session), session.position, await session.inspect(), session.stats()
        files = bytes_of(folder)
        aside = await text_of(session, prompt, max_new_tokens=30, remember=False)
        after = await state_of(session), session.position, await session.inspect(), session.stats()
        assert files == bytes_of(folder)
        assert before[1:] == after[1:]
        assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
        # and it is the answer that would have been remembered
        assert await text_of(session, prompt, max_new_tokens=30) == aside


async def test_a_stop_text_is_held_back(open_store, monkeypatch) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        whole = await text_of(session, TEXT, max_new_tokens=40, remember=False)
        stop = whole[5:8]
        generation = session.generate(TEXT, max_new_tokens=40, stop=[stop], remember=False)
        text = "".join([piece async for piece in generation])
        assert generation.finish_reason == "stop"
        assert text == whole[: whole.index(stop)]


async def test_a_model_without_a_tokenizer_yields_ids(open_store, ids) -> None:
    async with open_store(tokenizer=None) as runtime:
        session = await runtime.session("a")
        generation = session.generate(ids[:50], max_new_tokens=5)
        assert tuple([piece async for piece in generation]) == generation.token_ids
        with pytest.raises(ConfigError, match="no tokenizer"):
            await session.observe("text")


@pytest.mark.parametrize(
    "choices",
    [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"stop": [""]}, {"retrieval": "maybe"}],
    ids=str,
)
async def test_a_choice_out_of_range_is_refused_at_once(open_store, choices) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        with pytest.raises(ConfigError):
            session.generate("x", **choices)


async def test_an_empty_session_has_nothing_to_go_on_from(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        with pytest.raises(SessionError, match="empty"):
            await anext(session.generate())


async def test_looking_does_not_wait_for_a_running_answer(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        async with session.generate(TEXT, max_new_tokens=50) as generation:
            await anext(generation)
            async with session.lock:  # as if a step were under way
                with anyio.fail_after(20):
                    report = await session.inspect()
                    block = await session.block(0)
                    state = await session.state(1)
                    table = session.blocks(0, 40).read_all()
            await anext(generation)
    assert report.context.window_text
    assert block.text == TEXT[:3]
    assert not block.keys[0].flags.writeable
    assert "fading.ssm" in state
    assert table.num_rows == 10
