"""A journal's file while it is open: who may use its connection when, and what is done to it as a whole."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from memtier.errors import StorageError
from memtier_backends.files import storage_errors
from memtier_backends.sqlite_file import copy_database, replace_database, sqlite_errors, truncate_log

__all__ = ["JournalFile"]


class JournalFile:
    """One connection has one transaction: a second thread waits for the first.

    Args:
        path: the file.
        connection: to it, from `sqlite_file.connect`.
        read_only: nothing is written.
        undone: called when a transaction has failed, before anyone else may read.
    """

    def __init__(
        self, path: Path, connection: sqlite3.Connection, *, read_only: bool, undone: Callable[[], None]
    ) -> None:
        self.path = path
        self._open_connection = connection
        self._read_only = read_only
        self._undone = undone
        self._closed = False
        self._one_at_a_time = threading.RLock()

    @contextmanager
    def transaction(self, action: str) -> Iterator[None]:
        """All of the body's writes or none; durable when it ends."""
        with self._one_at_a_time, sqlite_errors(self.path, action, writing=True):
            connection = self._connection()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                connection.execute("COMMIT")
            except BaseException:
                self._undone()
                # SQLite has rolled back by itself after some errors (a full disk).
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self, action: str) -> Iterator[None]:
        """One consistent view for several reads, also beside a writer in another process."""
        with self._one_at_a_time, sqlite_errors(self.path, action):
            connection = self._connection()
            connection.execute("BEGIN")
            try:
                yield
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")

    def copy_to(self, path: Path) -> None:
        """Copy all of it to a new file."""
        with self._one_at_a_time:
            copy_database(self._connection(), self.path, path)

    def replace_with(self, source: sqlite3.Connection) -> None:
        """Become what another database says, in one transaction."""
        with self._one_at_a_time:
            try:
                replace_database(self._connection(), self.path, source)
            finally:
                self._undone()

    @property
    def bytes_on_disk(self) -> int:
        """Of the file and its write-ahead log."""
        files = (self.path, Path(f"{self.path}-wal"))
        with storage_errors(f"read {self.path}"):
            return sum(file.stat().st_size for file in files if file.exists())

    def checkpoint(self) -> None:
        """Fold the write-ahead log into the file, and cut it to nothing."""
        with self._one_at_a_time, sqlite_errors(self.path, "checkpoint"):
            truncate_log(self._connection(), self.path)

    def close(self) -> None:
        """Checkpoint, unless it is read only, and close; a second time does nothing."""
        if self._closed:
            return
        try:
            if not self._read_only:
                self.checkpoint()
        finally:
            self._closed = True
            self._open_connection.close()

    def _connection(self) -> sqlite3.Connection:
        if self._closed:
            raise StorageError(f"the journal {self.path} is closed; open it again.")
        return self._open_connection
