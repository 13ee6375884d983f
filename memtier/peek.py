"""Looking at a session without touching it: a copy that can be opened while another process owns the original.

The journal is copied (a consistent copy, whoever writes to it meanwhile); segments and snapshots are immutable, so the
copy links to them. The index is left out: looking needs none.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from memtier.errors import SessionNotFoundError
from memtier_backends.layout import SessionPaths, check_never_begun, session_folder
from memtier_backends.sqlite_file import connect, sqlite_errors

__all__ = ["peek", "require_session"]


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
        copy.folder.mkdir(parents=True)
        with (
            sqlite_errors(original.journal, "copy the journal"),
            closing(connect(original.journal, read_only=True)) as source,
            closing(sqlite3.connect(copy.journal)) as target,
        ):
            source.backup(target)
        for there, here in ((original.segments, copy.segments), (original.snapshots, copy.snapshots)):
            here.mkdir()
            for file in there.iterdir() if there.is_dir() else ():
                (here / file.name).symlink_to(file)
        yield Path(folder)
