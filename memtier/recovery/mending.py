"""Putting a mended journal in the place of a damaged one, and what cannot be accounted for out of the way."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4

from memtier_backends.files import flush_folder, link_or_copy, storage_errors
from memtier_backends.journal_salvage import salvage
from memtier_backends.layout import RESCUED_PREFIX, SessionPaths

__all__ = ["mend_journal", "put_aside"]


def mend_journal(paths: SessionPaths) -> tuple[int, int | None]:
    """Make a damaged journal one of its entries before the damage; the damaged one goes to the quarantine.

    The caller holds the session's lock, and has the journal not open.

    Returns:
        tokens that were kept, and at most how many were not; None if the journal does not say.

    Raises:
        CorruptMemoryError: nothing can be kept; the journal is left as it is.
        StorageError: it cannot be written.
    """
    rescued = paths.folder / f"{RESCUED_PREFIX}{uuid4().hex}.sqlite3"
    try:
        found = salvage(paths.journal, rescued)
        with storage_errors(f"put the mended journal in {paths.folder}"):
            _put_in_place(paths, rescued)
    finally:
        for path in paths.folder.glob(f"{rescued.name}*"):
            path.unlink()
    return found


def _put_in_place(paths: SessionPaths, rescued: Path) -> None:
    """At no moment is there no journal: a session without one would be taken for a new one."""
    log, shared = Path(f"{paths.journal}-wal"), Path(f"{paths.journal}-shm")
    aside = paths.quarantine / f"{paths.journal.name}.{uuid4().hex[:8]}"
    paths.quarantine.mkdir(exist_ok=True)
    link_or_copy(paths.journal, aside)
    if log.exists() and log.stat().st_size:
        link_or_copy(log, Path(f"{aside}-wal"))
    flush_folder(paths.quarantine)
    flush_folder(paths.folder)
    # first: SQLite would play the log of the damaged journal into the mended one
    log.unlink(missing_ok=True)
    shared.unlink(missing_ok=True)
    flush_folder(paths.folder)
    os.replace(rescued, paths.journal)
    flush_folder(paths.folder)


def put_aside(paths: SessionPaths, *files: Path) -> None:
    """Move files to the session's quarantine, each under a name of its own; nothing is overwritten.

    Raises:
        StorageError: one cannot be moved.
    """
    with storage_errors(f"move files to {paths.quarantine}"):
        paths.quarantine.mkdir(exist_ok=True)
        for path in files:
            if path.exists() or path.is_symlink():
                os.replace(path, paths.quarantine / f"{path.name}.{uuid4().hex[:8]}")
        flush_folder(paths.quarantine)
        flush_folder(paths.folder)
