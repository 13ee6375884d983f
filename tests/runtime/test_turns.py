"""Calls on a session that come from within a call on it, and calls that only wait for one another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from memtier import SessionError

pytestmark = pytest.mark.anyio

FROM_WITHIN = "'a' was asked for something from within a call on it"

CALLS: dict[str, Any] = {
    "observe": lambda session: session.observe("x"),
    "generate": lambda session: anext(session.generate("x")),
    "aside": lambda session: anext(session.generate("x", remember=False)),
    "recall": lambda session: session.recall("x"),
    "flush": lambda session: session.flush(),
    "checkpoint": lambda session: session.checkpoint("c"),
    "restore": lambda session: session.restore("c"),
    "fork": lambda session: session.fork("b"),
    "forget": lambda session: session.forget(start=0, end=1),
    "close": lambda session: session.close(),
    "aclose": lambda session: session.generate("x").aclose(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
async def test_an_iterator_that_asks_the_session_it_is_read_by_is_told_so(open_store, call: Any) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe("The rain in Spain")

        async def pieces() -> AsyncIterator[str]:
            yield "one"
            await call(session)
            yield "two"

        with anyio.fail_after(5), pytest.raises(SessionError, match=FROM_WITHIN):
            await session.observe(pieces())
        # what came before stands, and the session goes on
        assert [turn.text for turn in await session.history()] == ["The rain in Spain", "one"]
        await session.observe("three")


async def test_a_session_reads_no_answer_of_its_own_while_that_is_written(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe("The rain in Spain")
        with anyio.fail_after(5), pytest.raises(SessionError, match=FROM_WITHIN):
            await session.observe(session.generate("What", max_new_tokens=3))
        answer = session.generate("What", max_new_tokens=3)
        await session.observe([piece async for piece in answer] or "nothing")


async def test_a_session_is_not_deleted_by_what_it_reads(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")

        async def pieces() -> AsyncIterator[str]:
            await runtime.delete_session("a")
            yield "one"

        with anyio.fail_after(5), pytest.raises(SessionError, match=FROM_WITHIN):
            await session.observe(pieces())
        assert [info.id for info in await runtime.sessions()] == ["a"]


async def test_a_generation_is_not_advanced_by_its_own_prompt(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")

        async def pieces() -> AsyncIterator[str]:
            yield await anext(answer)

        answer = session.generate(pieces())
        with anyio.fail_after(5), pytest.raises(SessionError, match="this generation was asked"):
            await anext(answer)


async def test_one_session_reads_the_answer_of_another(open_store) -> None:
    async with open_store() as runtime:
        first, second = await runtime.session("a"), await runtime.session("b")
        with anyio.fail_after(5):
            report = await second.observe(first.generate("What", max_new_tokens=3))
        assert report.position == second.position


async def test_a_task_that_began_within_a_call_may_ask_once_that_is_over(open_store) -> None:
    async with open_store() as runtime, anyio.create_task_group() as tasks:
        session = await runtime.session("a")
        over = anyio.Event()

        async def later() -> None:
            await over.wait()
            await session.observe("two")

        async def pieces() -> AsyncIterator[str]:
            tasks.start_soon(later)
            yield "one"

        with anyio.fail_after(5):
            await session.observe(pieces())
            over.set()
            await session.observe("three")
    assert session.position > 0


async def test_calls_of_several_tasks_wait_for_one_another(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                for text in ("one", "two", "three"):
                    tasks.start_soon(session.observe, text)
        assert sorted(turn.text for turn in await session.history()) == ["one", "three", "two"]
