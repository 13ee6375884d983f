"""Whether a journal's file is whole: that every row there is can be found, and that none is found that is not there.

A row that is read has its own hash checked. That does not help where SQLite's index leads past it: then another answer
is read, without an error. So before anything but the head is read of a file, its structure is checked: SQLite compares
its indexes with the rows, and what stands is computed again from all entries. Bodies of entries are not read for this:
they are checked when they are needed, and by `verify`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memtier_backends.journal_rows import JournalRows

__all__ = ["Standing", "check_structure", "standing", "verify"]


@dataclass(frozen=True, slots=True)
class Standing:
    """What follows from entries: tokens that stand, the turn of the last, and how many of each entry (1 for a text)."""

    position: int
    turn: int
    live: dict[int, int]


def standing(entries: Iterable[tuple[int, str, int, int, int]]) -> Standing:
    """What stands after entries, each (seq, kind, turn, start, end), in order."""
    position, newest = 0, -1
    tokens: list[list[int]] = []  # [seq, start, live]
    texts: list[tuple[int, int]] = []  # (seq, end)
    for seq, kind, turn, start, end in entries:
        newest = turn
        if kind == "tokens":
            tokens.append([seq, start, end - start])
            position = end
        elif kind == "text":
            texts.append((seq, end))
        elif kind == "rollback":
            while tokens and tokens[-1][1] >= start:
                tokens.pop()
            if tokens:
                tokens[-1][2] = min(tokens[-1][2], start - tokens[-1][1])
            while texts and texts[-1][1] > start:
                texts.pop()
            position = start
    return Standing(position, newest, {seq: live for seq, _, live in tokens} | {seq: 1 for seq, _ in texts})


def check_structure(rows: JournalRows) -> None:
    """Check the file's structure and which entries stand. Within a transaction.

    Raises:
        CorruptMemoryError: says what is damaged.
    """
    (found,) = rows.execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        rows.corrupt(f"SQLite's check says: {found}")
    head = rows.head()
    entries = rows.execute("SELECT seq, kind, turn, start, end, live FROM entries ORDER BY seq").fetchall()
    for number, (seq, kind, *numbers) in enumerate(entries, 1):
        if seq != number:
            rows.corrupt(f"entry {number} is missing")
        if not isinstance(kind, str) or not all(isinstance(value, int) for value in numbers):
            rows.corrupt(f"entry {seq} holds values of another type than was written")
    stands = standing(entry[:5] for entry in entries)
    if (len(entries), stands.position, stands.turn) != (head.seq, head.position, head.turn):
        rows.corrupt(
            f"its {len(entries)} entries end at position {stands.position} in turn {stands.turn}, and its head says "
            f"that there are {head.seq}, up to {head.position} in turn {head.turn}"
        )
    if {entry[0]: entry[5] for entry in entries if entry[5]} != stands.live:
        rows.corrupt("what it says of tokens taken back does not follow from its entries")


def verify(rows: JournalRows) -> None:
    """Check the structure and every row. Within a transaction.

    Raises:
        CorruptMemoryError: says what is damaged.
    """
    check_structure(rows)
    rows.check_records()
    for _ in rows.entries("1", ()):
        pass
