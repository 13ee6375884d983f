"""A session that forgot is one that never saw it: in every tier, every copy, whenever it was cut off."""

from __future__ import annotations

import threading

import anyio
import anyio.lowlevel
import pytest
import torch

import memtier
from memtier.errors import ConfigError, SessionBusyError, SessionError, StorageError
from memtier.recovery import erasure
from memtier.recovery.forget import INTENT
from memtier.testing import tiny_model
from memtier_backends import sqlite_file
from memtier_backends.faults import Faults
from memtier_backends.layout import SessionPaths, session_folder

pytestmark = pytest.mark.anyio

EXACT = {"rtol": 0.0, "atol": 1e-9}
SECRET = "The code for Bodiv is 4821, and nobody may know of it. "
RAIN = "It rained on the hills, and the river rose slowly. "
SUN = "Later on the sun came out over fields of barley. "


async def state_of(session) -> list[dict[str, torch.Tensor]]:
    return [await session.state(layer) for layer in range(3)]


@pytest.mark.parametrize("stride", [64, 10_000])
@pytest.mark.parametrize(("start", "end"), [(100, 130), (0, 40), (260, 300), (64, 128), (150, 151)], ids=str)
async def test_the_session_is_one_that_never_saw_the_span(open_store, ids, stride, start, end) -> None:
    rest = ids[:start] + ids[end:]
    async with open_store(snapshot_every_tokens=stride) as runtime:
        never, session = await runtime.session("never"), await runtime.session("a")
        await never.observe(rest)
        await session.observe(ids)
        await session.flush()
        report = await session.forget(start=start, end=end)
        assert (report.tokens, report.position, session.position) == (end - start, len(rest), len(rest))
        # the one at 64 was thinned out
        kept = [128, 192, 256] if stride == 64 else []
        assert report.restored_from == max((at for at in kept if at <= start), default=0)
        for one, other in zip(await state_of(session), await state_of(never), strict=True):
            for name, value in other.items():
                if value.is_floating_point():
                    torch.testing.assert_close(one[name], value, **EXACT)
        logits = [(await s.observe(ids[:60], logits=True)).logits for s in (session, never)]
        torch.testing.assert_close(*logits, **EXACT)
        await session.flush()
        assert session.stats().lag_tokens == 0


async def test_an_answer_that_is_not_remembered_follows_a_forget_that_left_a_block_ahead(open_store, ids) -> None:
    answers = []
    async with open_store(snapshot_every_tokens=32) as runtime:
        never, session = await runtime.session("never"), await runtime.session("a")
        await never.observe(ids[:32] + ids[34:42])
        await session.observe(ids[:42])
        await session.close()
        session = await runtime.session("a")
        # the boundary at 40 sealed tokens 20 to 24, which stay on disk; what is left ends before it
        await session.forget(start=32, end=34)
        assert session.stats().blocks == never.stats().blocks + 1
        for one in (session, never):
            generation = one.generate(max_new_tokens=12, remember=False)
            answers.append([token async for token in generation])
    assert answers[0] == answers[1]


async def test_only_what_follows_the_last_snapshot_before_it_is_read_again(open_store, ids) -> None:
    async with open_store(snapshot_every_tokens=64) as runtime:
        session = await runtime.session("a")
        await session.observe(ids)
        report = await session.forget(start=270, end=280)
        assert (report.restored_from, report.replayed_tokens) == (256, 34)


@pytest.fixture
async def told(tmp_path, tokenizer):
    """A runtime with real storage, a session that was told a secret, and how to open the store again."""
    model = tiny_model(window_tokens=32, span_block_tokens=16, span_refresh_tokens=8)

    def opened():
        config = memtier.MemoryConfig(snapshot_every_tokens=64)
        return memtier.open(tmp_path / "store", model=model, tokenizer=tokenizer, config=config)

    async with opened() as runtime:
        session = await runtime.session("a")
        await session.observe(RAIN * 2)
        await session.observe(SECRET, source="a letter", metadata={"to": "Bodiv"})
        await session.observe(SUN * 4)
        yield runtime, session


async def test_a_hit_is_forgotten_with_a_proof(told, tmp_path) -> None:
    _, session = told
    (hit, *_) = await session.recall("Bodiv code")
    report = await session.forget(hit, verify=True)
    assert report.proof is not None and report.proof.proven, report.proof
    assert set(report.proof.found_before) == {"journal", "segments", "snapshots", "index"}
    assert report.proof.found_before["journal"]["ids"] > 0
    assert report.proof.found_before["segments"]["keys and values"] > 0
    assert report.proof.found_before["index"]["text"] > 0
    assert report.proof.found_before["snapshots"]["state"] > 0
    assert report.proof.remains == ()
    window = hit.text[4:24].encode()
    assert not any(window in path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())


async def test_a_turn_is_forgotten_with_its_source(told, tmp_path) -> None:
    _, session = told
    turn = next(t for t in await session.history() if t.source == "a letter")
    report = await session.forget(turn=turn.turn, verify=True)
    assert report.proof is not None and report.proof.proven, report.proof
    assert [t.text for t in await session.history()] == [RAIN * 2, SUN * 4]
    assert await session.recall("4821") == []
    assert "sun" in (await session.recall("sun"))[0].text
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert not any(b"a letter" in path.read_bytes() for path in files)


async def test_the_proof_fails_where_deleted_rows_are_not_overwritten(told, monkeypatch) -> None:
    runtime, session = told
    connect = sqlite_file.connect

    def lax(*args, **kwargs):
        connection = connect(*args, **kwargs)
        connection.execute("PRAGMA secure_delete=OFF")
        return connection

    await session.close()
    monkeypatch.setattr("memtier_backends.journal_sqlite.connect", lax)
    session = await runtime.session("a")
    # long enough that what is written next does not happen to fall on all of it
    await session.observe(" ".join(f"{n * 7919:07d}" for n in range(400)), source="numbers")
    turn = next(t for t in await session.history() if t.source == "numbers")
    report = await session.forget(turn=turn.turn, verify=True)
    assert report.proof is not None and not report.proof.proven
    assert any("journal" in path for path in report.proof.remains)


async def test_the_proof_is_refused_where_the_scan_would_find_nothing(told, monkeypatch) -> None:
    _, session = told
    monkeypatch.setattr("memtier.recovery.erasure._FOLDERS", {"segments": "x", "snapshots": "y", "index": "z"})
    (hit, *_) = await session.recall("Bodiv code")
    report = await session.forget(hit, verify=True)
    assert report.proof is not None and not report.proof.proven
    assert any("did not find the keys and values in the segments" in reason for reason in report.proof.reasons)


async def test_a_proof_stops_its_forks_and_nobody_else(told, monkeypatch) -> None:
    runtime, session = told
    fork, other = await session.fork("b"), await runtime.session("other")
    began, found, other_read = anyio.Event(), erasure._found, threading.Event()
    loop = anyio.lowlevel.current_token().native_token
    done: list[str] = []

    def held(windows, files):
        loop.call_soon_threadsafe(began.set)
        assert other_read.wait(60)
        done.append("scan")
        return found(windows, files)

    async def read_on(one: memtier.Session, name: str) -> None:
        await began.wait()
        await one.observe("and on")
        done.append(name)
        if name == "other":
            other_read.set()

    monkeypatch.setattr(erasure, "_found", held)
    (hit, *_) = await session.recall("Bodiv code")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read_on, fork, "fork")
        tasks.start_soon(read_on, other, "other")
        report = await session.forget(hit, verify=True)
    assert report.proof is not None and report.proof.proven, report.proof
    first_scans = done[: done.index("fork")].count("scan")
    assert done.index("other") < done.index("fork")
    assert first_scans >= 4, "the fork reads on when all classes of files have been looked through"
    assert (await fork.recall("4821")) == []


async def test_older_hits_are_refused_and_new_ones_are_not(told) -> None:
    runtime, session = told
    (rain, *_), (sun, *_) = await session.recall("hills river"), await session.recall("barley")
    await session.forget(rain)
    with pytest.raises(SessionError, match="Call recall again"):
        await session.forget(sun)
    other = await runtime.session("b")
    await other.observe(RAIN)
    (elsewhere, *_) = await other.recall("hills")
    with pytest.raises(SessionError, match="Call recall again"):
        await session.forget(elsewhere)
    (sun, *_) = await session.recall("barley")
    assert (await session.forget(sun)).tokens == sun.end - sun.start


async def test_quotations_are_told_where_they_stand_now(open_store) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(RAIN)
        await session.observe(SECRET)
        await session.observe(f"You said: {SECRET}")
        report = await session.forget(turn=1)
        ((start, end),) = report.also_at
        quoted = bytes((await session.timeline.tokens(start, end)).tolist()).decode()
        assert SECRET in quoted + " " and "4821" in quoted


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({}, ConfigError),
        ({"start": 3}, ConfigError),
        ({"start": 3, "end": 3}, ConfigError),
        ({"start": -1, "end": 3}, ConfigError),
        ({"start": 3, "end": 10_000}, ConfigError),
        ({"start": 0, "end": 1}, ConfigError),
        ({"start": 3, "end": 5, "turn": 1}, ConfigError),
        ({"turn": 77}, SessionError),
    ],
    ids=str,
)
async def test_what_is_no_span_is_refused(open_store, wrong, error) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(RAIN)
        with pytest.raises(error):
            await session.forget(**wrong)
        assert session.position == len(RAIN) + 1


async def test_the_token_that_begins_a_text_stays(open_store) -> None:
    async with open_store() as runtime:
        session, never = await runtime.session("a"), await runtime.session("never")
        await session.observe(SECRET, source="a letter")
        await session.observe(RAIN)
        await session.forget(turn=0)
        await never.observe(RAIN)
        assert (await session.timeline.tokens(0, 3)).tolist() == [256, *b"It"]
        first, *_ = await session.history()
        assert (first.text, first.source) == ("", None)
        logits = [(await s.observe(SUN, logits=True)).logits for s in (session, never)]
        torch.testing.assert_close(*logits, **EXACT)


# -- copies


async def test_forks_and_checkpoints_forget_it_too(told, tmp_path) -> None:
    runtime, session = told
    await session.checkpoint("kept")
    fork = await session.fork("open fork")
    await fork.observe(RAIN)
    shut = await fork.fork("shut fork")
    await shut.checkpoint("of the fork")
    await shut.close()
    turn = next(t for t in await session.history() if t.source == "a letter")
    report = await session.forget(turn=turn.turn, verify=True)
    assert set(report.forks) == {"open fork", "shut fork"}
    assert set(report.checkpoints) == {"kept", "of the fork"}
    assert report.proof is not None and report.proof.proven, report.proof
    assert [t.text for t in await fork.history()] == [RAIN * 2, SUN * 4, RAIN]
    await session.restore("kept")
    assert [t.text for t in await session.history()] == [RAIN * 2, SUN * 4]
    shut = await runtime.session("shut fork")
    assert [t.text for t in await shut.history()] == [RAIN * 2, SUN * 4, RAIN]
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert not any(b"nobody may know" in path.read_bytes() for path in files)
    never = await runtime.session("never")
    for text in (RAIN * 2, SUN * 4, RAIN):
        await never.observe(text)
    logits = [(await one.observe(SUN, logits=True)).logits for one in (fork, never)]
    torch.testing.assert_close(*logits, rtol=0.0, atol=1e-3)


async def test_forks_that_are_left_alone_are_named(told) -> None:
    _, session = told
    fork = await session.fork("b")
    before = fork.position
    turn = next(t for t in await session.history() if t.source == "a letter")
    report = await session.forget(turn=turn.turn, forks=False)
    assert (report.still_held_by, report.forks) == (("b",), ())
    assert fork.position == before
    # the fork forgets it later, though the session's positions have moved since
    report = await fork.forget(turn=turn.turn)
    assert report.forks == report.still_held_by == ()


async def test_a_fork_that_forgot_some_of_it_forgets_the_rest(open_store, ids) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:100])
        fork = await session.fork("b")
        await fork.forget(start=40, end=45, forks=False)
        report = await session.forget(start=30, end=60)
        assert report.forks == ("b",)
        for one in (session, fork):
            assert (await one.timeline.tokens(0, one.position)).tolist() == ids[:30] + ids[60:100]


async def test_a_fork_that_is_open_elsewhere_is_named_and_nothing_changes(open_store, ids) -> None:
    async with open_store() as one, open_store() as two:
        session = await one.session("a")
        await session.observe(ids[:100])
        await (await session.fork("b")).close()
        await two.session("b")
        with pytest.raises(SessionBusyError):
            await session.forget(start=10, end=20)
        assert session.position == 100
        await session.observe(ids[100:])


# -- cut off


WRITES = ["journal.set_meta", "journal.forget", "journal.checkpoint", "journal.set_indexed_through", "snapshots.delete"]


@pytest.mark.parametrize("operation", WRITES)
async def test_a_forget_that_is_cut_off_goes_on_at_the_next_open(open_store, ids, tmp_path, operation) -> None:
    rest = ids[:100] + ids[150:]
    faults = Faults()
    async with open_store(faults=faults, snapshot_every_tokens=64) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:200])
        await session.checkpoint("kept")
        fork = await session.fork("b")
        await session.observe(ids[200:])
        await session.flush()
        faults.operations, faults.fail_always = frozenset({operation}), True
        if operation == "journal.set_meta":
            # not even the intent was written: nothing is promised, and the session can be used
            with pytest.raises(StorageError, match="Clear the fault"):
                await session.forget(start=100, end=150)
            faults.fail_always = False
            assert session.position == 300
            await session.forget(start=100, end=150)
        else:
            with pytest.raises(StorageError, match="open it again"):
                await session.forget(start=100, end=150)
            with pytest.raises(SessionError, match="closed"):
                await session.observe(ids)
            faults.fail_always = False
            session = await runtime.session("a")
        assert (await session.timeline.tokens(0, session.position)).tolist() == rest
        fork = await runtime.session("b")
        assert (await fork.timeline.tokens(0, fork.position)).tolist() == rest[:150]
        await session.restore("kept")
        assert (await session.timeline.tokens(0, session.position)).tolist() == rest[:150]
        for one in (session, fork):
            assert one.folder.journal.get_meta(INTENT) is None
        logits = [(await one.observe(ids[:50], logits=True)).logits for one in (session, fork)]
        torch.testing.assert_close(*logits, **EXACT)


async def test_the_intent_never_holds_the_text(open_store, tmp_path) -> None:
    faults = Faults(operations=frozenset({"journal.forget"}))
    async with open_store(faults=faults) as runtime:
        session = await runtime.session("a")
        await session.observe(RAIN)
        await session.observe(SECRET)
        faults.fail_always = True
        with pytest.raises(StorageError):
            await session.forget(turn=1)
    journal = sqlite_file.connect(SessionPaths(session_folder(tmp_path / "store", "default", "a")).journal)
    ((intent,),) = journal.execute("SELECT body FROM records WHERE name = 'forget'").fetchall()
    journal.close()
    assert "Bodiv" not in intent and str(list(b"Bodiv"))[1:-1] not in intent
