"""Looking at a session without touching it: a copy that can be opened while another process owns the original.

The journal is copied (a consistent copy, whoever writes to it meanwhile); segments and snapshots are immutable, so the
copy has names of its own for them, and keeps those that the owner merges or drops meanwhile. The index is left out:
looking needs none.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from memtier.errors import SessionNotFoundError
from memtier_backends.files import NO_LINKS, storage_errors
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths, check_never_begun, session_folder
from memtier_backends.sqlite_file import connect, sqlite_errors

__all__ = ["peek", "require_session"]

TRIES = 5
"""An owner that merges segments may drop a file just when it is to be named."""


def require_session(store: Path, tenant: str, session_id: str) -> SessionPaths:
    """Where a session lies.

    Raises:
        ConfigError: the store or an id cannot be one.
        SessionNotFoundError: the store holds no such session.
        CorruptMemoryError: its journal is missing from its folder.
    """
    paths = SessionPaths(session_folder(store, tenant, session_id))
    if not paths.journal.exists():
        check_never_begun(paths.folder)
        raise SessionNotFoundError(
            f"there is no session {session_id!r} of tenant {tenant!r} in {store}. List those there are with: "
            f"memtier sessions --store {store}"
        )
    return paths


@contextmanager
def peek(store: Path, tenant: str, session_id: str) -> Iterator[Path]:
    """A temporary store that holds a copy of one session, under the same ids.

    Raises:
        SessionNotFoundError: the store holds no such session.
        CorruptMemoryError: its journal is damaged.
    """
    original = require_session(store, tenant, session_id)
    with tempfile.TemporaryDirectory(prefix="memtier-peek-") as folder:
        copy = SessionPaths(session_folder(folder, tenant, session_id))
        for part in (copy.segments, copy.snapshots):
            part.mkdir(parents=True)
        for _ in range(TRIES):
            _copy_journal(original, copy)
            if _link_files(original, copy):
                break
        yield Path(folder)


def _copy_journal(original: SessionPaths, copy: SessionPaths) -> None:
    with (
        sqlite_errors(original.journal, "copy the journal"),
        closing(connect(original.journal, read_only=True)) as source,
        closing(sqlite3.connect(copy.journal)) as target,
    ):
        source.backup(target)


def _link_files(original: SessionPaths, copy: SessionPaths) -> bool:
    """Name the files that the copied journal names; False if some went meanwhile, and a newer journal names others."""
    journal = SqliteJournal.open(copy.journal)
    try:
        files = [(original.segments / m.name, copy.segments / m.name) for m in journal.segments()]
        files += [(original.snapshots / s.name, copy.snapshots / s.name) for s in journal.snapshots()]
    finally:
        journal.close()
    with storage_errors(f"look at the files of {original.folder}"):
        return all(here.exists() or _link(there, here) for there, here in files)


def _link(there: Path, here: Path) -> bool:
    try:
        os.link(there, here)
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        # another disk: looked at where it lies, as long as it lies there
        here.symlink_to(there)
    return True
