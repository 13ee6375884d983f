"""Folders of sessions hold any id apart; a session has one owner, and none once that is dead."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memtier.errors import ConfigError, SessionBusyError, SessionNotFoundError, StorageError
from memtier.listing import remove_session_of, remove_tenant
from memtier_backends.layout import (
    SessionPaths,
    check_store,
    drop_partial,
    remove_session,
    session_folder,
    session_folders,
    sweep_removed,
)
from memtier_backends.lock import SessionLock
from memtier_backends.space import Space

ODD_IDS = ["a", "A", "../..", "/etc/passwd", "a/b", "a\\b", "\0", " ", "a ", "é", "e\u0301", "\ud800", "x" * 5000, "."]


def test_odd_ids_have_folders_of_their_own_inside_the_store(tmp_path: Path) -> None:
    folders = {session_folder(tmp_path, tenant, session) for tenant in ODD_IDS for session in ODD_IDS}
    assert len(folders) == len(ODD_IDS) ** 2
    for folder in folders:
        assert folder.parent.parent == tmp_path
        assert re.fullmatch("[0-9a-f]{32}", folder.name)


def test_a_tenants_folder_is_not_a_sessions_name(tmp_path: Path) -> None:
    folder = session_folder(tmp_path, "alice", "alice")
    assert folder.name != folder.parent.name


def test_the_folder_of_an_id_never_changes() -> None:
    # Written down: a changed hash would lose every session there is.
    assert session_folder("/store", "default", "alice") == Path(
        "/store/fd12106cb12e5f5e64c1818b14cd7a97/764ab634ba8cb62aed345f09fb4a9153"
    )


@pytest.mark.parametrize("wrong", ["", None, 3])
def test_an_empty_id_is_refused(tmp_path: Path, wrong: str) -> None:
    with pytest.raises(ConfigError, match="tenant id"):
        session_folder(tmp_path, wrong, "a")
    with pytest.raises(ConfigError, match="session id"):
        session_folder(tmp_path, "a", wrong)


@pytest.mark.parametrize("store", ["s3://bucket/memory", "db://cloud", "file:///tmp/x", "", "a\0b"])
def test_a_store_that_is_no_folder_is_refused(store: str) -> None:
    with pytest.raises(ConfigError, match="folder"):
        check_store(store)


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file"):
        check_store(tmp_path / "file")


def test_another_platform_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ConfigError, match="Linux or macOS"):
        check_store("memory")


def test_a_store_is_absolute() -> None:
    assert check_store("memory") == Path.cwd() / "memory"


def test_sessions_of_a_tenant_are_listed_and_removed(tmp_path: Path) -> None:
    assert session_folders(tmp_path, "t") == []
    folders = [session_folder(tmp_path, "t", name) for name in ("a", "b", "c")]
    for folder in folders:
        SessionPaths(folder).segments.mkdir(parents=True)
        SessionPaths(folder).journal.write_bytes(b"x")
    SessionPaths(session_folder(tmp_path, "other", "a")).segments.mkdir(parents=True)
    assert session_folders(tmp_path, "t") == sorted(folders)
    remove_session(folders[0])
    assert session_folders(tmp_path, "t") == sorted(folders[1:])
    assert len(session_folders(tmp_path, "other")) == 1


def test_a_removal_that_was_cut_off_is_finished_by_the_next(tmp_path: Path) -> None:
    gone, other = session_folder(tmp_path, "t", "gone"), session_folder(tmp_path, "t", "other")
    other.mkdir(parents=True)
    half = gone.with_name(".removed-0")
    half.mkdir()
    (half / "journal.sqlite3").write_bytes(b"x")
    assert session_folders(tmp_path, "t") == [other]
    remove_session(gone)
    assert list(other.parent.iterdir()) == [other]


def test_what_a_killed_write_left_beside_a_journal_is_removed(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in ("journal.sqlite3", "journal.sqlite3-wal", ".mine.tmp", "lock")]
    left = [tmp_path / f".journal.sqlite3.77.tmp{end}" for end in ("", "-journal")]
    for path in [*kept, *left]:
        path.write_bytes(b"text")
    drop_partial(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_what_removals_left_is_swept_also_while_another_process_does_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep_removed(tmp_path / "there is none")
    left = [tmp_path / ".removed-0", tmp_path / ".removed-1"]
    for folder in left:
        (folder / "segments").mkdir(parents=True)
        for name in ("a", "segments/b"):
            (folder / name).write_bytes(b"x")
    other = tmp_path / "session"
    other.mkdir()
    rmtree = shutil.rmtree
    calls: list[Path] = []

    def remove_beside_another(path: Path) -> None:
        calls.append(path)
        if len(calls) == 1:
            # the other one is faster: it has removed one folder, and is in the middle of this one
            rmtree(left[1 - left.index(path)])
            (path / "a").unlink()
            raise FileNotFoundError(2, "No such file or directory", "a")
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", remove_beside_another)
    sweep_removed(tmp_path)
    assert list(tmp_path.iterdir()) == [other]


def test_what_cannot_be_swept_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".removed-0").mkdir()

    def refuse(path: Path) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(StorageError, match="a removal left"):
        sweep_removed(tmp_path)


def test_a_deletion_that_was_cut_off_is_finished_when_it_is_asked_for_again(tmp_path: Path) -> None:
    gone = session_folder(tmp_path, "t", "a")
    (gone.with_name(".removed-0") / "segments").mkdir(parents=True)
    (tmp_path / ".removed-1").mkdir()
    with pytest.raises(SessionNotFoundError):
        remove_session_of(tmp_path, "t", "a")
    assert list(gone.parent.iterdir()) == []
    assert remove_tenant(tmp_path, "no sessions") == []
    assert not (tmp_path / ".removed-1").exists()


def test_a_session_that_lost_its_journal_can_be_deleted(tmp_path: Path) -> None:
    folder = session_folder(tmp_path, "t", "a")
    SessionPaths(folder).segments.mkdir(parents=True)
    (SessionPaths(folder).segments / "a").write_bytes(b"x")
    assert remove_session_of(tmp_path, "t", "a") == []
    assert not folder.exists()


def test_a_full_disk_keeps_nobody_from_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    with SessionLock.acquire(tmp_path), pytest.raises(SessionBusyError, match="held by another process"):
        SessionLock.acquire(tmp_path)


def test_a_folder_that_goes_while_its_lock_is_opened_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tenant" / "session"
    opened = os.open

    def open_once_it_is_gone(path: Path, *how: int, **options: int) -> int:
        monkeypatch.setattr(os, "open", opened)
        remove_session(folder)
        return opened(path, *how, **options)

    monkeypatch.setattr(os, "open", open_once_it_is_gone)
    with SessionLock.acquire(folder):
        assert (folder / "lock").exists()


def test_every_folder_that_is_made_for_a_store_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr("memtier_backends.space.flush_folder", flushed.append)
    store = tmp_path / "new" / "deep" / "store"
    Space(store, min_free_bytes=0, reserve_bytes=0)
    assert store.is_dir()
    assert flushed == [tmp_path.parent, tmp_path, tmp_path / "new", tmp_path / "new" / "deep"]
    # whoever made it may have died before it flushed anything
    flushed.clear()
    Space(store, min_free_bytes=0, reserve_bytes=0)
    assert flushed == [store.parent]


def test_a_second_owner_in_this_process_is_refused_by_name(tmp_path: Path) -> None:
    with SessionLock.acquire(tmp_path / "session") as lock:
        assert lock.held
        with pytest.raises(SessionBusyError, match=rf"process {os.getpid()} \(this one\) on host"):
            SessionLock.acquire(tmp_path / "session")
    assert not lock.held
    with SessionLock.acquire(tmp_path / "session"):
        pass


def test_releasing_twice_is_harmless(tmp_path: Path) -> None:
    first = SessionLock.acquire(tmp_path)
    first.release()
    second = SessionLock.acquire(tmp_path)
    first.release()
    with pytest.raises(SessionBusyError):
        SessionLock.acquire(tmp_path)
    second.release()


def test_a_lock_whose_owner_has_not_said_its_name_is_busy_all_the_same(tmp_path: Path) -> None:
    with SessionLock.acquire(tmp_path):
        (tmp_path / "lock").write_bytes(b"")
        with pytest.raises(SessionBusyError, match="another process"):
            SessionLock.acquire(tmp_path)


def test_the_lock_of_a_removed_session_does_not_hold_up_a_new_one(tmp_path: Path) -> None:
    folder = tmp_path / "tenant" / "session"
    old = SessionLock.acquire(folder)
    remove_session(folder)
    with SessionLock.acquire(folder):
        old.release()
        with pytest.raises(SessionBusyError):
            SessionLock.acquire(folder)


OWNER = """
import sys
from pathlib import Path
from memtier_backends.lock import SessionLock
lock = SessionLock.acquire(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_another_process_is_named_and_its_lock_is_free_once_it_is_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(SessionBusyError, match=rf"process {owner.pid} on host"):
            SessionLock.acquire(tmp_path)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    with SessionLock.acquire(tmp_path):
        pass
