"""The turns of a journal, put together from the entries that begin them, their tokens and their texts."""

from __future__ import annotations

import json
from typing import Any

from memtier_backends.journal_rows import Entry, JournalRows
from memtier_backends.records import TurnRecord

__all__ = ["read_turns"]


def read_turns(rows: JournalRows, row_start: int, start: int, end: int) -> list[TurnRecord]:
    """Turns that hold a token of [start, end), in order, each whole.

    Args:
        row_start: where the standing entry that holds the token `start` begins.
        start, end: a range of tokens that stand.
    """
    first, last = rows.execute(
        "SELECT MIN(turn), MAX(turn) FROM entries WHERE kind = 'tokens' AND live > 0 "
        "AND start >= ? AND start < ? AND start + live > ?",
        (row_start, end, start),
    ).fetchone()
    if first is None:
        rows.corrupt(f"the turns of tokens [{start}, {end}) are missing")
    spans = {
        turn: (turn_start, turn_end)
        for turn, turn_start, turn_end in rows.execute(
            "SELECT turn, MIN(start), MAX(start + live) FROM entries "
            "WHERE kind = 'tokens' AND live > 0 AND turn BETWEEN ? AND ? GROUP BY turn ORDER BY turn",
            (first, last),
        )
    }
    edges = [edge for span in spans.values() for edge in span]
    # each turn begins where the one before ends
    if edges[1:-1:2] != edges[2::2] or not edges[0] <= start or not end <= edges[-1]:
        rows.corrupt(f"its turns do not hold the tokens [{start}, {end}) one after the other")
    texts: dict[int, list[Entry]] = {}
    for entry in rows.entries("e.kind = 'text' AND e.live > 0 AND e.turn BETWEEN ? AND ?", (first, last)):
        texts.setdefault(entry.turn, []).append(entry)
    begun = {
        entry.turn: _begun(entry.body)
        for entry in rows.entries("e.kind = 'turn' AND e.turn BETWEEN ? AND ?", (first, last))
    }
    missing = spans.keys() - begun.keys()
    if missing:
        rows.corrupt(f"the entry that begins turn {min(missing)} is missing")
    return [
        TurnRecord(turn=turn, start=s, end=e, text=_joined(texts.get(turn, []), s, e), **begun[turn])
        for turn, (s, e) in spans.items()
    ]


def _begun(body: bytes) -> dict[str, Any]:
    about = json.loads(body)
    return {**about, "forgotten": tuple((first, last) for first, last in about.get("forgotten", ()))}


def _joined(texts: list[Entry], start: int, end: int) -> str | None:
    """The texts of a turn in order, if they cover [start, end) without a gap."""
    at = start
    for entry in texts:
        if entry.start != at:
            return None
        at = entry.end
    return b"".join(entry.body for entry in texts).decode("utf-8", "surrogatepass") if at == end else None
