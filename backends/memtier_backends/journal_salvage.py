"""What can be kept of a damaged journal: its entries up to the first that is not what was written, as a new journal."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from memtier.errors import CorruptMemoryError
from memtier_backends.journal_check import standing
from memtier_backends.journal_rows import Entry, Head, JournalRows, create
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.records import SegmentManifest
from memtier_backends.sqlite_file import connect, sqlite_errors
from memtier_backends.wal_check import check_log

__all__ = ["salvage"]


def salvage(path: Path, target: Path) -> tuple[int, int | None]:
    """Write what stands before the damage to a new journal; the damaged one is only read.

    Returns:
        tokens that were kept, and how many the journal says that it held beyond them; None if it does not say.

    Raises:
        CorruptMemoryError: nothing can be kept, or what says whose memory it is is damaged.
    """
    with sqlite_errors(path, "read the damaged journal"), closing(connect(path, read_only=True)) as connection:
        rows = JournalRows(path, connection)
        entries = list(_readable(rows))
        records = _readable_records(rows)
        try:
            # a damaged log may have held more than SQLite reads of it
            check_log(path)
            said = rows.head().position
        except (CorruptMemoryError, sqlite3.Error):
            said = None
    if not any(kind == "meta" and name == "session" for kind, name, _, _ in records):
        raise CorruptMemoryError(f"{path} no longer says which session it is, nor which model wrote it.")
    # it is in no digest, and follows from the entries
    live = standing((entry.seq, entry.kind, entry.turn, entry.start, entry.end) for entry in entries).live
    create(target)
    journal = SqliteJournal.open(target)
    try:
        position = _fill(journal, entries, live, records)
        journal.verify()
    finally:
        journal.close()
    return position, None if said is None else max(0, said - position)


def _readable(rows: JournalRows) -> Iterator[Entry]:
    """Entries in order, until one is missing or damaged."""
    seq = 0
    try:
        for entry in rows.entries("1", ()):
            seq += 1
            if entry.seq != seq:
                return
            yield entry
    except (CorruptMemoryError, sqlite3.Error, UnicodeDecodeError):
        return


def _readable_records(rows: JournalRows) -> list[tuple[str, str, int, Any]]:
    """Records that have their hash, each kind by rank."""
    found = []
    for rowid in _rowids(rows):
        try:
            found += rows.record_at(rowid)
        except (CorruptMemoryError, sqlite3.Error, UnicodeDecodeError, ValueError):
            continue
    return sorted(found, key=lambda record: (record[0], record[2], record[1]))


def _rowids(rows: JournalRows) -> list[int]:
    """Of the records that the table or its index leads to: one of them may be damaged."""
    found: set[int] = set()
    for source in ("NOT INDEXED", "INDEXED BY sqlite_autoindex_records_1 WHERE kind > ''"):
        try:
            for (rowid,) in rows.execute(f"SELECT rowid FROM records {source}"):
                found.add(rowid)
        except sqlite3.Error:
            continue
    return sorted(found)


def _fill(
    journal: SqliteJournal, entries: list[Entry], live: dict[int, int], records: list[tuple[str, str, int, Any]]
) -> int:
    rows = journal._rows
    head = Head()
    with journal._file.transaction("keep what can be kept"):
        for entry in entries:
            if entry.kind in ("tokens", "rollback"):
                head = replace(head, position=entry.end)
            head = rows.append(
                replace(head, turn=entry.turn), entry.kind, entry.start, entry.end, entry.body, mark=entry.mark,
                live=live.get(entry.seq, 0),
            )  # fmt: skip
        next_block = 0
        for kind, name, rank, value in records:
            if kind == "segment":
                manifest = SegmentManifest.from_json(value)
                if manifest.first_block != next_block or manifest.end > head.position:
                    continue
                next_block = manifest.end_block
            elif kind == "snapshot" and value["position"] > head.position:
                continue
            rows.put_record(kind, name, rank, value)
    return head.position
