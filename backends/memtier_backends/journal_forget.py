"""Taking tokens out of a journal for good: the entries from the first that changes on are written anew.

Entries are chained, so whatever follows a changed entry gets another digest. What a rollback took back stands nowhere
and goes as well: a forgotten text must not be left in a row that nobody reads.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest

from memtier_backends.journal_rows import Entry, Head, JournalRows, to_json

__all__ = ["as_it_stands", "as_said", "cut_out"]

_TOKEN_BYTES = 4

Range = tuple[int, int]


def as_said(forgotten: Sequence[Range], first: int, last: int) -> list[Range]:
    """Offsets [first, last) into what is left of a turn, as offsets into the turn as it was said."""
    said = []
    skipped = 0
    for gone, gone_end in [*forgotten, (2**62, 2**62)]:
        # of the turn, [.., gone) stands before this gap
        low, high = first + skipped, min(last + skipped, gone)
        if low < high:
            said.append((low, high))
            first = high - skipped
        skipped += gone_end - gone
    return said


def as_it_stands(forgotten: Sequence[Range], first: int, last: int) -> list[Range]:
    """Offsets [first, last) into a turn as it was said, as offsets into what is left of it."""
    standing = []
    skipped = at = 0
    for gone, gone_end in [*forgotten, (2**62, 2**62)]:
        low, high = max(first, at), min(last, gone)
        if low < high:
            standing.append((low - skipped, high - skipped))
        skipped += gone_end - gone
        at = gone_end
    return standing


def cut_out(rows: JournalRows, start: int, end: int, scrub: Collection[int]) -> None:
    """Leave the tokens [start, end) out. Within the caller's transaction; see `Journal.forget`."""
    head = rows.head()
    # one step with entries that are damaged: each is checked as it is read
    old = list(rows.entries("1", ()))
    new = list(_without(old, start, end, scrub, head.turn))
    same = next(
        (n for n, (one, other) in enumerate(zip_longest(old, new)) if one is None or _plain(one) != _plain(other)),
        len(new),
    )
    rows.execute("DELETE FROM entries WHERE seq > ?", (same,))
    # rows in the order of their numbers, so `same` entries keep their digests
    kept = Head(turn=head.turn) if same == 0 else replace(Head(turn=head.turn), seq=same, digest=old[same - 1].digest)
    at = replace(kept, position=max((entry.end for entry in new[:same] if entry.kind == "tokens"), default=0))
    rows.put_head(at)
    for entry in new[same:]:
        if entry.kind == "tokens":
            at = replace(at, position=entry.end)
        at = rows.append(
            replace(at, turn=entry.turn), entry.kind, entry.start, entry.end, entry.body, mark=entry.mark,
            live=entry.live,
        )  # fmt: skip


def _without(old: Collection[Entry], start: int, end: int, scrub: Collection[int], newest_turn: int) -> Iterator[Entry]:
    """The entries that stay, in order, with new numbers and positions; digests are not theirs."""
    gone = end - start
    seq = position = 0

    def moved(at: int) -> int:
        return at if at <= start else max(start, at - gone)

    spans: dict[int, Range] = {}
    for entry in old:
        if entry.kind == "tokens" and entry.live:
            spans[entry.turn] = spans.get(entry.turn, (entry.start, 0))[0], entry.start + entry.live
    holding = {turn for turn, (first, last) in spans.items() if last - first > _overlap(first, last, start, end)}
    for entry in old:
        body, mark, live, first, last = entry.body, entry.mark, entry.live, position, position
        if entry.kind == "turn":
            if entry.turn not in holding and entry.turn != newest_turn:
                continue
            about = json.loads(body)
            if entry.turn in scrub or entry.turn not in holding:
                about |= {"source": None, "metadata": {}}
            if "retained_from" in about:
                about["retained_from"] = moved(about["retained_from"])
            if entry.turn in spans:
                about |= _gap([(low, high) for low, high in about.get("forgotten", [])], spans[entry.turn], start, end)
            body = to_json(about).encode()
        elif entry.kind == "tokens" and live:
            low = min(max(start - entry.start, 0), live)
            high = min(max(end - entry.start, 0), live)
            if low < high == live or live < entry.end - entry.start:
                mark = 0
            body = body[: low * _TOKEN_BYTES] + body[high * _TOKEN_BYTES : live * _TOKEN_BYTES]
            live -= high - low
            if not live:
                continue
            last = position = first + live
        elif entry.kind == "text" and live and not _overlap(entry.start, entry.end, start, end):
            first, last = moved(entry.start), moved(entry.end)
        else:
            continue
        seq += 1
        yield Entry(seq, entry.kind, entry.turn, first, last, mark, body, b"", live)
        if entry.kind == "tokens" and entry.turn in scrub and last == 1:
            # only the token that begins a text is left of it: it stands for no text, and that is known
            seq += 1
            yield Entry(seq, "text", entry.turn, first, last, 0, b"", b"", 1)


def _gap(forgotten: Sequence[Range], span: Range, start: int, end: int) -> dict[str, list[Range]]:
    """What is forgotten of a turn that stands at `span` once [start, end) is, if anything is."""
    first, last = max(start, span[0]) - span[0], min(end, span[1]) - span[0]
    if first >= last:
        return {}
    joined: list[Range] = []
    for low, high in sorted([*forgotten, *as_said(forgotten, first, last)]):
        if joined and low <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(high, joined[-1][1])
        else:
            joined.append((low, high))
    return {"forgotten": joined}


def _overlap(first: int, last: int, start: int, end: int) -> int:
    return max(0, min(last, end) - max(first, start))


def _plain(entry: Entry | None) -> Entry | None:
    """Without what follows from the entries before it."""
    return None if entry is None else replace(entry, digest=b"")
