"""One user's memory never reaches another: every test looks for its own, and for the other's, which must not be there.

Both are asked for, so that a store that finds nothing at all does not pass.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
import torch

import memtier
from memtier.errors import ConfigError, IncompatibleMemoryError, ModelError, SessionBusyError, SessionError
from memtier.runtime import Runtime
from memtier.testing import tiny_model
from memtier_backends.index_memory import MemoryIndexAdapter
from memtier_backends.layout import session_folder
from memtier_backends.lock import SessionLock
from memtier_backends.records import IndexRow

pytestmark = pytest.mark.anyio

WORDS = {"alice": "Zebras graze behind Alice's barn. ", "bob": "Walruses sleep under Bob's pier. "}
FILLER = "It rained on the hills, and the river rose slowly. "


def opened(tmp_path: Path, tokenizer, tenant: str, **config) -> Runtime:
    return memtier.open(
        tmp_path / "store", model=tiny_model(window_tokens=32, span_block_tokens=16, span_refresh_tokens=8),
        tokenizer=tokenizer, tenant=tenant, config=memtier.MemoryConfig(**config),
    )  # fmt: skip


async def check(session, mine: str, other: str) -> None:
    """Its own is found, the other's is not: by words, in blocks, in turns, in the window."""
    own, foreign = {"alice": ("zebras", "walruses"), "bob": ("walruses", "zebras")}[mine]
    assert own in (await session.recall(own))[0].text.lower()
    assert await session.recall(foreign) == []
    text = "".join(piece for batch in session.blocks() for piece in batch.column("text").to_pylist()).lower()
    assert own in text and foreign not in text
    said = "".join(turn.text for turn in await session.history())
    assert WORDS[mine] in said and WORDS[other] not in said


async def tell(session, who: str) -> None:
    await session.observe(WORDS[who])
    await session.observe(FILLER * 3)


@pytest.mark.parametrize("same_id", [True, False], ids=["two tenants", "two sessions"])
async def test_own_hit_and_the_others_miss_through_all_that_a_session_goes_through(
    tmp_path, tokenizer, same_id
) -> None:
    names = ("alice", "bob")
    tenant_of = {who: who if same_id else "default" for who in names}
    id_of = {who: "the same" if same_id else who for who in names}
    for round_ in ("first", "after a restart", "after eviction"):
        # no room in host memory: every block is read back from disk
        config = {"hot_bytes": 0, "landmark_bytes": 0} if round_ == "after eviction" else {}
        for who, other in (names, names[::-1]):
            async with opened(tmp_path, tokenizer, tenant_of[who], **config) as runtime:
                session = await runtime.session(id_of[who])
                if round_ == "first":
                    await tell(session, who)
                await session.flush()
                await check(session, who, other)
    for who, other in (names, names[::-1]):
        async with opened(tmp_path, tokenizer, tenant_of[who]) as runtime:
            session = await runtime.session(id_of[who])
            await session.checkpoint("here")
            await session.observe(FILLER)
            await session.restore("here")
            await check(session, who, other)
            await session.export(tmp_path / f"{who}.memtier")
            await check(await runtime.import_session(tmp_path / f"{who}.memtier", "moved"), who, other)
            await runtime.delete_session("moved")
            await check(await session.fork("forked"), who, other)
            known = {info.id for info in await runtime.sessions()}
            assert known == ({"the same", "forked"} if same_id else {"alice", "bob", "forked"})
            await runtime.delete_session("forked")


async def test_two_sessions_that_answer_at_once_answer_as_if_alone(open_store, ids) -> None:
    async def answer(session) -> list[int]:
        generation = session.generate(max_new_tokens=20)
        async for _ in generation:
            pass
        return list(generation.token_ids)

    import anyio

    async with open_store("alone") as runtime:
        alone = []
        for name, some in (("a", ids[:150]), ("b", ids[150:])):
            session = await runtime.session(name)
            await session.observe(some)
            alone.append(await answer(session))
    together: dict[str, list[int]] = {}
    async with open_store("together") as runtime:

        async def one(name: str, some: list[int]) -> None:
            session = await runtime.session(name)
            await session.observe(some)
            together[name] = await answer(session)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one, "a", ids[:150])
            tasks.start_soon(one, "b", ids[150:])
    assert [together["a"], together["b"]] == alone


@pytest.mark.parametrize(("tenant", "session_id", "field"), [("default", "b", "id"), ("other", "a", "tenant")])
async def test_a_folder_that_was_moved_to_another_name_is_refused(
    open_store, tmp_path, tenant, session_id, field
) -> None:
    async with open_store() as runtime:
        await (await runtime.session("a")).observe("hello")
    store = tmp_path / "store"
    target = session_folder(store, tenant, session_id)
    target.parent.mkdir(exist_ok=True)
    shutil.move(session_folder(store, "default", "a"), target)
    runtime = open_store()
    runtime._tenant = tenant
    async with runtime:
        with pytest.raises(IncompatibleMemoryError, match=f"its {field} is"):
            await runtime.session(session_id)


async def test_a_busy_session_is_free_at_once_when_its_owner_dies(open_store, tmp_path) -> None:
    async with open_store() as runtime:
        await (await runtime.session("a")).observe("hello")
    folder = session_folder(tmp_path / "store", "default", "a")
    code = (
        "import sys, time, pathlib; from memtier_backends.lock import SessionLock; "
        "lock = SessionLock.acquire(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:  # noqa: ASYNC220
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        async with open_store() as runtime:
            with pytest.raises(SessionBusyError, match=f"process {owner.pid}"):
                await runtime.session("a")
            owner.send_signal(signal.SIGKILL)
            owner.wait()
            assert (await runtime.session("a")).position == 6


async def test_a_forked_child_gets_a_clear_error(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe("hello")
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            told = []
            for call in (session.blocks, runtime.stats, lambda: session.generate("x")):
                try:
                    call()
                    told.append("no error")
                except SessionError as error:
                    told.append("fork" if "survive a fork" in str(error) else str(error))
                except BaseException as error:  # noqa: BLE001  told to the parent
                    told.append(repr(error))
            os.write(writer, ",".join(told).encode())
            os._exit(0)
        os.waitpid(pid, 0)  # noqa: ASYNC222
        os.close(writer)
        told = os.read(reader, 10_000).decode().split(",")
        os.close(reader)
        assert told == ["fork"] * 3
        assert (await session.observe("there")).position == 11


async def test_a_forked_child_waits_for_no_thread_that_it_does_not_have(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe("hello")
        generation = session.generate("x")
        await anext(generation)
        calls = {
            "observe": lambda: session.observe("x"),
            "recall": lambda: session.recall("x"),
            "close": session.close,
            "next": generation.__anext__,
            "aclose": generation.aclose,
            "session": lambda: runtime.session("b"),
        }
        for name, call in calls.items():
            pid = os.fork()
            if pid == 0:
                status = 1
                signal.alarm(60)
                try:
                    anyio.run(call)
                except SessionError as error:
                    status = 0 if "survive a fork" in str(error) else 2
                finally:
                    os._exit(status)
            _, status = os.waitpid(pid, 0)  # noqa: ASYNC222
            assert os.waitstatus_to_exitcode(status) == 0, name
        await generation.aclose()
        assert (await session.observe("there")).tokens == 5


async def test_keys_that_are_not_finite_are_refused_wherever_they_come_from(open_store, ids) -> None:
    import copy

    from memtier.testing import tiny_model as make

    broken = copy.deepcopy(make(dtype=torch.float64))
    async with open_store(model=broken) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:100])
        with torch.no_grad():
            for name, weight in broken.named_parameters():
                if "k_proj" in name or "v_proj" in name:
                    weight.fill_(float("inf"))
        with pytest.raises(ModelError):
            await session.observe(ids[100:])
        assert session.position == 100
    index = MemoryIndexAdapter([2])
    landmark = torch.tensor([1.0, float("nan")]).numpy()
    with pytest.raises(ConfigError, match="not finite"):
        await index.add([IndexRow(0, 0, 4, "x", 0.0, None, (landmark,))])


async def test_a_tenant_is_deleted_whole_or_not_at_all(open_store, tmp_path) -> None:
    async with open_store() as runtime:
        for name in ("a", "b"):
            await (await runtime.session(name)).observe("hello")
        await (await runtime.session("a")).checkpoint("x")
        await (await runtime.session("b")).close()
        folder = session_folder(tmp_path / "store", "default", "b")
        with SessionLock.acquire(folder), pytest.raises(SessionBusyError):
            await runtime.delete_tenant()
        assert {info.id for info in await runtime.sessions()} == {"a", "b"}
        assert await runtime.delete_tenant() == ["a", "b"]
        assert await runtime.sessions() == []
        assert await runtime.delete_tenant() == []
        assert (await runtime.session("a")).position == 0
    assert not list((tmp_path / "store").glob("*/.removed*"))


async def test_deleting_a_session_names_its_forks(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe("hello")
        await session.fork("b")
        assert await runtime.delete_session("a") == ["b"]
        assert await runtime.delete_session("b") == []
