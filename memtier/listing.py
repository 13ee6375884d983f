"""What sessions a store holds, read from their journals alone, and how one is removed."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

from memtier.errors import SessionNotFoundError, StorageError
from memtier.folder import META
from memtier.reports import SessionInfo
from memtier_backends.files import bytes_under, storage_errors
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import (
    SessionPaths,
    check_store,
    remove_session,
    session_folder,
    session_folders,
    sweep_removed,
    traces,
)
from memtier_backends.lock import SessionLock

__all__ = ["describe_all", "list_sessions", "remove_session_of", "remove_tenant"]

log = logging.getLogger("memtier")


def list_sessions(store: str | Path, tenant: str = "default") -> list[SessionInfo]:
    """Every session of a tenant, read from the journals: no model, no lock, nothing written.

    A session whose journal cannot be read is left out, with a warning in the log that names its folder.

    Raises:
        ConfigError: a store that is no local folder.
        StorageError: the store cannot be read.
    """
    return describe_all(check_store(store), tenant, frozenset())


def describe_all(store: Path, tenant: str, open_ids: frozenset[str]) -> list[SessionInfo]:
    """See `list_sessions`; `open_ids` are those that the asking runtime has open."""
    with storage_errors(f"list the sessions in {store}"):
        folders = session_folders(store, tenant)
    listed = (_told(folder, tenant, open_ids) for folder in folders)
    return sorted((info for info in listed if info is not None), key=lambda info: info.id)


def _told(folder: Path, tenant: str, open_ids: frozenset[str]) -> SessionInfo | None:
    try:
        with storage_errors(f"read {folder}"):
            return _describe(folder, tenant, open_ids)
    except (StorageError, KeyError, TypeError, ValueError) as error:
        # one that is damaged, or holds what no session says of itself, must not hide the others
        log.warning("%s is left out, its journal cannot be read: %s. Run: memtier doctor", folder, error)
        return None


def _describe(folder: Path, tenant: str, open_ids: frozenset[str]) -> SessionInfo | None:
    try:
        journal = SqliteJournal.open(SessionPaths(folder).journal, read_only=True)
    except SessionNotFoundError:
        return None  # it died before it began, or was deleted meanwhile
    try:
        meta = journal.get_meta(META)
        if meta is None:
            return None
        turns, segments = journal.turns(), journal.segments()
        return SessionInfo(
            id=meta["id"],
            tenant=tenant,
            position=journal.position,
            turns=len(turns),
            blocks=segments[-1].end_block if segments else journal.first_block,
            bytes_on_disk=bytes_under(folder),
            created_at=meta["created_at"],
            updated_at=max((turn.created_at for turn in turns), default=None),
            model=meta["model"]["name"],
            open=meta["id"] in open_ids,
        )
    finally:
        journal.close()


def remove_session_of(store: str | Path, tenant: str, session_id: str) -> list[str]:
    """Remove a session's folder, with all in it.

    Returns:
        Ids of forks, which are sessions of their own and still hold what they shared with it.

    Raises:
        SessionNotFoundError: there is none.
        SessionBusyError: another runtime holds it.
    """
    store = check_store(store)
    folder = session_folder(store, tenant, session_id)
    sweep_removed(folder.parent)
    # one that lost its journal is removed, too: its messages say so
    if not SessionPaths(folder).journal.exists() and not traces(folder):
        raise SessionNotFoundError(
            f"there is no session {session_id!r} in {folder.parent}. Runtime.sessions() lists those there are."
        )
    with SessionLock.acquire(folder):
        lineages = {path: _lineage(path) for path in session_folders(store, tenant)}
        mine = lineages.get(folder)
        remove_session(folder)
    return sorted(
        known[1] for path, known in lineages.items() if known and mine and path != folder and known[0] == mine[0]
    )


def remove_tenant(store: str | Path, tenant: str) -> list[str]:
    """Remove every session of a tenant; their ids. All of them, or none.

    Raises:
        SessionBusyError: one of them is open; nothing was removed.
    """
    store = check_store(store)
    sweep_removed(store)
    folders = session_folders(store, tenant)
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(SessionLock.acquire(folder))
        known = [_lineage(folder) for folder in folders]
        if folders:
            remove_session(folders[0].parent)
    return sorted(one[1] for one in known if one)


def _lineage(folder: Path) -> tuple[str, str] | None:
    """The lineage and the id of a session; None if it cannot be read, which must not keep it from being removed."""
    try:
        journal = SqliteJournal.open(SessionPaths(folder).journal, read_only=True)
        try:
            meta = journal.get_meta(META)
        finally:
            journal.close()
    except SessionNotFoundError:
        return None
    except StorageError as error:
        log.warning("%s cannot be read: %s", folder, error)
        return None
    return None if meta is None else (meta["lineage"], meta["id"])
