"""Who holds some of what is to be forgotten: the session's checkpoints, its forks, and theirs. They are only read.

A copy that was given to a model with another tokenizer has other tokens: of it the whole turn counts, as nobody can say
which of them stand for the span.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from memtier.errors import CorruptMemoryError, IncompatibleMemoryError, SessionNotFoundError
from memtier.folder import META, SessionFolder
from memtier_backends.base import Journal
from memtier_backends.journal_forget import as_it_stands, as_said
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths

__all__ = [
    "INTENT",
    "Held",
    "Holders",
    "Said",
    "checkpoint_errors",
    "checkpoint_name",
    "holders_of",
    "joined",
    "ranges_in",
    "said_in",
]

log = logging.getLogger("memtier")

INTENT = "forget"
"""Where a journal's meta says what is to be forgotten and is not yet."""

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
class Said:
    """What is to be forgotten, by the turns it was said in, in tokens of `tokenizer` (a fingerprint)."""

    tokenizer: Any
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """A fork that holds some of it, in its journal (`ranges`) or in checkpoints (their names).

    `cut_off`: a forget of its own has not been finished.
    """

    session_id: str
    folder: Path
    ranges: list[Range]
    checkpoints: list[str]
    cut_off: bool = False


@dataclass(frozen=True, slots=True)
class Holders:
    """Who holds some of it: forks, and checkpoints of the session itself. `unreadable` sessions may be forks."""

    forks: list[Held] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)


def said_in(journal: Journal, ranges: Sequence[Range]) -> Said:
    """These ranges of tokens, by turn."""
    parts = []
    for start, end in ranges:
        for turn in journal.turns(start, end):
            first, last = max(start, turn.start) - turn.start, min(end, turn.end) - turn.start
            parts.append(Part(turn.turn, turn.created_at, tuple(as_said(turn.forgotten, first, last))))
    return Said(_tokenizer(journal), tuple(parts))


def ranges_in(journal: Journal, said: Said) -> list[Range]:
    """Where a copy's journal holds it: ranges in order, none touching another."""
    turns = {(turn.turn, turn.created_at): turn for turn in journal.turns()}
    same_tokens = _tokenizer(journal) == said.tokenizer
    found: list[Range] = []
    for part in said.parts:
        turn = turns.get((part.turn, part.created_at))
        if turn is None or not part.ranges:
            continue
        if not same_tokens:
            found.append((turn.start, turn.end))
            continue
        here = (span for offsets in part.ranges for span in as_it_stands(turn.forgotten, *offsets))
        found += [(turn.start + a, min(turn.start + b, turn.end)) for a, b in here if turn.start + a < turn.end]
    return joined(span for span in found if span[0] < span[1])


def holders_of(session: SessionFolder, siblings: Sequence[Path], said: Said) -> Holders:
    """Who holds it beside the session: only read.

    Args:
        siblings: folders of its tenant's sessions.

    Raises:
        CorruptMemoryError: a checkpoint of the session or of a fork is damaged.
    """
    found = Holders(checkpoints=_checkpoints_with(session.paths, said))
    lineage = session.journal.get_meta(META)["lineage"]
    for path in siblings:
        paths = SessionPaths(path)
        if path == session.paths.folder or not paths.journal.exists():
            continue
        try:
            held = _held_in(paths, lineage, said)
        except SessionNotFoundError:
            continue  # deleted meanwhile
        except (CorruptMemoryError, IncompatibleMemoryError) as error:
            log.warning("%s cannot be read, and may be a fork of what is forgotten: %s", path, error)
            found.unreadable.append(path)
            continue
        if held is not None:
            names = _checkpoints_with(paths, said)
            if held.ranges or names or held.cut_off:
                found.forks.append(replace(held, checkpoints=names))
    return found


def checkpoint_name(journal: Journal, paths: SessionPaths) -> str:
    """The name of the checkpoint whose journal this is."""
    return (journal.get_meta("checkpoint") or {"name": paths.folder.name})["name"]


@contextmanager
def checkpoint_errors(paths: SessionPaths) -> Iterator[None]:
    """Tell that a checkpoint cannot be read, and what to do about it."""
    try:
        yield
    except (CorruptMemoryError, SessionNotFoundError) as error:
        raise CorruptMemoryError(
            f"the checkpoint in {paths.folder} cannot be read, and may hold what is to be forgotten: {error} Drop it "
            f"with session.drop_checkpoint, or close the session and run: memtier doctor --rebuild; then call again."
        ) from error


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same tokens, in order, none touching another."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _held_in(paths: SessionPaths, lineage: str, said: Said) -> Held | None:
    """What a session's own journal holds, if it is of that lineage."""
    journal = SqliteJournal.open(paths.journal, read_only=True)
    try:
        meta = journal.get_meta(META)
        if meta is None or meta["lineage"] != lineage:
            return None
        cut_off = journal.get_meta(INTENT) is not None
        return Held(meta["id"], paths.folder, ranges_in(journal, said), [], cut_off)
    finally:
        journal.close()


def _checkpoints_with(paths: SessionPaths, said: Said) -> list[str]:
    """Names of the checkpoints that hold some of it."""
    names = []
    for kept in paths.checkpoint_folders():
        with checkpoint_errors(kept):
            journal = SqliteJournal.open(kept.journal, read_only=True)
            try:
                if ranges_in(journal, said):
                    names.append(checkpoint_name(journal, kept))
            finally:
                journal.close()
    return names


def _tokenizer(journal: Journal) -> Any:
    return journal.get_meta(META)["model"]["tokenizer"]
