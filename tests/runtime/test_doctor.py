"""The doctor finds what is damaged, mends what is derived, puts aside what it does not know, and loses nothing else."""

from __future__ import annotations

import copy
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

from memtier.errors import CorruptMemoryError, SessionBusyError, StorageError
from memtier.folder import Backends
from memtier.recovery import doctor, mending
from memtier.testing import tiny_model
from memtier_backends.layout import SessionPaths, session_folder
from memtier_backends.lock import SessionLock
from memtier_backends.segment_store import FileSegmentStore

pytestmark = pytest.mark.anyio

EXACT = {"rtol": 0.0, "atol": 1e-9}


def paths_of(tmp_path: Path, session_id: str = "a") -> SessionPaths:
    return SessionPaths(session_folder(tmp_path / "store", "default", session_id))


@pytest.fixture
async def stored(open_store, ids, tmp_path) -> torch.Tensor:
    """A session of 200 tokens with a checkpoint at 100; the logits of the 100 tokens that would follow."""
    async with open_store("whole", snapshot_every_tokens=64) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:200])
        after = (await session.observe(ids[200:], logits=True)).logits
    async with open_store(snapshot_every_tokens=64) as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:100])
        await session.checkpoint("kept")
        await session.observe(ids[100:200])
        await session.flush()
    return after


def wrong(health) -> list:
    """Findings, but for the index: these tests keep it in memory, so that it is lost each time."""
    return [finding for finding in health.findings if finding.what != "index"]


def newest(folder: Path) -> Path:
    return sorted(folder.iterdir())[-1]


def flip(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 4
    # a file of its own: others may share the old one's bytes
    path.unlink()
    path.write_bytes(data)


def lost_segment(paths: SessionPaths) -> None:
    newest(paths.segments).unlink()


def torn_segment(paths: SessionPaths) -> None:
    path = sorted(paths.segments.iterdir())[1]
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[: len(data) // 2])


def flipped_segment(paths: SessionPaths) -> None:
    flip(sorted(paths.segments.iterdir())[0])


def flipped_snapshot(paths: SessionPaths) -> None:
    flip(newest(paths.snapshots))


def lost_snapshots(paths: SessionPaths) -> None:
    shutil.rmtree(paths.snapshots)
    paths.snapshots.mkdir()


@pytest.mark.parametrize(
    ("damage", "full", "what"),
    [
        (lost_segment, False, "segment"),
        (torn_segment, False, "segment"),
        (flipped_segment, True, "segment"),
        (flipped_snapshot, True, "snapshot"),
        (lost_snapshots, False, "snapshot"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
async def test_what_is_derived_is_mended(
    open_store, ids, stored, tmp_path, damage: Callable[[SessionPaths], None], full, what
) -> None:
    damage(paths_of(tmp_path))
    async with open_store(snapshot_every_tokens=64) as runtime:
        (told,) = await runtime.doctor(full=full)
        assert not told.healthy and what in told.findings[0].what
        (mended,) = await runtime.doctor(rebuild=True, full=full)
        assert mended.healthy and mended.id == "a" and mended.position == 200
        (after,) = await runtime.doctor(full=True)
        assert wrong(after) == []
        session = await runtime.session("a")
        logits = (await session.observe(ids[200:], logits=True)).logits
        torch.testing.assert_close(logits, stored, **EXACT)
        await session.flush()
        await session.restore("kept")
        assert session.position == 100


async def test_a_whole_store_has_no_finding_and_open_sessions_are_named(open_store, stored) -> None:
    async with open_store() as runtime:
        (told,) = await runtime.doctor(full=True)
        assert told.healthy and wrong(told) == [] and told.position == 200
        await runtime.session("a")
        (told,) = await runtime.doctor(rebuild=True, full=True)
        assert told.healthy and "is open" in told.findings[0].problem


async def test_unknown_files_are_put_aside_and_never_deleted(open_store, stored, tmp_path) -> None:
    paths = paths_of(tmp_path)
    strangers = [paths.folder / "notes.txt", paths.segments / "mine.bin", paths.snapshots / "copy.safetensors"]
    for stranger in strangers:
        stranger.write_text(f"precious {stranger.name}")
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.close()
        assert all(stranger.exists() for stranger in strangers)
        (told,) = await runtime.doctor(rebuild=True)
        assert told.healthy and len(wrong(told)) == 3
        assert not any(stranger.exists() for stranger in strangers)
        kept = {path.read_text() for path in (paths.folder / "quarantine").iterdir()}
        assert kept == {f"precious {stranger.name}" for stranger in strangers}
        assert wrong((await runtime.doctor())[0]) == []


async def test_of_a_damaged_journal_what_stands_before_the_damage_is_kept(open_store, ids, stored, tmp_path) -> None:
    paths = paths_of(tmp_path)
    data = paths.journal.read_bytes()
    flip(paths.journal, data.index(torch.tensor(ids[100:120], dtype=torch.int32).numpy().tobytes()))
    async with open_store(snapshot_every_tokens=64) as runtime:
        session = await runtime.session("a")
        with pytest.raises(CorruptMemoryError, match="position 100"):
            await session.timeline.tokens(0, 200)
        await session.close()
        (told,) = await runtime.doctor()
        assert not told.healthy and "keeps what stands before" in told.findings[0].problem
        (told,) = await runtime.doctor(rebuild=True)
        assert told.healthy and told.position == 100
        assert "Kept 100 tokens; at most 100 that were acknowledged" in told.findings[0].problem
        assert any(path.name.startswith("journal") for path in (paths.folder / "quarantine").iterdir())
        assert wrong((await runtime.doctor(full=True))[0]) == []
        session = await runtime.session("a")
        assert (await session.timeline.tokens(0, 100)).tolist() == ids[:100]
        await session.observe(ids[100:200])
        logits = (await session.observe(ids[200:], logits=True)).logits
        torch.testing.assert_close(logits, stored, **EXACT)


async def test_a_journal_that_is_no_journal_is_told_and_left(open_store, stored, tmp_path) -> None:
    paths = paths_of(tmp_path)
    paths.journal.write_bytes(b"no journal" * 500)
    async with open_store() as runtime:
        (told,) = await runtime.doctor(rebuild=True)
        assert not told.healthy and "Nothing of it can be kept" in told.findings[0].problem
        assert paths.journal.read_bytes().startswith(b"no journal")


async def test_a_damaged_checkpoint_is_put_aside(open_store, ids, stored, tmp_path) -> None:
    kept = paths_of(tmp_path).checkpoint("kept")
    flip(kept.journal, kept.journal.read_bytes().index(torch.tensor(ids[:40], dtype=torch.int32).numpy().tobytes()))
    async with open_store() as runtime:
        (told,) = await runtime.doctor(rebuild=True)
        assert told.healthy and "checkpoint" in told.findings[0].what
        session = await runtime.session("a")
        assert await session.checkpoints() == []
        assert session.position == 200


async def test_a_damaged_index_is_made_again(tmp_path, tokenizer) -> None:
    import memtier
    from memtier.testing import tiny_model

    model = tiny_model(window_tokens=32, span_block_tokens=16, span_refresh_tokens=8)
    async with memtier.open(tmp_path / "store", model=model, tokenizer=tokenizer) as runtime:
        session = await runtime.session("a")
        await session.observe("Zebras graze here. " + "It rained on the hills. " * 6)
        await session.close()
        index = paths_of(tmp_path).index
        heads = sorted(index.rglob("_versions/*.manifest"))
        for head in heads:
            # what a power cut may leave: the newest versions are there, and empty
            head.write_bytes(b"")
        (told,) = await runtime.doctor()
        assert not told.healthy and told.findings[0].what == "index"
        (told,) = await runtime.doctor(rebuild=True)
        assert told.healthy
        session = await runtime.session("a")
        assert "Zebras" in (await session.recall("zebras"))[0].text
        await session.close()
        shutil.rmtree(index)
        session = await runtime.session("a")
        assert "Zebras" in (await session.recall("zebras"))[0].text


async def test_every_value_of_the_weights_is_compared(open_store, stored, model) -> None:
    changed = copy.deepcopy(model)
    name, tensor = next((name, one) for name, one in changed.named_parameters() if one.numel() > 8)
    with torch.no_grad():
        # not one of the few that every open compares
        tensor.view(-1)[1] += 1
    async with open_store(model=changed) as runtime:
        (quick,) = await runtime.doctor()
        assert quick.healthy
        (full,) = await runtime.doctor(full=True)
        (told,) = [finding for finding in full.findings if finding.what == "weights"]
        assert not full.healthy and not told.mended
        assert "1 of " in told.problem and repr(name) in told.problem
    for other in (copy.deepcopy(model).float(), tiny_model(window_tokens=32)):
        async with open_store(model=other) as runtime:
            (full,) = await runtime.doctor(full=True)
            (told,) = [finding for finding in full.findings if finding.what == "weights"]
            assert full.healthy and told.harmless and "not compared" in told.problem


def everything(folder: Path) -> dict[str, bytes]:
    """All files below, but for what SQLite and a lock write to look."""
    names = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(name): name.read_bytes() for name in names if name.name != "lock" and not name.name.endswith("-shm")}


def damage_journal(paths: SessionPaths, ids: list[int]) -> None:
    data = paths.journal.read_bytes()
    flip(paths.journal, data.index(torch.tensor(ids[100:120], dtype=torch.int32).numpy().tobytes()))


async def test_nobody_else_writes_while_a_journal_is_mended(open_store, ids, stored, tmp_path, monkeypatch) -> None:
    paths = paths_of(tmp_path)
    damage_journal(paths, ids)
    refused = []
    mend = mending.salvage

    def watched(*arguments):
        with pytest.raises(SessionBusyError) as told:
            SessionLock.acquire(paths.folder)
        refused.append(told)
        return mend(*arguments)

    monkeypatch.setattr(mending, "salvage", watched)
    async with open_store(snapshot_every_tokens=64) as runtime:
        (told,) = await runtime.doctor(rebuild=True)
        assert told.healthy and len(refused) == 1
        # and it is free again
        assert (await runtime.session("a")).position == 100


class Killed(BaseException):
    pass


async def test_who_dies_while_mending_leaves_a_journal(open_store, ids, stored, tmp_path, monkeypatch) -> None:
    paths = paths_of(tmp_path)
    damage_journal(paths, ids)
    damaged = paths.journal.read_bytes()

    replace = os.replace

    def killed(source, target):
        if target == paths.journal:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        # its process is gone, so nothing is tidied up
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(Killed):
            await doctor.examine(paths.folder, Backends(), here, rebuild=True, full=False)
    assert paths.journal.read_bytes() == damaged
    assert [path.read_bytes() for path in paths.quarantine.iterdir()] == [damaged]
    assert list(paths.folder.glob(".rescued-*"))
    async with open_store(snapshot_every_tokens=64) as runtime:
        (told,) = await runtime.doctor()
        assert not told.healthy and any(".rescued-" in finding.what for finding in told.findings)
        (told,) = await runtime.doctor(rebuild=True)
        assert told.healthy and told.position == 100
        assert not list(paths.folder.glob(".rescued-*"))
        assert all(path.read_bytes() == damaged for path in paths.quarantine.iterdir())


async def here(function, *arguments):
    return function(*arguments)


async def test_the_log_of_a_damaged_journal_is_put_aside_with_it_and_the_index_goes(
    open_store, ids, stored, tmp_path
) -> None:
    paths = paths_of(tmp_path)
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids[200:])
        await session.flush()
        log = paths.folder / f"{paths.journal.name}-wal"
        journal, written = paths.journal.read_bytes(), log.read_bytes()
    # as a crash leaves it, and then one bit flips
    paths.journal.write_bytes(journal)
    log.write_bytes(written)
    flip(log)
    damaged = log.read_bytes()
    paths.index.mkdir()
    (paths.index / "rows.lance").write_bytes(b"of what is lost")
    async with open_store() as runtime:
        (told,) = await runtime.doctor(rebuild=True)
        assert told.healthy and 200 <= told.position <= 300 and not log.exists()
        assert not paths.index.exists()
        assert (await runtime.session("a")).position == told.position
    aside = sorted(paths.quarantine.iterdir())
    main, beside = [path for path in aside if path.name.startswith("journal")]
    assert beside.name == f"{main.name}-wal" and beside.read_bytes() == damaged


async def test_a_folder_that_lost_its_journal_is_not_healthy(open_store, stored, tmp_path) -> None:
    paths = paths_of(tmp_path)
    paths.journal.unlink()
    async with open_store() as runtime:
        await runtime.session("b")
        for rebuild in (False, True):
            before = everything(paths.folder)
            lost, _ = sorted(await runtime.doctor(rebuild=rebuild), key=lambda health: health.healthy)
            assert not lost.healthy and "segments" in lost.findings[0].problem
            assert everything(paths.folder) == before


async def test_a_checkpoint_without_a_journal_is_told_and_nothing_is_written(open_store, stored, tmp_path) -> None:
    paths = paths_of(tmp_path)
    kept = paths.checkpoint("kept")
    kept.journal.unlink()
    # nothing beside it says that there was one
    shutil.rmtree(kept.segments)
    shutil.rmtree(kept.snapshots)
    before = everything(paths.folder)
    async with open_store() as runtime:
        (told,) = await runtime.doctor()
        assert not told.healthy and "journal.sqlite3 is missing" in wrong(told)[0].problem
        assert everything(paths.folder) == before
        (told,) = await runtime.doctor(rebuild=True)
        assert told.healthy and not kept.folder.exists()
        assert await (await runtime.session("a")).checkpoints() == []


async def test_what_one_session_cannot_tell_keeps_no_other_from_being_looked_at(
    open_store, ids, stored, tmp_path, monkeypatch
) -> None:
    async with open_store() as runtime:
        await (await runtime.session("b")).observe(ids[:50])
    kept = paths_of(tmp_path).checkpoint("kept")
    with closing(sqlite3.connect(kept.journal)) as connection:
        connection.execute("PRAGMA user_version = 99")
    async with open_store() as runtime:
        health = {one.id: one for one in await runtime.doctor(rebuild=True)}
        (told,) = [finding for finding in health["a"].findings if "checkpoint" in finding.what]
        assert "99" in told.problem and not told.mended and not health["a"].healthy
        assert health["b"].healthy and kept.journal.exists()
        looking = FileSegmentStore.size

        def refused(store: FileSegmentStore, name: str) -> int:
            if store.folder.parent == paths_of(tmp_path, "b").folder:
                raise StorageError("the disk is away.")
            return looking(store, name)

        monkeypatch.setattr(FileSegmentStore, "size", refused)
        health = {one.id: one for one in await runtime.doctor()}
        assert not health["b"].healthy and "the disk is away" in health["b"].findings[-1].problem
        assert health["a"].position == 200
        # its lock is free again
        monkeypatch.undo()
        await runtime.session("b")


async def test_what_the_removal_of_a_checkpoint_left_is_told_and_removed(open_store, stored, tmp_path) -> None:
    left = paths_of(tmp_path).checkpoints / ".removed-1"
    (left / "segments").mkdir(parents=True)
    async with open_store() as runtime:
        (told,) = await runtime.doctor()
        assert not told.healthy and wrong(told)[0].what == "checkpoints/.removed-1" and left.exists()
        (told,) = await runtime.doctor(rebuild=True)
        assert told.healthy and not left.exists()
