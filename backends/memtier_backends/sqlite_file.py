"""One SQLite file, opened so that what it says is durable is durable; and SQLite's errors told as ours."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memtier.errors import CorruptMemoryError, MemtierError, StorageError, StorageFullError
from memtier_backends.files import TEMPORARY_SUFFIX, flush, flush_folder, storage_errors

__all__ = ["connect", "copy_database", "replace_database", "sqlite_errors", "truncate_log"]

# How long a statement waits for a reader or writer of another process.
_BUSY_TIMEOUT_SECONDS = 5.0

# Our SQL is fixed, so a table or column that is not there (SQLITE_ERROR), a value of the wrong type or a broken
# constraint means that the file is not as we wrote it.
_CORRUPT = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_MISMATCH,
}
_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}


@contextmanager
def sqlite_errors(path: Path, action: str, *, writing: bool = False) -> Iterator[None]:
    """Tell a sqlite3.Error as StorageFullError, CorruptMemoryError or StorageError; `action` completes "cannot ..."."""
    try:
        yield
    except sqlite3.Error as error:
        if _code(error) & 0xFF == sqlite3.SQLITE_TOOBIG and writing:
            raise _too_large(path, action) from error
        raise _told(error, path, action) from error
    except OverflowError as error:
        if not writing:
            raise
        # Python's own limit, of 2 GiB
        raise _too_large(path, action) from error
    except UnicodeDecodeError as error:
        # SQLite quotes what it cannot read, and Python cannot read the quotation either.
        raise _damaged(error, path, action) from error


def connect(path: Path, *, read_only: bool = False, wal: bool = True) -> sqlite3.Connection:
    """Open an existing file; transactions are explicit.

    Deleted rows are overwritten (secure_delete), commits reach the device (synchronous=FULL), and on macOS the drive's
    cache is flushed too (fullfsync).

    Args:
        wal: it is a whole database with a write-ahead log; else a new file.

    Raises:
        CorruptMemoryError: the file is empty.
    """
    if wal and path.stat().st_size == 0:
        # SQLite would take it for a new file, and delete its log
        raise CorruptMemoryError(
            f"{path} is damaged: it is empty, and no journal ever was. Keep the file and its log, restore the "
            "session's folder from a backup, or delete the session."
        )
    mode = "ro" if read_only else "rw"
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=_BUSY_TIMEOUT_SECONDS,
    )
    try:
        for pragma in ("trusted_schema=OFF", "cell_size_check=ON"):
            connection.execute(f"PRAGMA {pragma}")
        if not read_only:
            for pragma in ("synchronous=FULL", "fullfsync=ON", "checkpoint_fullfsync=ON", "secure_delete=ON"):
                connection.execute(f"PRAGMA {pragma}")
            if wal:
                _use_write_ahead_log(connection, path)
        # Reads the header, so a file that is no database is told here.
        connection.execute("PRAGMA schema_version").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def truncate_log(connection: sqlite3.Connection, path: Path) -> None:
    """Fold the write-ahead log into the file and cut it to nothing, so that no old bytes stay in it.

    Raises:
        StorageError: a reader held it busy.
    """
    busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    if busy:
        raise StorageError(
            f"cannot checkpoint {path}: another reader kept it busy for {_BUSY_TIMEOUT_SECONDS:g} s. "
            "Nothing is lost; end that reader (a report, a backup, a SQLite shell) and call again."
        )


def copy_database(connection: sqlite3.Connection, path: Path, target: Path) -> None:
    """Copy an open database to a new file: all of it appears at once, and is on the disk on return.

    Raises:
        StorageError: `target` is there already, or cannot be written.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    with storage_errors(f"copy {path} to {target}"), sqlite_errors(path, "be copied"):
        if target.exists():
            raise StorageError(f"cannot copy {path} to {target}: there is such a file. Choose another name.")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            copy = sqlite3.connect(temporary, isolation_level=None)
            try:
                # the copy is not named yet: it is flushed once, below
                copy.execute("PRAGMA synchronous=OFF")
                connection.backup(copy)
            finally:
                copy.close()
            flush(descriptor)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        flush_folder(target.parent)


def replace_database(connection: sqlite3.Connection, path: Path, source: sqlite3.Connection) -> None:
    """Make an open database what another one says, in one transaction."""
    with sqlite_errors(path, "be replaced"):
        source.backup(connection)


def _use_write_ahead_log(connection: sqlite3.Connection, path: Path) -> None:
    (mode,) = connection.execute("PRAGMA journal_mode=WAL").fetchone()
    if mode != "wal":
        raise StorageError(
            f"cannot open {path}: its disk gives journal mode {mode!r}, and 'wal' is needed. "
            "Put the store on a local disk; network disks do not do."
        )


def _told(error: sqlite3.Error, path: Path, action: str) -> MemtierError:
    code = _code(error)
    primary = code & 0xFF
    if primary == sqlite3.SQLITE_FULL:
        return StorageFullError(
            f"cannot {action} in {path}: no space is left ({error}). Nothing of it was written and what was "
            "acknowledged is safe; free some space and call again."
        )
    # nothing that large was ever written
    if primary in (*_CORRUPT, sqlite3.SQLITE_TOOBIG) or code == sqlite3.SQLITE_IOERR_SHORT_READ:
        return _damaged(error, path, action)
    if primary in _BUSY:
        return StorageError(
            f"cannot {action}: {path} is in use by another connection ({error}). Close it there and call again."
        )
    return StorageError(f"cannot {action} in {path}: {error}. Check the disk and its permissions, then call again.")


def _code(error: sqlite3.Error) -> int:
    # Python's own errors (a text that is not UTF-8) carry no code of SQLite; they come from damaged bytes only.
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)


def _too_large(path: Path, action: str) -> StorageError:
    return StorageError(
        f"cannot {action} in {path}: a text, its source and metadata, or the tokens given at once are larger than "
        "SQLite keeps in a row, 1,000,000,000 bytes. Nothing of it was written; split it and send the parts."
    )


def _damaged(error: Exception, path: Path, action: str) -> CorruptMemoryError:
    return CorruptMemoryError(
        f"cannot {action}: {path} is damaged ({error}). Keep the file, restore the session's folder from a backup, "
        "or delete the session."
    )
