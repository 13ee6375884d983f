"""Whoever cancels a call, and however: it ends between steps, and the session is what its journal says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch

from memtier.errors import SessionError
from memtier.reader import Reader

pytestmark = pytest.mark.anyio

EXACT = {"rtol": 0.0, "atol": 1e-9}


class Canceller:
    """Cancels a task as `asyncio.wait_for` and Ctrl-C do it, while the model is at a step, which then goes on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        self.task: asyncio.Task[Any] | None = None
        self.wait = 0  # steps to let by
        self._loop = asyncio.get_running_loop()
        real = getattr(Reader, method)

        def step(reader: Reader, *arguments: Any, **options: Any) -> Any:
            task = self.task
            if task is not None and self.wait == 0:
                self.task, seen = None, threading.Event()
                self._loop.call_soon_threadsafe(task.cancel)
                self._loop.call_soon_threadsafe(lambda: self._loop.call_soon(seen.set))
                assert seen.wait(60)
            self.wait -= self.wait > 0
            return real(reader, *arguments, **options)

        monkeypatch.setattr(Reader, method, step)

    async def cancels(self, call: Any, *, after: int = 0) -> None:
        task = asyncio.create_task(call)
        self.wait, self.task = after, task
        with pytest.raises(asyncio.CancelledError):
            await task
        assert self.task is None, "it was cancelled at a step"


async def is_what_its_journal_says(session, runtime, ids) -> None:
    """It answers as a session that read the same tokens, and everything it read can be written."""
    await session.flush()
    told = (await session.timeline.tokens(0, session.position)).tolist()
    other = await runtime.session("other")
    await other.observe(told)
    logits = [(await one.observe(ids[:40], logits=True)).logits for one in (session, other)]
    torch.testing.assert_close(*logits, **EXACT)


@pytest.mark.parametrize("after", [0, 1])
async def test_a_task_that_is_cancelled_while_it_observes(open_store, ids, monkeypatch, after) -> None:
    async with open_store(snapshot_every_tokens=128) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:100])
        with anyio.fail_after(60):
            await Canceller(monkeypatch, "step").cancels(session.observe(ids * 2), after=after)
            assert session.position == (128, 256)[after]
            await is_what_its_journal_says(session, runtime, ids)


@pytest.mark.parametrize("durability", ["turn", "token"])
@pytest.mark.parametrize("after", [0, 1, 5])
async def test_a_task_that_is_cancelled_while_it_generates(open_store, ids, monkeypatch, durability, after) -> None:
    async with open_store(durability=durability, snapshot_every_tokens=128) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:125])
        generation = session.generate(ids[:3], max_new_tokens=1000)

        async def eat() -> None:
            async for _ in generation:
                pass

        with anyio.fail_after(60):
            # the prompt is read in one step, then each token
            await Canceller(monkeypatch, "step").cancels(eat(), after=1 + after)
            assert generation.finish_reason == "cancelled"
            assert session.position == 128 + len(generation.token_ids)
            other = await runtime.session("other")
            await other.observe(ids[:125])
            async for _ in other.generate(ids[:3], max_new_tokens=len(generation.token_ids)):
                pass
            await session.flush()
            logits = [(await one.observe(ids[:40], logits=True)).logits for one in (session, other)]
            torch.testing.assert_close(*logits, **EXACT)


async def test_a_task_that_is_cancelled_while_it_opens_a_session_leaves_it_free(open_store, ids, monkeypatch) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids)
        await session.close()
        with anyio.fail_after(60):
            await Canceller(monkeypatch, "begin").cancels(runtime.session("new"))
            await (await runtime.session("new")).observe(ids)
            await Canceller(monkeypatch, "restore").cancels(runtime.session("a"))
            await is_what_its_journal_says(await runtime.session("a"), runtime, ids)


CALLS: dict[str, Callable[[Any, Any, int], Any]] = {
    "session": lambda runtime, session, n: runtime.session(f"new {n}"),
    "fork": lambda runtime, session, n: session.fork(f"fork {n}"),
    "checkpoint": lambda runtime, session, n: session.checkpoint(f"kept {n}"),
    "restore": lambda runtime, session, n: session.restore("kept"),
    "forget": lambda runtime, session, n: session.forget(start=10, end=11),
    "recall": lambda runtime, session, n: session.recall("a"),
    "flush": lambda runtime, session, n: session.flush(),
}


@pytest.mark.parametrize("how", ["scope", "task"])
@pytest.mark.parametrize("name", CALLS)
async def test_a_call_that_is_cancelled_anywhere_ends_and_leaves_the_session_usable(open_store, ids, name, how) -> None:
    async with open_store(snapshot_every_tokens=64, max_open_sessions=100) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:100])
        await session.checkpoint("kept")
        for turns in range(0, 24, 3):
            with anyio.fail_after(60):
                if how == "scope":
                    async with anyio.create_task_group() as tasks:
                        with anyio.CancelScope() as scope:
                            tasks.start_soon(cancel_after, turns, scope.cancel)
                            await CALLS[name](runtime, session, turns)
                else:
                    task = asyncio.create_task(CALLS[name](runtime, session, turns))
                    await cancel_after(turns, task.cancel)
                    await asyncio.wait([task])
                    assert task.cancelled() or task.exception() is None
                assert session.closed is False
                await session.observe(ids[:3])
        await is_what_its_journal_says(session, runtime, ids)


async def cancel_after(turns: int, cancel: Callable[[], Any]) -> None:
    """After so many turns of the event loop; where that is in the call differs, and nothing hangs on it."""
    for _ in range(turns):
        await anyio.lowlevel.checkpoint()
    cancel()


async def test_what_must_be_done_is_done_by_a_cancelled_caller_too(open_store, ids) -> None:
    async with open_store() as runtime:
        session, other = await runtime.session("a"), await runtime.session("b")
        await session.observe(ids)
        generation = session.generate(ids[:3], max_new_tokens=1000)
        await anext(generation)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await generation.aclose()
            await other.close()
        assert generation.finish_reason == "closed"
        assert session.timeline.history.position == session.position
        with pytest.raises(SessionError, match="closed"):
            await other.observe(ids)


async def test_two_tasks_that_read_one_answer_get_no_more_than_was_asked_for(open_store, ids) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        generation = session.generate(ids[:20], max_new_tokens=15)

        async def eat() -> None:
            async for _ in generation:
                pass

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(eat)
            tasks.start_soon(eat)
        assert len(generation.token_ids) <= 15
        assert session.position == 20 + len(generation.token_ids)
