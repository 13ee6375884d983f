"""The journal of a session in one SQLite file.

What its rows are, how they are chained and checked: journal_rows.py; the file and its transactions: journal_file.py.
Here is what a session does with them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memtier.errors import ConfigError, SessionNotFoundError
from memtier_backends.files import storage_errors
from memtier_backends.journal_check import check_structure, verify
from memtier_backends.journal_derived import DerivedRecords
from memtier_backends.journal_file import JournalFile
from memtier_backends.journal_forget import cut_out
from memtier_backends.journal_rows import Entry, JournalRows, create, to_json
from memtier_backends.journal_turns import read_turns
from memtier_backends.layout import check_never_begun
from memtier_backends.records import SegmentManifest, SnapshotRecord, TurnRecord
from memtier_backends.sqlite_file import connect, sqlite_errors
from memtier_backends.wal_check import check_log

__all__ = ["SqliteJournal"]


class SqliteJournal:
    """Journal in one SQLite file: write-ahead log, every commit flushed, deleted bytes overwritten."""

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False, scratch: bool = False) -> SqliteJournal:
        """Open a session's journal; one that is not there is made, unless `read_only`.

        `scratch`: nothing is flushed. For one that is filled and then copied (`copy_to`), which flushes.

        Raises:
            SessionNotFoundError: `read_only`, and there is none.
            IncompatibleMemoryError: made by a newer format.
            CorruptMemoryError: not a journal, one that is missing from a session's folder, or damaged in its structure.
                Of a `read_only` one the head alone is looked at, and its structure once more than that is read.
        """
        if not path.exists():
            if read_only:
                raise SessionNotFoundError(
                    f"there is no journal at {path}. Check the store, the tenant and the session."
                )
            check_never_begun(path.parent)
            create(path)
        check_log(path)
        with storage_errors(f"open the journal {path}"), sqlite_errors(path, "open the journal"):
            connection = connect(path, read_only=read_only)
            if scratch:
                connection.execute("PRAGMA synchronous=OFF")
        journal = cls(path, connection, read_only)
        try:
            with journal._file.reading("open the journal"):
                journal._piece_start = journal._rows.check_opened().position
            if not read_only:
                with journal._content("open the journal"):
                    # what is the newest of them follows from numbers in all of them
                    journal._rows.check_records()
        except BaseException:
            connection.close()
            raise
        return journal

    def __init__(self, path: Path, connection: sqlite3.Connection, read_only: bool) -> None:
        """Use `open`."""
        self.path = path
        self._rows = JournalRows(path, connection)
        self._derived = DerivedRecords(self._rows, alone=not read_only)
        self._file = JournalFile(path, connection, read_only=read_only, undone=self._derived.forget_what_was_read)
        # A text given later stands for the tokens from here on. Where the piece of a turn begun before this open began
        # is not known: the text of such a turn is told as unknown, never guessed.
        self._piece_start = 0
        self._whole = False

    # Tokens and turns

    @property
    def position(self) -> int:
        with self._file.reading("read the position"):
            return self._rows.head().position

    def begin_turn(
        self,
        *,
        role: str,
        source: str | None,
        metadata: Mapping[str, Any] | None,
        created_at: float,
        retrieval: str,
        span_blocks: int,
        retained_from: int = 0,
        turn: int | None = None,
        forgotten: Sequence[tuple[int, int]] = (),
    ) -> int:
        about = {
            "role": role,
            "source": source,
            "metadata": dict(metadata or {}),
            "created_at": created_at,
            "retrieval": retrieval,
            "span_blocks": span_blocks,
        }
        if retained_from:
            about["retained_from"] = int(retained_from)
        if forgotten:
            about["forgotten"] = _ranges(forgotten)
        body = to_json(about)
        with self._file.transaction("begin a turn"):
            head = self._rows.head()
            number = head.turn + 1 if turn is None else int(turn)
            if number <= head.turn:
                raise ConfigError(f"turn is {number}; the newest is {head.turn}, and a new one has a higher number.")
            head = replace(head, turn=number)
            self._rows.append(head, "turn", head.position, head.position, body.encode())
        self._piece_start = head.position
        return head.turn

    def commit(
        self, turn: int, tokens: NDArray[np.integer] | Sequence[int], *, text: str | None = None, mark: bool = False
    ) -> int:
        ids = _token_ids(tokens)
        if mark and not len(ids):
            raise ConfigError("mark is set and there are no tokens; a mark stands at the last token of its commit.")
        with self._file.transaction("commit tokens"):
            head = self._rows.head()
            if turn != head.turn:
                raise ConfigError(f"turn is {turn}; tokens go to the newest turn, {head.turn}. Begin a turn first.")
            start, end = head.position, head.position + len(ids)
            if len(ids):
                head = replace(head, position=end)
                head = self._rows.append(head, "tokens", start, end, ids.tobytes(), mark=int(mark), live=len(ids))
            if text and end == self._piece_start:
                raise ConfigError("text is given and its piece has no tokens; commit it with the piece's tokens.")
            if text is not None and end > self._piece_start:
                self._rows.append(head, "text", self._piece_start, end, text.encode("utf-8", "surrogatepass"), live=1)
        if text is not None:
            self._piece_start = end
        return end

    def rollback(self, position: int, reason: str) -> None:
        position = int(position)
        with self._file.transaction("roll back"):
            head = self._rows.head()
            if not 0 <= position <= head.position:
                raise ConfigError(f"position is {position}; a rollback goes to a position in [0, {head.position}].")
            self._rows.append(
                replace(head, position=position),
                "rollback",
                position,
                position,
                reason.encode("utf-8", "surrogatepass"),
            )
            self._rows.execute(
                "UPDATE entries SET live = MAX(0, ? - start) "
                "WHERE kind = 'tokens' AND live > 0 AND start >= ? AND start + live > ?",
                (position, self._row_start(position), position),
            )
            self._rows.execute("UPDATE entries SET live = 0 WHERE kind = 'text' AND live > 0 AND end > ?", (position,))
            self._derived.drop_after(position)
        self._piece_start = position

    def newest_commit(self) -> tuple[int, int] | None:
        with self._content("read the newest commit"):
            newest = "e.seq = (SELECT MAX(seq) FROM entries WHERE kind <> 'text')"
            return next(((e.start, e.end) for e in self._rows.entries(newest, ()) if e.kind == "tokens"), None)

    def tokens(self, start: int, end: int) -> NDArray[np.int32]:
        start, end = int(start), int(end)
        with self._content("read tokens"):
            position = self._rows.head().position
            if not 0 <= start <= end <= position:
                raise ConfigError(f"tokens [{start}, {end}) were asked for; the session holds [0, {position}).")
            ids = np.empty(end - start, dtype=np.int32)
            at = start
            for entry in self._live_tokens(start, end):
                follows = entry.start <= at if at == start else entry.start == at
                if not follows or not at < entry.start + entry.live:
                    self._rows.corrupt(f"tokens from {at} on are missing, or are there twice")
                row = np.frombuffer(entry.body, dtype="<i4")[at - entry.start : min(entry.live, end - entry.start)]
                ids[at - start : at - start + len(row)] = row
                at += len(row)
            if at != end:
                self._rows.corrupt(f"tokens [{at}, {end}) are missing")
            return ids

    def turns(self, start: int = 0, end: int | None = None) -> list[TurnRecord]:
        with self._content("read turns"):
            position = self._rows.head().position
            start, end = max(int(start), 0), position if end is None else min(int(end), position)
            return read_turns(self._rows, self._row_start(start), start, end) if start < end else []

    def marks(self, start: int, end: int) -> list[int]:
        with self._content("read marks"):
            found = self._rows.execute(
                "SELECT end - 1 FROM entries WHERE mark = 1 AND end > ? AND end <= ? AND live = end - start "
                "ORDER BY end",
                (int(start), int(end)),
            )
            return [mark for (mark,) in found]

    # What is derived from the tokens

    def get_meta(self, key: str) -> Any:
        with self._content(f"read meta {key!r}"):
            found = self._rows.records("meta", key)
            return found[0] if found else None

    def set_meta(self, key: str, value: Any) -> None:
        with self._file.transaction(f"set meta {key!r}"):
            self._rows.put_record("meta", key, 0, value)

    @property
    def first_block(self) -> int:
        with self._content("read where segments begin"):
            return self._derived.first_block

    def begin_with(self, block: int) -> None:
        with self._file.transaction("say where segments begin"):
            self._derived.begin_with(block)

    def add_segment(self, manifest: SegmentManifest) -> None:
        with self._file.transaction(f"add segment {manifest.name}"):
            self._derived.add_segment(manifest)

    def merge_segments(self, manifest: SegmentManifest) -> list[str]:
        with self._file.transaction(f"merge segments into {manifest.name}"):
            return self._derived.merge_segments(manifest)

    def segments(self) -> list[SegmentManifest]:
        with self._content("read segments"):
            return self._derived.segments()

    def drop_before(self, block: int) -> list[str]:
        with self._file.transaction("drop old segments"):
            return self._derived.drop_before(int(block))

    @property
    def indexed_through(self) -> int:
        with self._file.reading("read the index mark"):
            return self._rows.head().indexed_through

    @property
    def index_seal(self) -> str:
        with self._content("read the hash of the index"):
            return self._derived.index_seal

    def set_indexed_through(self, blocks: int, *, seal: str) -> None:
        with self._file.transaction("set the index mark"):
            self._derived.set_indexed_through(blocks, seal)

    def add_snapshot(self, record: SnapshotRecord) -> None:
        with self._file.transaction(f"add snapshot {record.name}"):
            self._derived.add_snapshot(record)

    def snapshots(self) -> list[SnapshotRecord]:
        with self._content("read snapshots"):
            return self._derived.snapshots()

    def drop_snapshot(self, name: str) -> None:
        with self._file.transaction(f"drop snapshot {name}"):
            self._derived.drop_snapshot(name)

    def drop_after(self, position: int) -> None:
        with self._file.transaction("drop what is derived"):
            self._derived.drop_after(int(position))

    def forget(
        self, start: int, end: int, *, scrub: Collection[int] = (), derived_to: int, meta: Mapping[str, Any]
    ) -> None:
        start, end, derived_to = int(start), int(end), int(derived_to)
        with self._file.transaction("forget"):
            position = self._rows.head().position
            if not 0 <= derived_to <= start < end <= position:
                raise ConfigError(
                    f"tokens [{start}, {end}) are to be forgotten, keeping what is derived up to {derived_to}; the "
                    f"session holds [0, {position}), and nothing past the first of them can be kept."
                )
            cut_out(self._rows, start, end, scrub)
            self._derived.drop_after(derived_to)
            self._rows.put_head(replace(self._rows.head(), indexed_through=0))
            for key, value in meta.items():
                self._rows.put_record("meta", key, 0, value)
        self._piece_start = self.position

    def drop_rolled_back(self) -> None:
        with self._file.transaction("drop what was taken back"):
            if self._rows.execute("SELECT 1 FROM entries WHERE kind = 'rollback' LIMIT 1").fetchone() is None:
                return
            head = self._rows.head()
            cut_out(self._rows, head.position, head.position, ())
            self._rows.put_head(replace(self._rows.head(), indexed_through=head.indexed_through))

    # The file

    def copy_to(self, path: Path) -> None:
        self._file.copy_to(path)

    def replace_with(self, path: Path) -> None:
        other = SqliteJournal.open(path, read_only=True)
        try:
            other.verify()
            self._file.replace_with(other._rows.connection)
        finally:
            other.close()
        with self._file.reading("read what was restored"):
            self._piece_start = self._rows.check_opened().position

    @property
    def bytes_on_disk(self) -> int:
        return self._file.bytes_on_disk

    def verify(self) -> None:
        with self._file.reading("verify the journal"):
            verify(self._rows)
        self.segments()

    def checkpoint(self) -> None:
        self._file.checkpoint()

    def close(self) -> None:
        self._file.close()

    # Private

    @contextmanager
    def _content(self, action: str) -> Iterator[None]:
        """To read more than the head, which needs a file whose structure is whole."""
        with self._file.reading(action):
            if not self._whole:
                check_structure(self._rows)
                self._whole = True
            yield

    def _live_tokens(self, start: int, end: int) -> Iterator[Entry]:
        """Standing token entries that overlap [start, end). Of those, seq and start have the same order."""
        return self._rows.entries(
            "e.kind = 'tokens' AND e.live > 0 AND e.start >= ? AND e.start < ? AND e.start + e.live > ?",
            (self._row_start(start), end, start),
        )

    def _row_start(self, position: int) -> int:
        """Where the standing token entry that holds `position` begins, so that a range need not be sought from 0."""
        (start,) = self._rows.execute(
            "SELECT MAX(start) FROM entries WHERE kind = 'tokens' AND live > 0 AND start <= ?", (position,)
        ).fetchone()
        return start or 0


def _ranges(forgotten: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """As an entry keeps them: in order, with something that was not forgotten between two of them."""
    ranges = [(int(first), int(last)) for first, last in forgotten]
    edges = [-1, *(edge for pair in ranges for edge in pair)]
    if any(edge >= after for edge, after in pairwise(edges)):
        raise ConfigError(f"forgotten is {ranges}; it must be ranges [first, last) in order that do not touch.")
    return ranges


def _token_ids(tokens: NDArray[np.integer] | Sequence[int]) -> NDArray[np.int32]:
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ConfigError(f"tokens have shape {ids.shape} and dtype {ids.dtype}; they must be (n,) integers.")
    if ids.size and (ids.min() < 0 or ids.max() >= 2**31):
        raise ConfigError(f"tokens range from {ids.min()} to {ids.max()}; ids must be in [0, 2**31).")
    return ids.astype("<i4")
