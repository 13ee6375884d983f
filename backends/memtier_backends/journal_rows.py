"""The rows of a journal: what they are, how they are chained, and the checks that no row is read without.

`entries` is only ever added to: a turn begins, tokens are appended, a text stands for tokens, a rollback takes tokens
back. Each entry carries a BLAKE2b over itself and the digest of the entry before, and `head` keeps the newest digest: a
flipped bit, a lost row and a lost tail are all found. An entry is checked when its body is read.

`live` says how many tokens of an entry still stand (1 or 0 for a text). It is derived: a rollback lowers it, and it is
in no digest. That it follows from the entries, and that no row is missing, is checked for the file: journal_check.py.

`records` holds what is derived from the tokens (manifests of segments, snapshots) and the session's meta, each hashed.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from memtier.errors import ConfigError, CorruptMemoryError, IncompatibleMemoryError
from memtier_backends.files import TEMPORARY_SUFFIX, flush_folder, storage_errors
from memtier_backends.records import fields_digest
from memtier_backends.sqlite_file import connect, sqlite_errors

__all__ = ["FORMAT_VERSION", "Entry", "Head", "JournalRows", "create", "to_json"]

FORMAT_VERSION = 1

# "mmtr": tells our file from any other SQLite file.
_APPLICATION_ID = 0x6D6D7472

_SCHEMA = f"""
BEGIN;
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,        -- turn | tokens | text | rollback
    turn INTEGER NOT NULL,
    start INTEGER NOT NULL,    -- tokens [start, end); a rollback's position
    end INTEGER NOT NULL,
    mark INTEGER NOT NULL,     -- 1: a retrieval mark at the last token
    body BLOB NOT NULL,        -- JSON | int32 little endian | UTF-8 | the reason, UTF-8
    digest BLOB NOT NULL,
    live INTEGER NOT NULL
);
CREATE INDEX live_tokens ON entries (start) WHERE kind = 'tokens' AND live > 0;
CREATE INDEX live_by_turn ON entries (turn, start) WHERE live > 0;
CREATE INDEX turns ON entries (turn) WHERE kind = 'turn';
CREATE INDEX marks ON entries (end) WHERE mark = 1;
CREATE TABLE head (
    seq INTEGER NOT NULL, digest BLOB NOT NULL, position INTEGER NOT NULL, turn INTEGER NOT NULL,
    indexed_through INTEGER NOT NULL, check_digest BLOB NOT NULL
);
CREATE TABLE records (
    kind TEXT NOT NULL,        -- meta | segment | snapshot
    name TEXT NOT NULL,
    rank INTEGER NOT NULL,     -- a segment's first block, a snapshot's position, else 0
    body TEXT NOT NULL,        -- JSON
    digest BLOB NOT NULL,
    PRIMARY KEY (kind, name)
);
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {FORMAT_VERSION};
"""

_COLUMNS = "e.seq, e.kind, e.turn, e.start, e.end, e.mark, e.body, e.digest, e.live"
_CHAINED = f"SELECT {_COLUMNS}, p.digest FROM entries e LEFT JOIN entries p ON p.seq = e.seq - 1"
_ORIGIN = b"memtier journal"
_KINDS = {"meta", "segment", "snapshot"}


@dataclass(frozen=True, slots=True)
class Head:
    """The newest entry, and what follows from all of them."""

    seq: int = 0
    digest: bytes = _ORIGIN
    position: int = 0
    turn: int = -1
    indexed_through: int = 0

    @property
    def check(self) -> bytes:
        return fields_digest(self.seq, self.digest, self.position, self.turn, self.indexed_through)


@dataclass(frozen=True, slots=True)
class Entry:
    seq: int
    kind: str
    turn: int
    start: int
    end: int
    mark: int
    body: bytes
    digest: bytes
    live: int

    def chained(self, previous: bytes) -> bytes:
        """The digest that this entry must carry after an entry of digest `previous`."""
        return fields_digest(previous, self.seq, self.kind, self.turn, self.start, self.end, self.mark, self.body)


class JournalRows:
    """Chained entries, the head and hashed records over one connection. Transactions are the caller's."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self.connection = connection

    def execute(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self.connection.execute(sql, values)

    def corrupt(self, what: str) -> NoReturn:
        raise CorruptMemoryError(
            f"the journal {self.path} is damaged: {what}. Keep the file, restore the session's folder from a backup, "
            "or delete the session."
        )

    def check_opened(self) -> Head:
        """What every open looks at: whose file it is, which format, and that its newest entry is there."""
        (application,) = self.execute("PRAGMA application_id").fetchone()
        (version,) = self.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION_ID:
            self.corrupt(f"its application id is {application:#x}, and a journal's is {_APPLICATION_ID:#x}")
        if version > FORMAT_VERSION:
            raise IncompatibleMemoryError(
                f"the journal {self.path} has format {version}; this version of memtier reads format "
                f"{FORMAT_VERSION}. Install a newer memtier."
            )
        if version != FORMAT_VERSION:
            self.corrupt(f"its format is {version}, and it must be {FORMAT_VERSION}")
        head = self.head()
        newest = self.execute("SELECT seq, digest FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
        if (newest or (0, _ORIGIN)) != (head.seq, head.digest):
            self.corrupt(f"its newest entry is not entry {head.seq}, which was written last")
        return head

    def check_records(self) -> None:
        """Check every record there is."""
        for kind, name, rank, body, digest in self.execute("SELECT kind, name, rank, body, digest FROM records"):
            if kind not in _KINDS:
                self.corrupt(f"there is a record of the unknown kind {kind!r}")
            self._checked_record(kind, name, rank, body, digest)

    def head(self) -> Head:
        rows = self.execute("SELECT seq, digest, position, turn, indexed_through, check_digest FROM head").fetchall()
        if len(rows) != 1 or Head(*rows[0][:-1]).check != rows[0][-1]:
            self.corrupt("its head does not have the hash that was written")
        return Head(*rows[0][:-1])

    def put_head(self, head: Head) -> None:
        self.execute(
            "UPDATE head SET seq = ?, digest = ?, position = ?, turn = ?, indexed_through = ?, check_digest = ?",
            (head.seq, head.digest, head.position, head.turn, head.indexed_through, head.check),
        )

    def append(self, head: Head, kind: str, start: int, end: int, body: bytes, *, mark: int = 0, live: int = 0) -> Head:
        """Add an entry after `head`; returns the head that has it."""
        entry = Entry(head.seq + 1, kind, head.turn, start, end, mark, body, b"", live)
        digest = entry.chained(head.digest)
        self.execute(
            "INSERT INTO entries (seq, kind, turn, start, end, mark, body, digest, live) VALUES (?,?,?,?,?,?,?,?,?)",
            (entry.seq, kind, entry.turn, start, end, mark, body, digest, live),
        )
        head = replace(head, seq=entry.seq, digest=digest)
        self.put_head(head)
        return head

    def entries(self, where: str, values: Sequence[Any]) -> Iterator[Entry]:
        """Entries in order, each checked against its digest and the entry before."""
        for *columns, previous in self.execute(f"{_CHAINED} WHERE {where} ORDER BY e.seq", values):
            yield self._checked_entry(Entry(*columns), previous)

    def records(self, kind: str, name: str | None = None, *, newest_only: bool = False) -> list[Any]:
        """JSON bodies by rank, each checked."""
        order = "rank DESC LIMIT 1" if newest_only else "rank, name"
        rows = self.execute(
            "SELECT kind, name, rank, body, digest FROM records WHERE kind = ? AND (? IS NULL OR name = ?) "
            f"ORDER BY {order}",
            (kind, name, name),
        )
        return [json.loads(self._checked_record(*row)) for row in rows]

    def record_at(self, rowid: int) -> list[tuple[str, str, int, Any]]:
        """The record (kind, name, rank, JSON value) of a row, sought by no index; none if there is no such row."""
        rows = self.execute("SELECT kind, name, rank, body, digest FROM records WHERE rowid = ?", (rowid,)).fetchall()
        return [(*row[:3], json.loads(self._checked_record(*row))) for row in rows]

    def put_record(self, kind: str, name: str, rank: int, value: Any) -> None:
        body = to_json(value)
        self.execute(
            "INSERT OR REPLACE INTO records (kind, name, rank, body, digest) VALUES (?, ?, ?, ?, ?)",
            (kind, name, rank, body, fields_digest(kind, name, rank, body)),
        )

    def _checked_entry(self, entry: Entry, previous: bytes | None) -> Entry:
        if entry.seq == 1:
            previous = _ORIGIN
        if previous is None:
            self.corrupt(f"entry {entry.seq - 1} is missing")
        if entry.chained(previous) != entry.digest:
            self.corrupt(
                f"entry {entry.seq} ({entry.kind} at position {entry.start}) or the one before it does not have the "
                "hash that was written"
            )
        return entry

    def _checked_record(self, kind: str, name: str, rank: int, body: str, digest: bytes) -> str:
        if fields_digest(kind, name, rank, body) != digest:
            self.corrupt(f"the {kind} record {name!r} does not have the hash that was written")
        return body


def create(path: Path) -> None:
    """Make an empty journal. All of it appears at once: an empty or half file is damage, never a new session."""
    left = Path(f"{path}-wal")
    if left.exists():
        raise CorruptMemoryError(
            f"{path} is missing and its write-ahead log {left.name} is not. Restore the file, or delete the session."
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    with storage_errors(f"make the journal {path}"), sqlite_errors(path, "make the journal"):
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{path.name}.*{TEMPORARY_SUFFIX}*"):
            stale.unlink()
        temporary.touch(mode=0o600)
        connection = connect(temporary, wal=False)
        try:
            connection.executescript(_SCHEMA)
            head = Head()
            connection.execute(
                "INSERT INTO head VALUES (?, ?, ?, ?, ?, ?)",
                (head.seq, head.digest, head.position, head.turn, head.indexed_through, head.check),
            )
            connection.execute("COMMIT")
        finally:
            connection.close()
        os.replace(temporary, path)
        flush_folder(path.parent)


def to_json(value: Any) -> str:
    """Compact JSON. Raises ConfigError for what JSON cannot hold."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{value!r} cannot be kept as JSON: {error}. Give strings, numbers, lists and dicts."
        ) from error
