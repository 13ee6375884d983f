"""What sessions a store holds, read from their journals alone, and how one is removed."""

from __future__ import annotations

from pathlib import Path

from memtier.errors import SessionNotFoundError
from memtier.folder import META
from memtier.reports import SessionInfo
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths, check_store, remove_session, session_folders
from memtier_backends.lock import SessionLock

__all__ = ["describe_all", "list_sessions", "remove"]


def list_sessions(store: str | Path, tenant: str = "default") -> list[SessionInfo]:
    """Every session of a tenant, read from the journals: no model, no lock, nothing written.

    Raises:
        ConfigError: a store that is no local folder.
        StorageError: a journal cannot be read.
    """
    return describe_all(check_store(store), tenant, frozenset())


def describe_all(store: Path, tenant: str, open_ids: frozenset[str]) -> list[SessionInfo]:
    """See `list_sessions`; `open_ids` are those that the asking runtime has open."""
    listed = (_describe(folder, tenant, open_ids) for folder in session_folders(store, tenant))
    return sorted((info for info in listed if info is not None), key=lambda info: info.id)


def _describe(folder: Path, tenant: str, open_ids: frozenset[str]) -> SessionInfo | None:
    paths = SessionPaths(folder)
    if not paths.journal.exists():
        return None  # a session that died before it began
    journal = SqliteJournal.open(paths.journal, read_only=True)
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
            blocks=segments[-1].end_block if segments else 0,
            bytes_on_disk=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            created_at=meta["created_at"],
            updated_at=max((turn.created_at for turn in turns), default=None),
            model=meta["model"]["name"],
            open=meta["id"] in open_ids,
        )
    finally:
        journal.close()


def remove(folder: Path, session_id: str) -> None:
    """Remove a session's folder.

    Raises:
        SessionNotFoundError: there is none.
        SessionBusyError: another runtime holds it.
    """
    if not SessionPaths(folder).journal.exists():
        raise SessionNotFoundError(
            f"there is no session {session_id!r} in {folder.parent}. Runtime.sessions() lists those there are."
        )
    with SessionLock.acquire(folder):
        remove_session(folder)
