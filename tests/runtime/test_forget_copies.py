"""Who else holds what is forgotten, and what was begun: nothing is missed, and nothing innocent goes."""

from __future__ import annotations

import json

import anyio
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from memtier.errors import CorruptMemoryError, SessionError, StorageError, StorageFullError
from memtier.forgetting import Forgetter
from memtier.recovery import forget as on_disk
from memtier.recovery.holders import INTENT
from memtier.testing import tiny_model
from memtier_backends.faults import Faults
from memtier_backends.layout import SessionPaths, session_folder

pytestmark = pytest.mark.anyio

RAIN = "It rained on the hills, and the river rose slowly. "
SECRET = "The code for Bodiv is 4821, and nobody may know of it. "
SUN = "Later on the sun came out over fields of barley. "


async def tell(session) -> None:
    for text in (RAIN, SECRET, SUN):
        await session.observe(text)


async def said(session) -> list[str]:
    return [turn.text for turn in await session.history()]


async def cut_off(session, faults: Faults, **wanted) -> None:
    """A forget that is written down and not done; the session is closed."""
    faults.operations, faults.fail_always = frozenset({"journal.forget"}), True
    with pytest.raises(StorageError, match="open it again"):
        await session.forget(**wanted)
    faults.fail_always = False


FULL = [("journal.set_meta", n) for n in range(1, 5)]
FULL += [(name, n) for name in ("journal.checkpoint", "journal.set_indexed_through") for n in (1, 2)]


@pytest.mark.parametrize(("operation", "number"), FULL, ids=lambda value: str(value))
async def test_what_is_set_aside_for_a_full_disk_lets_it_go_on_and_not_begin_anew(
    open_store, ids, operation, number, monkeypatch
) -> None:
    faults = Faults()
    async with open_store(faults=faults, reserve_bytes=4096, min_free_bytes=0) as runtime:
        session = await runtime.session("a")
        await session.observe(ids)
        await session.checkpoint("kept")
        strike, seen = Faults.strike, []

        def full_once(self, name: str, *, write: bool) -> None:
            strike(self, name, write=write)
            if name == operation:
                seen.append(name)
                if len(seen) == number:
                    raise StorageFullError("no space is left.")

        await session.flush()
        monkeypatch.setattr(Faults, "strike", full_once)
        report = await session.forget(start=100, end=130)
        assert len(seen) > number, "it failed, and went on"
        assert (report.tokens, report.position) == (30, 270)
        assert (await session.timeline.tokens(0, 270)).tolist() == ids[:100] + ids[130:]
        await session.restore("kept")
        assert (await session.timeline.tokens(0, 270)).tolist() == ids[:100] + ids[130:]


async def test_a_fork_with_an_unfinished_forget_comes_first(open_store) -> None:
    faults = Faults()
    async with open_store(faults=faults) as runtime:
        session = await runtime.session("a")
        await tell(session)
        fork = await session.fork("b")
        await cut_off(fork, faults, turn=1, forks=False)
        with pytest.raises(SessionError, match=r"'b'.*open that session first"):
            await session.forget(turn=0)
        assert await said(session) == [RAIN, SECRET, SUN]
        fork = await runtime.session("b")
        assert await said(fork) == [RAIN, SUN]
        assert (await session.forget(turn=0)).forks == ("b",)
        assert await said(fork) == ["", SUN]  # the token that begins the text stays
        assert await said(session) == ["", SECRET, SUN]


async def test_a_fork_that_is_made_meanwhile_forgets_it_too(open_store, monkeypatch) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await tell(session)
        fork = await session.fork("b")
        take_out, forked = Forgetter._take_out, []

        async def after_a_fork(*arguments, **options):
            if not forked:
                forked.append(await fork.fork("c"))
            return await take_out(*arguments, **options)

        monkeypatch.setattr(Forgetter, "_take_out", after_a_fork)
        report = await session.forget(turn=1)
        assert set(report.forks) == {"b", "c"}
        for one in (session, fork, *forked):
            assert await said(one) == [RAIN, SUN]


async def test_forks_of_a_fork_that_were_made_after_it_was_cut_off_are_found(open_store, monkeypatch) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await tell(session)
        await session.fork("b")
        intend, written = on_disk._intend, []

        def once(journal, *arguments, **options) -> None:
            if written:
                raise StorageError("cut off here.")
            written.append(journal)
            intend(journal, *arguments, **options)

        monkeypatch.setattr(on_disk, "_intend", once)
        with pytest.raises(StorageError, match="open it again"):
            await session.forget(turn=1)
        monkeypatch.setattr(on_disk, "_intend", intend)
        fork = await runtime.session("b")
        other = await fork.fork("c")
        await fork.close()
        await other.close()
        for name in ("a", "b", "c"):
            assert await said(await runtime.session(name)) == [RAIN, SUN], name


async def test_a_fork_that_fails_before_anything_was_written_changes_nothing(open_store) -> None:
    faults = Faults()
    async with open_store(faults=faults) as runtime:
        session = await runtime.session("a")
        await tell(session)
        fork = await session.fork("b")
        await fork.observe(SUN * 3)
        faults.operations, faults.fail_always = frozenset({"segments.put"}), True
        with pytest.raises(StorageError):
            await fork.flush()
        with pytest.raises(StorageError) as told:
            await session.forget(turn=1)
        assert "written down" not in str(told.value)
        faults.fail_always = False
        assert await said(session) == [RAIN, SECRET, SUN]
        await session.forget(turn=1)
        assert await said(session) == [RAIN, SUN]


async def test_nothing_is_written_to_a_fork_between_its_intent_and_the_end(open_store, monkeypatch) -> None:
    faults = Faults()
    async with open_store(faults=faults) as runtime:
        session = await runtime.session("a")
        await tell(session)
        fork = await session.fork("b")
        waits: list[str] = []
        locked, offline = anyio.Event(), Forgetter._offline

        async def write_to_the_fork() -> None:
            await locked.wait()
            with pytest.raises(SessionError, match="closed"):
                await fork.observe(SUN)
            waits.append("refused")

        async def locked_and_waited_for(*arguments):
            opened = await offline(*arguments)
            locked.set()
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
            return opened

        monkeypatch.setattr(Forgetter, "_offline", locked_and_waited_for)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write_to_the_fork)
            await cut_off(session, faults, turn=1)
        assert waits == ["refused"]
        for name in ("a", "b"):
            assert await said(await runtime.session(name)) == [RAIN, SUN]


async def test_a_fork_that_is_being_closed_forgets_it_too(open_store, monkeypatch) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await tell(session)
        fork = await session.fork("b")
        await fork.observe(SUN)
        closed, offline = anyio.Event(), Forgetter._offline

        async def close() -> None:
            await fork.close()
            closed.set()

        async with anyio.create_task_group() as tasks:

            async def while_it_closes(*arguments):
                tasks.start_soon(close)
                await anyio.wait_all_tasks_blocked()
                return await offline(*arguments)

            monkeypatch.setattr(Forgetter, "_offline", while_it_closes)
            assert (await session.forget(turn=1)).forks == ("b",)
        assert closed.is_set()
        assert await said(await runtime.session("b")) == [RAIN, SUN, SUN]


# -- damage


async def test_a_damaged_session_beside_it_is_named_and_hinders_nothing(open_store, tmp_path) -> None:
    async with open_store() as runtime:
        session, other = await runtime.session("a"), await runtime.session("other")
        await tell(session)
        await tell(other)
        await other.close()
        folder = session_folder(tmp_path / "store", "default", "other")
        SessionPaths(folder).journal.write_bytes(b"no journal" * 1000)
        report = await session.forget(turn=1, verify=True)
        assert report.unreadable == (str(folder),)
        assert report.proof is not None and not report.proof.proven
        assert any("cannot be read" in reason for reason in report.proof.reasons)
        assert await said(session) == [RAIN, SUN]


async def test_a_damaged_checkpoint_is_told_before_anything_is_written_down(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await tell(session)
        await session.checkpoint("kept")
        kept = session.folder.paths.checkpoint("kept")
        kept.journal.write_bytes(b"no journal" * 1000)
        with pytest.raises(CorruptMemoryError, match="drop_checkpoint"):
            await session.forget(turn=1)
        assert session.folder.journal.get_meta(INTENT) is None
        assert await said(session) == [RAIN, SECRET, SUN]
        await session.drop_checkpoint("kept")
        await session.forget(turn=1)
        assert await said(session) == [RAIN, SUN]


async def test_an_intent_past_the_end_of_a_journal_that_was_cut_short_ends_there(open_store, ids) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:200])
        intent = {"ranges": [[150, 230], [260, 300]], "keep_first": False, "forks": True}
        session.folder.journal.set_meta(INTENT, intent)
        await session.close()
        session = await runtime.session("a")
        assert (await session.timeline.tokens(0, session.position)).tolist() == ids[:150]
        assert session.folder.journal.get_meta(INTENT) is None


async def test_integers_of_any_kind_say_what_to_forget(open_store, ids) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:100])
        assert (await session.forget(start=np.int64(10), end=np.int32(20))).tokens == 10
        with pytest.raises(ValueError, match=r"start is 1\.5"):
            await session.forget(start=1.5, end=20)  # pyright: ignore[reportArgumentType]


# -- under another model


@pytest.fixture(params=["the same tokenizer", "another tokenizer"])
def another(request, tokenizer, tmp_path) -> dict[str, object]:
    """Another model of other sizes, and its tokenizer: the same, or one that numbers two bytes the other way round."""
    if request.param == "another tokenizer":
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        path = tmp_path / "tokenizer" / "tokenizer.json"
        about = json.loads(path.read_text())
        numbers = about["model"]["vocab"]
        numbers["a"], numbers["b"] = numbers["b"], numbers["a"]
        path.write_text(json.dumps(about))
        tokenizer = AutoTokenizer.from_pretrained(path.parent)
    return {"model": tiny_model(seed=5, dtype=torch.float64), "tokenizer": tokenizer, "window_tokens": 32}


async def test_copies_under_the_model_before_forget_it_too(open_store, tmp_path, another) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(SUN)
        await tell(session)
        await session.forget(turn=0)
        await session.checkpoint("old")
        await (await session.fork("b")).checkpoint("of b")
    async with open_store(**another) as runtime:
        session = await runtime.session("a", reread=True)
        turn = next(turn.turn for turn in await session.history() if turn.text == SECRET)
        report = await session.forget(turn=turn, verify=True)
        assert report.forks == ("b",)
        assert set(report.checkpoints) == {"old", "of b"}
        assert report.proof is not None and report.proof.proven, report.proof
        assert SECRET not in await said(session)
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert not any(b"nobody may know" in path.read_bytes() for path in files)
    async with open_store() as runtime:
        assert await said(await runtime.session("b")) == ["", RAIN, SUN]
