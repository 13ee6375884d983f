"""Copies of a session: forks and checkpoints. The journal is copied, immutable files get a second name.

A copy appears whole: it is made in a folder of its own inside the session's, which is then renamed. So a crash leaves a
copy or none, and what it leaves of one is dropped when the session is opened next.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memtier.errors import CorruptMemoryError, IncompatibleMemoryError, SessionError, SessionNotFoundError
from memtier.folder import META, SessionFolder
from memtier.recovery.reports import CheckpointInfo
from memtier_backends.files import flush_folder, link_or_copy, storage_errors
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths, check_never_begun, remove_session
from memtier_backends.lock import SessionLock

__all__ = ["checkpoints", "drop_checkpoint", "fork_to", "make_checkpoint", "restore_checkpoint"]

log = logging.getLogger("memtier")

CHECKPOINT = "checkpoint"


def fork_to(source: SessionFolder, target: Path, session_id: str) -> None:
    """Copy a session to the folder of a new one. All that it wrote so far must be on disk.

    Raises:
        SessionError: there is such a session.
        StorageError: the copy could not be written; nothing of it is left.
    """
    meta = source.journal.get_meta(META)
    forked = {**meta, "id": session_id, "created_at": time.time(), "forked_from": meta["id"]}
    try:
        _copy(source, target, {META: forked}, with_index=True)
    except FileExistsError as error:
        raise SessionError(
            f"session {session_id!r} exists already; a fork needs a new id. Delete that session, or choose another id."
        ) from error


def make_checkpoint(source: SessionFolder, name: str) -> None:
    """Keep a session as it stands, under a name. All that it wrote so far must be on disk.

    Raises:
        SessionError: there is a checkpoint of that name.
        StorageError: it could not be written; nothing of it is left.
    """
    target = source.paths.checkpoint(name).folder
    with storage_errors(f"make the folder {target.parent}"):
        target.parent.mkdir(exist_ok=True)
    try:
        _copy(source, target, {CHECKPOINT: {"name": name, "created_at": time.time()}}, with_index=False)
    except FileExistsError as error:
        raise SessionError(
            f"there is a checkpoint {name!r} already. Choose another name, or drop it with "
            f"session.drop_checkpoint({name!r})."
        ) from error


def checkpoints(paths: SessionPaths) -> list[CheckpointInfo]:
    """The checkpoints of a session, oldest first. One that is damaged is left out, with a warning in the log.

    Raises:
        StorageError: one of them cannot be read.
    """
    known = []
    for kept in paths.checkpoint_folders():
        try:
            known.append(_describe(kept))
        except (CorruptMemoryError, SessionNotFoundError) as error:
            log.warning("the checkpoint in %s is left out: %s Run: memtier doctor", kept.folder, error)
    return sorted(known, key=lambda info: info.created_at)


def restore_checkpoint(session: SessionFolder, name: str) -> None:
    """Make a session what it was at a checkpoint, which stays. What was not kept in one is gone.

    Files come first, the journal, in one transaction, last: after a crash the session is what it was, or what it
    became.

    Raises:
        SessionError: there is no such checkpoint.
        IncompatibleMemoryError: the session was given to another model since; names the field.
        CorruptMemoryError: it is damaged; the session is as it was.
    """
    kept = require_checkpoint(session.paths, name)
    opened = SqliteJournal.open(kept.journal, read_only=True)
    try:
        opened.verify()
        _check_writer(session.journal.get_meta(META), opened.get_meta(META), name)
        segments = [record.name for record in opened.segments()]
        snapshots = [record.name for record in opened.snapshots()]
    finally:
        opened.close()
    _link(kept.segments, session.paths.segments, segments)
    lost = _link_what_is_there(kept.snapshots, session.paths.snapshots, snapshots)
    session.drop_index()
    session.journal.replace_with(kept.journal)
    for snapshot in lost:
        session.journal.drop_snapshot(snapshot)
    session.journal.set_meta(CHECKPOINT, None)
    session.clean()


def _check_writer(now: dict[str, Any], then: dict[str, Any], name: str) -> None:
    for part in ("model", "memory"):
        for field in sorted((now[part].keys() | then[part].keys()) - {"name", "dtype"}):
            if now[part].get(field) != then[part].get(field):
                raise IncompatibleMemoryError(
                    f"checkpoint {name!r} was written by another model or memory config: its {field} differs from the "
                    f"session's, which was given to another model since. Restore it under the model that wrote it."
                )


def drop_checkpoint(session: SessionFolder, name: str) -> None:
    """Remove a checkpoint. Raises SessionError if there is none of that name."""
    remove_session(require_checkpoint(session.paths, name).folder)


def require_checkpoint(paths: SessionPaths, name: str) -> SessionPaths:
    """Where a checkpoint lies. Raises SessionError if there is none of that name."""
    kept = paths.checkpoint(name)
    if not kept.journal.exists():
        known = ", ".join(repr(info.name) for info in checkpoints(paths)) or "none"
        raise SessionError(f"there is no checkpoint {name!r}; there are: {known}.")
    return kept


def _copy(source: SessionFolder, target: Path, meta: Mapping[str, Any], *, with_index: bool) -> None:
    """Copy to a folder that is not there yet, without what was taken back.

    Raises:
        FileExistsError: there is a session.
        SessionBusyError: another process is opening one.
        CorruptMemoryError: there was one, and its journal is lost.
    """
    # a folder that holds no journal is what a session leaves that died before it began
    if SessionPaths(target).journal.exists():
        raise FileExistsError(target)
    journal = source.journal
    partial = SessionPaths(source.paths.partial())
    try:
        with storage_errors(f"copy the session to {target}"):
            partial.folder.mkdir()
        journal.copy_to(partial.journal)
        _link(source.paths.segments, partial.segments, [record.name for record in journal.segments()])
        snapshots = [record.name for record in journal.snapshots()]
        lost = _link_what_is_there(source.paths.snapshots, partial.snapshots, snapshots)
        with storage_errors(f"copy the session to {target}"):
            if with_index and source.paths.index.is_dir():
                shutil.copytree(source.paths.index, partial.index, copy_function=_link_file)
        copy = SqliteJournal.open(partial.journal)
        try:
            # a forget reaches what stands in a copy, and nothing else
            copy.drop_rolled_back()
            for snapshot in lost:
                copy.drop_snapshot(snapshot)
            for key, value in meta.items():
                copy.set_meta(key, value)
            if not with_index:
                copy.set_indexed_through(0, seal="")
        finally:
            copy.close()
        with storage_errors(f"copy the session to {target}"):
            flush_folder(partial.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
        while not _put_in_place(partial.folder, SessionPaths(target)):
            pass
        with storage_errors(f"copy the session to {target}"):
            flush_folder(target.parent)
    except BaseException:
        shutil.rmtree(partial.folder, ignore_errors=True)
        raise


def _put_in_place(partial: Path, target: SessionPaths) -> bool:
    """Rename to a folder in which no session ever began; False if somebody came in between, and it must be tried again.

    What a session leaves there that died before it began goes. Whoever is opening one there holds its lock.
    """
    if not target.folder.exists():
        return _renamed(partial, target.folder)
    with SessionLock.acquire(target.folder):
        if target.journal.exists():
            raise FileExistsError(target.folder)
        check_never_begun(target.folder)
        with storage_errors(f"copy the session to {target.folder}"):
            shutil.rmtree(target.folder)
        return _renamed(partial, target.folder)


def _renamed(partial: Path, target: Path) -> bool:
    with storage_errors(f"copy the session to {target}"):
        try:
            os.rename(partial, target)
        except OSError as error:
            # a folder is replaced only while it is empty
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
    return True


def _link(source: Path, target: Path, names: list[str]) -> None:
    with storage_errors(f"copy {source} to {target}"):
        target.mkdir(exist_ok=True)
        for name in names:
            try:
                link_or_copy(source / name, target / name)
            except FileNotFoundError as error:
                raise CorruptMemoryError(
                    f"{source / name} is missing, though its journal names it. Run: memtier doctor --rebuild"
                ) from error
        flush_folder(target)


def _link_what_is_there(source: Path, target: Path, names: list[str]) -> list[str]:
    """As `_link` for snapshots, which only save time: those that are missing, which no copy needs."""
    lost = [name for name in names if not (source / name).exists()]
    for name in lost:
        log.warning("the snapshot %s is missing, and left out", source / name)
    _link(source, target, [name for name in names if name not in lost])
    return lost


def _link_file(source: str, target: str) -> None:
    link_or_copy(Path(source), Path(target))


def _describe(kept: SessionPaths) -> CheckpointInfo:
    journal = SqliteJournal.open(kept.journal, read_only=True)
    try:
        about = journal.get_meta(CHECKPOINT)
        if about is None:
            raise CorruptMemoryError(f"{kept.folder} does not say which checkpoint it is. Remove that folder.")
        return CheckpointInfo(name=about["name"], position=journal.position, created_at=about["created_at"])
    finally:
        journal.close()
