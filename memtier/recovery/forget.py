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

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from memtier.errors import SessionBusyError, SessionNotFoundError
from memtier.folder import EDITION, META, Backends, SessionFolder
from memtier.recovery.holders import (
    INTENT,
    Held,
    Range,
    Said,
    checkpoint_errors,
    holders_of,
    joined,
    ranges_in,
    said_in,
)
from memtier_backends.base import Journal
from memtier_backends.layout import SessionPaths
from memtier_backends.lock import SessionLock

__all__ = ["INTENT", "begin", "go_on", "open_copy", "resume"]

log = logging.getLogger("memtier")


def open_copy(path: Path, backends: Backends) -> SessionFolder:
    """A session's files with its lock, without asking which model wrote them.

    Raises:
        SessionBusyError: someone has it open.
        SessionNotFoundError: there is none.
    """
    paths = SessionPaths(path)
    if not paths.journal.exists():
        raise SessionNotFoundError(f"there is no session in {path}; it was deleted.")
    lock = SessionLock.acquire(path)
    try:
        return SessionFolder(paths, lock, backends.journal(paths.journal), backends)
    except BaseException:
        lock.release()
        raise


def begin(session: SessionFolder, start: int, end: int, *, keep_first: bool, wide: bool) -> None:
    """Write down that the tokens [start, end) are to be forgotten. From then on it can only be finished.

    Args:
        keep_first: position 0 holds a token that is no text.
        wide: forks forget it too, also those that a later open finds.
    """
    _intend(session.journal, [(start, end)], keep_first, wide=wide)


def go_on(session: SessionFolder, forks: Sequence[SessionFolder]) -> None:
    """Forget what was written down in a session, in its checkpoints, and in these forks and theirs, from wherever each
    of them stands. Nothing else uses any of them. A session with nothing to forget is left as it is.
    """
    intent = session.journal.get_meta(INTENT)
    if intent is None:
        return
    said, keep_first = said_in(session.journal, _ranges(session.journal)), bool(intent["keep_first"])
    for fork in forks:
        # all of them first: a fork that is opened before this session goes on, too
        if ranges := ranges_in(fork.journal, said):
            _intend(fork.journal, ranges, keep_first)
    for fork in forks:
        _forget_in_checkpoints(fork, said, keep_first)
        pending = fork.journal.get_meta(INTENT)
        if pending is not None and pending["forks"]:
            # a forget of its own that was cut off; the span is part of it now
            log.warning("session %r has a forget that was cut off: open it, and that goes on", _id(fork))
        else:
            _finish(fork)
            fork.clean()
    _forget_in_checkpoints(session, said, keep_first)
    _finish(session)


def resume(session: SessionFolder, siblings: Sequence[Path]) -> bool:
    """Go on with a forget that was cut off. Returns whether there was one.

    Raises:
        SessionBusyError: a fork that holds the span is open elsewhere.
        CorruptMemoryError: a checkpoint is damaged.
    """
    intent = session.journal.get_meta(INTENT)
    if intent is None:
        return False
    forks: list[SessionFolder] = []
    try:
        if intent["forks"]:
            said = said_in(session.journal, _ranges(session.journal))
            for one in holders_of(session, siblings, said).forks:
                forks += _opened(one, session.backends)
        go_on(session, forks)
    finally:
        for fork in forks:
            fork.close()
    return True


def _opened(one: Held, backends: Backends) -> list[SessionFolder]:
    try:
        return [open_copy(one.folder, backends)]
    except SessionNotFoundError:
        return []  # deleted meanwhile
    except SessionBusyError as error:
        raise SessionBusyError(
            f"a forget that was cut off is not finished: session {one.session_id!r}, a fork, holds some of it and is "
            f"open elsewhere. Close it there and open this session again."
        ) from error


def _forget_in_checkpoints(session: SessionFolder, said: Said, keep_first: bool) -> None:
    for paths in session.paths.checkpoint_folders():
        with checkpoint_errors(paths):
            journal = session.backends.journal(paths.journal)
            try:
                kept = SessionFolder(paths, None, journal, session.backends)
                _finish(kept)
                if ranges := ranges_in(journal, said):
                    _intend(journal, ranges, keep_first)
                    _finish(kept)
            finally:
                journal.close()


def _intend(journal: Journal, ranges: Sequence[Range], keep_first: bool, *, wide: bool = False) -> None:
    """Write down what is to be forgotten, beside what was written down before and is not done."""
    before = journal.get_meta(INTENT)
    if before is not None:
        ranges = joined([*_ranges(journal), *ranges])
        wide = wide or bool(before["forks"])
    journal.set_meta(INTENT, {"ranges": [list(span) for span in ranges], "keep_first": keep_first, "forks": wide})


def _ranges(journal: Journal) -> list[Range]:
    """What an intent has left to do; of a journal that was cut short since, what there is."""
    position = journal.position
    clipped = ((start, min(end, position)) for start, end in journal.get_meta(INTENT)["ranges"])
    return [(start, end) for start, end in clipped if start < end]


def _finish(session: SessionFolder) -> None:
    """What a journal's own intent says, from wherever it stands."""
    journal = session.journal
    intent = journal.get_meta(INTENT)
    if intent is None:
        return
    ranges = _ranges(journal)
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


def _id(session: SessionFolder) -> str:
    return session.journal.get_meta(META)["id"]
