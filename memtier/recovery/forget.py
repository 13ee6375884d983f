"""Forgetting on disk: a span leaves the journal for good, and with it whatever was derived from it, in every copy.

An intent is journaled first; it names positions and never the text. Its work can be done again from any point, so a
forget that was cut off goes on when the session is opened next:

    1  the intent, in the session; then one in each fork that holds the span, and in each checkpoint
    2  each of these: tokens, texts, records of what was derived, and the rest of the intent, in one transaction
    3  the write-ahead log is truncated, files that no record names are deleted, the index is removed
    4  the intent is cleared

The session itself comes last in step 2: until then it knows what the span was, and can look for it in copies. What was
derived before the span stays: a key, a value or a landmark is a function of the tokens up to its own block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from memtier.errors import SessionBusyError
from memtier.folder import EDITION, META, Backends, SessionFolder
from memtier_backends.base import Journal
from memtier_backends.journal_forget import as_it_stands, as_said
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths
from memtier_backends.lock import SessionLock

__all__ = ["INTENT", "Held", "Part", "find_forks", "forget_in", "holders", "open_copy", "parts_of", "resume"]

INTENT = "forget"

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Part:
    """What a span holds of one turn, which is known again in a copy by its number and when it began.

    `ranges` are offsets into the turn as it was said, before any of it was forgotten.
    """

    turn: int
    created_at: float
    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """A session that holds some of a span."""

    session_id: str
    folder: Path
    ranges: list[Range]


def parts_of(journal: Journal, start: int, end: int) -> list[Part]:
    """The tokens [start, end), by turn."""
    parts = []
    for turn in journal.turns(start, end):
        first, last = max(start, turn.start) - turn.start, min(end, turn.end) - turn.start
        parts.append(Part(turn.turn, turn.created_at, tuple(as_said(turn.forgotten, first, last))))
    return parts


def holders(journal: Journal, parts: Sequence[Part]) -> list[Range]:
    """Where a copy's journal holds these parts: ranges in order, none touching another."""
    turns = {(turn.turn, turn.created_at): turn for turn in journal.turns()}
    found: list[Range] = []
    for part in parts:
        turn = turns.get((part.turn, part.created_at))
        if turn is not None:
            here = (span for said in part.ranges for span in as_it_stands(turn.forgotten, *said))
            found += [(turn.start + a, min(turn.start + b, turn.end)) for a, b in here if turn.start + a < turn.end]
    return _joined(found)


def find_forks(folder: SessionFolder, siblings: Sequence[Path], parts: Sequence[Part]) -> list[Held]:
    """Sessions of the same lineage that hold some of these parts.

    Args:
        folder: the session.
        siblings: folders of its tenant's sessions.
        parts: see `parts_of`.
    """
    lineage = folder.journal.get_meta(META)["lineage"]
    held: list[Held] = []
    for path in siblings:
        paths = SessionPaths(path)
        if path == folder.paths.folder or not paths.journal.exists():
            continue
        journal = SqliteJournal.open(paths.journal, read_only=True)
        try:
            meta = journal.get_meta(META)
            if meta is not None and meta["lineage"] == lineage:
                ranges = holders(journal, parts)
                copies = [ranges, *(_ranges_in(kept, parts) for kept in paths.checkpoint_folders())]
                if any(copies):
                    held.append(Held(meta["id"], path, ranges))
        finally:
            journal.close()
    return held


def open_copy(path: Path, backends: Backends) -> SessionFolder:
    """A session's files with its lock, without asking which model wrote them. Raises SessionBusyError."""
    lock = SessionLock.acquire(path)
    try:
        paths = SessionPaths(path)
        return SessionFolder(paths, lock, backends.journal(paths.journal), backends)
    except BaseException:
        lock.release()
        raise


def forget_in(
    session: SessionFolder, forks: Sequence[SessionFolder], start: int, end: int, *, keep_first: bool,
    told: Sequence[str] = (),
) -> list[str]:  # fmt: skip
    """Forget the tokens [start, end) of a session, in its checkpoints, and in these forks and theirs.

    Args:
        session: nothing else uses it or the forks.
        keep_first: position 0 holds a token that is no text.
        told: ids of the forks, for the intent.

    Returns:
        Names of the checkpoints that held some of it, the session's and the forks'.
    """
    parts = parts_of(session.journal, start, end)
    _intend(session.journal, [(start, end)], keep_first, forks=told)
    names: list[str] = []
    for fork in forks:
        if ranges := holders(fork.journal, parts):
            _intend(fork.journal, ranges, keep_first)
    for fork in forks:
        names += _forget_in_checkpoints(fork, parts, keep_first)
        _finish(fork)
    names += _forget_in_checkpoints(session, parts, keep_first)
    _finish(session)
    return names


def resume(session: SessionFolder, siblings: Sequence[Path]) -> bool:
    """Go on with a forget that was cut off. Returns whether there was one.

    Raises:
        SessionBusyError: a fork that holds the span is open elsewhere.
    """
    intent = session.journal.get_meta(INTENT)
    if intent is None:
        return False
    if not intent["ranges"]:
        _finish(session)
        return True
    parts = [part for start, end in intent["ranges"] for part in parts_of(session.journal, start, end)]
    held = find_forks(session, siblings, parts) if intent["forks"] else []
    for one in (one for one in held if one.session_id in intent["forks"]):
        try:
            fork = open_copy(one.folder, session.backends)
        except SessionBusyError as error:
            raise SessionBusyError(
                f"a forget that was cut off is not finished: session {one.session_id!r}, a fork, holds some of it and "
                f"is open elsewhere. Close it there and open this session again."
            ) from error
        try:
            if one.ranges:
                _intend(fork.journal, one.ranges, intent["keep_first"])
            _forget_in_checkpoints(fork, parts, intent["keep_first"])
            _finish(fork)
        finally:
            fork.close()
    _forget_in_checkpoints(session, parts, intent["keep_first"])
    _finish(session)
    return True


def _forget_in_checkpoints(session: SessionFolder, parts: Sequence[Part], keep_first: bool) -> list[str]:
    names = []
    for paths in session.paths.checkpoint_folders():
        journal = session.backends.journal(paths.journal)
        try:
            if ranges := holders(journal, parts):
                _intend(journal, ranges, keep_first)
            if journal.get_meta(INTENT) is not None:
                kept = SessionFolder(paths, None, journal, session.backends)
                _finish(kept)
                names.append(journal.get_meta("checkpoint")["name"])
        finally:
            journal.close()
    return names


def _ranges_in(kept: SessionPaths, parts: Sequence[Part]) -> list[Range]:
    journal = SqliteJournal.open(kept.journal, read_only=True)
    try:
        return holders(journal, parts)
    finally:
        journal.close()


def _intend(journal: Journal, ranges: Sequence[Range], keep_first: bool, forks: Sequence[str] = ()) -> None:
    intent = {"ranges": [list(span) for span in ranges], "keep_first": keep_first, "forks": list(forks)}
    journal.set_meta(INTENT, intent)


def _finish(session: SessionFolder) -> None:
    """What a session's intent says, from wherever it stands."""
    journal = session.journal
    intent = journal.get_meta(INTENT)
    if intent is None:
        return
    ranges = [(start, end) for start, end in intent["ranges"]]
    if ranges:
        derived_to = _derived_to(journal, ranges[0][0])
        scrub = _covered(journal, ranges, bool(intent["keep_first"]))
        while ranges:
            # the last first: those before it keep their positions
            start, end = ranges.pop()
            left: dict[str, Any] = {**intent, "ranges": [list(span) for span in ranges]}
            meta = {INTENT: left, EDITION: uuid4().hex}
            journal.forget(start, end, scrub=scrub, derived_to=derived_to, meta=meta)
    journal.checkpoint()
    session.clean()
    session.drop_index()
    journal.set_meta(INTENT, None)
    journal.checkpoint()


def _derived_to(journal: Journal, start: int) -> int:
    """The newest snapshot that never saw the span and whose blocks stay; 0 if there is none."""
    first = journal.first_block
    blocks = max((manifest.end_block for manifest in journal.segments() if manifest.end <= start), default=first)
    usable = [
        s.position for s in journal.snapshots() if s.position <= start and s.first_block >= first and s.blocks <= blocks
    ]
    return max(usable, default=0)


def _covered(journal: Journal, ranges: Sequence[Range], keep_first: bool) -> list[int]:
    """Turns of which nothing that was said is left."""
    covered = []
    for start, end in ranges:
        for turn in journal.turns(start, end):
            first = max(turn.start, 1) if keep_first else turn.start
            if sum(max(0, min(b, turn.end) - max(a, first)) for a, b in ranges) == turn.end - first:
                covered.append(turn.turn)
    return covered


def _joined(ranges: Sequence[Range]) -> list[Range]:
    joined: list[Range] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
