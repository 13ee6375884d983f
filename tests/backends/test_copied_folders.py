"""Where a copy of a session is put: over nothing that was a session, nor under one that is just opening."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from memtier.errors import CorruptMemoryError, SessionBusyError, SessionError
from memtier.folder import META, Backends, SessionFolder
from memtier.recovery.copies import checkpoints, fork_to, make_checkpoint
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths, session_folder
from memtier_backends.lock import SessionLock
from memtier_backends.testing import begin_turn

REFUSED = list(range(900_000, 900_040))


@pytest.fixture
def source(tmp_path: Path) -> Iterator[SessionFolder]:
    """A session in which a step was refused."""
    paths = SessionPaths(session_folder(tmp_path, "t", "a"))
    with SessionLock.acquire(paths.folder):
        journal = SqliteJournal.open(paths.journal)
        journal.set_meta(META, {"id": "a", "lineage": "x"})
        journal.commit(begin_turn(journal), list(range(20)), text="before")
        journal.commit(begin_turn(journal, source="a refused source"), REFUSED, text="refused text")
        journal.rollback(20, "the model refused it")
        yield SessionFolder(paths, None, journal, Backends())
        journal.close()


@pytest.fixture
def target(tmp_path: Path) -> SessionPaths:
    return SessionPaths(session_folder(tmp_path, "t", "b"))


def left_of(source: SessionFolder) -> list[str]:
    return [path.name for path in source.paths.folder.iterdir() if path.name.startswith(".partial-")]


def test_a_copy_does_not_carry_what_was_taken_back(source: SessionFolder, target: SessionPaths) -> None:
    fork_to(source, target.folder, "b")
    make_checkpoint(source, "kept")
    copies = [target, *source.paths.checkpoint_folders()]
    assert len(copies) == 2
    ids = np.array(REFUSED, "<i4").tobytes()
    source.journal.checkpoint()
    for paths, holds in ((source.paths, True), *((copy, False) for copy in copies)):
        data = paths.journal.read_bytes()
        assert [part in data for part in (ids[:40], b"refused text", b"a refused source")] == [holds] * 3
        journal = SqliteJournal.open(paths.journal, read_only=True)
        journal.verify()
        assert journal.tokens(0, 20).tolist() == list(range(20))
        assert [(turn.start, turn.end, turn.text) for turn in journal.turns()] == [(0, 20, "before")]
        journal.close()


def test_a_copy_takes_the_place_of_what_died_before_it_began(source: SessionFolder, target: SessionPaths) -> None:
    target.segments.mkdir(parents=True)
    target.lock.touch()
    (target.folder / "index.lance").mkdir()
    fork_to(source, target.folder, "b")
    assert sorted(path.name for path in target.folder.iterdir()) == ["journal.sqlite3", "segments", "snapshots"]
    with pytest.raises(SessionError, match="exists already"):
        fork_to(source, target.folder, "b")


def test_a_copy_does_not_take_the_place_of_a_session_that_lost_its_journal(
    source: SessionFolder, target: SessionPaths
) -> None:
    target.segments.mkdir(parents=True)
    (target.segments / "a").write_bytes(b"x")
    with pytest.raises(CorruptMemoryError, match="segments beside it are of a session"):
        fork_to(source, target.folder, "b")
    assert (target.segments / "a").exists()
    assert not left_of(source)


def test_a_copy_does_not_take_the_place_of_a_session_that_is_opening(
    source: SessionFolder, target: SessionPaths
) -> None:
    with SessionLock.acquire(target.folder), pytest.raises(SessionBusyError):
        fork_to(source, target.folder, "b")
    assert target.lock.exists()
    assert not left_of(source)


def test_a_session_that_opens_while_its_folder_is_taken_is_seen(
    source: SessionFolder, target: SessionPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    opener: list[SessionLock] = []
    rename, rmtree = os.rename, shutil.rmtree

    def opens_before(partial: Path, folder: Path) -> None:
        if folder == target.folder and not opener:
            opener.append(SessionLock.acquire(target.folder))
        rename(partial, folder)

    monkeypatch.setattr(os, "rename", opens_before)
    with pytest.raises(SessionBusyError):
        fork_to(source, target.folder, "b")
    assert opener[0].held and target.lock.exists()
    opener.pop().release()
    # now there is a lock to remove, and another opener comes in just then
    with pytest.raises(SessionBusyError):
        fork_to(source, target.folder, "b")
    opener.pop().release()
    opener.append(SessionLock.acquire(target.folder.with_name("other")))
    fork_to(source, target.folder, "b")
    assert target.journal.exists()
    opener.pop().release()
    rmtree(target.folder.with_name("other"))


def test_a_checkpoint_that_a_removal_left_is_swept_when_the_session_is_cleaned(source: SessionFolder) -> None:
    make_checkpoint(source, "kept")
    make_checkpoint(source, "dropped")
    (folder,) = [paths.folder for paths in source.paths.checkpoint_folders() if _name(paths) == "dropped"]
    folder.rename(folder.with_name(".removed-0"))
    source.clean()
    assert [path.name for path in source.paths.checkpoints.iterdir()] == [
        paths.folder.name for paths in source.paths.checkpoint_folders()
    ]
    assert [info.name for info in checkpoints(source.paths)] == ["kept"]


def _name(paths: SessionPaths) -> str:
    journal = SqliteJournal.open(paths.journal, read_only=True)
    try:
        return journal.get_meta("checkpoint")["name"]
    finally:
        journal.close()
