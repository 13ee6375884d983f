"""Proof that a span is gone: its bytes are looked for in the raw files, before it is forgotten and after.

A scan that finds nothing proves nothing unless it would have found something. So the same scan runs before: in each
copy (the session, its forks, all their checkpoints) and for each class of file that holds something of the span there
(journal, segments, snapshots, index) it must find the bytes, or the proof is refused. Afterwards every file is scanned
for all of them, and each store is asked through its own reader.

Bytes that also belong to what stays prove nothing: a sentence that was said twice, a key that depends on its own token
alone. Texts and ids of that kind are left out beforehand. Of numbers it shows afterwards, for what was derived anew
from what stays never saw the span: what stands there tells nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from memtier.recovery.evidence import Copy, Evidence
from memtier.recovery.reports import ErasureProof
from memtier.recovery.windows import aligned
from memtier_backends.files import storage_errors
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths
from memtier_backends.segment_store import FileSegmentStore

__all__ = ["control", "prove", "unfinished"]

DERIVED = ("segments", "snapshots")


@storage_errors("read all files, to find what is to be forgotten")
def control(evidence: Evidence) -> None:
    """The scan before: what it finds of each kind in the files of its class, in each copy.

    Raises:
        StorageError: a file cannot be read.
    """
    for copy in evidence.copies:
        for name, kinds in copy.windows.items():
            found = _found({window for windows in kinds.values() for window in windows}, _files(copy.paths, name))
            copy.found[name] = {kind: set(windows) & found.keys() for kind, windows in kinds.items() if windows}


@storage_errors("read all files, to prove that nothing is left in them")
def prove(
    evidence: Evidence, folders: Sequence[Path], indexed: Sequence[str], unreadable: Sequence[str] = ()
) -> ErasureProof:
    """The scan after, of every file, and through each store's own reader.

    Args:
        evidence: collected and controlled before.
        folders: of the session, all of it on disk, and of the forks that forgot it too.
        indexed: the text of each row of the session's index, as the index reads it.
        unreadable: reasons why some of it may be where nobody can look.

    Raises:
        StorageError: a file cannot be read.
    """
    reasons = list(unreadable)
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    anew = {path for copy in evidence.copies for path in _derived_anew(copy)}
    wanted = {w for copy in evidence.copies for kinds in copy.windows.values() for ws in kinds.values() for w in ws}
    left = _found(wanted, files)
    # what was derived anew never saw the span, so a number that stands there tells nothing of it
    nothing = {window for copy in evidence.copies for window in _numbers(copy) if left.get(window, set()) & anew}
    remains = sorted({str(path) for window, paths in left.items() if window not in nothing for path in paths})
    for copy in evidence.copies:
        reasons += _unproven(copy, nothing)
        reasons += _still_read(copy)
    if not evidence.copies or not evidence.copies[0].ids:
        reasons.append("the span is too short, or said elsewhere too, to be told apart from what stays")
    reasons += [f"bytes of it are in {path}" for path in remains]
    if any(text in row for row in indexed for text in evidence.texts):
        reasons.append("the index reads text of it")
    return ErasureProof(
        proven=not reasons,
        reasons=tuple(reasons),
        looked_for=_count(copy.windows for copy in evidence.copies),
        found_before=_count(copy.found for copy in evidence.copies),
        remains=tuple(remains),
        files=len(files),
        bytes=sum(path.stat().st_size for path in files),
    )


def unfinished(evidence: Evidence, reason: str) -> ErasureProof:
    """What is told where the scan after could not be done."""
    return ErasureProof(
        proven=False,
        reasons=(reason,),
        looked_for=_count(copy.windows for copy in evidence.copies),
        found_before=_count(copy.found for copy in evidence.copies),
        remains=(),
        files=0,
        bytes=0,
    )


def _derived_anew(copy: Copy) -> Iterator[Path]:
    """Segments and snapshots that the journal names, but for those that had read the span."""
    journal = SqliteJournal.open(copy.paths.journal, read_only=True)
    try:
        names = {"segments": journal.segments(), "snapshots": journal.snapshots()}
    finally:
        journal.close()
    for kind in DERIVED:
        for record in names[kind]:
            if record.name not in copy.old[kind]:
                yield copy.paths.folder / kind / record.name


def _numbers(copy: Copy) -> Iterator[bytes]:
    for name in DERIVED:
        for windows in copy.windows[name].values():
            yield from windows


def _unproven(copy: Copy, nothing: set[bytes]) -> Iterator[str]:
    """Kinds of bytes whose absence says nothing."""
    for name, kinds in copy.windows.items():
        for kind, windows in kinds.items():
            where = f"the {kind} in the {name} of {copy.name}"
            found = copy.found[name].get(kind, set())
            if windows and 2 * len(found) < len(set(windows)):
                yield f"the scan did not find {where} before they were forgotten ({len(found)} of {len(set(windows))})"
            elif windows and not found - nothing:
                yield f"nothing that was looked for of {where} is theirs alone: it stands in what stays, too"
    if copy.old["snapshots"] and not copy.windows["snapshots"]["state"]:
        yield f"the snapshots of {copy.name} hold no numbers that could be looked for"


def _still_read(copy: Copy) -> Iterator[str]:
    """What a copy's own readers still say."""
    journal = SqliteJournal.open(copy.paths.journal, read_only=True)
    try:
        tokens = journal.tokens(0, journal.position).astype("<i4").tobytes()
        named = {"segments": {m.name for m in journal.segments()}, "snapshots": {s.name for s in journal.snapshots()}}
    finally:
        journal.close()
    if any(aligned(window, tokens) for window in copy.ids):
        yield f"the journal of {copy.name} reads tokens of it"
    for kind, old in copy.old.items():
        there = set(FileSegmentStore(copy.paths.folder / kind).list()) | named[kind]
        for name in sorted(old & there):
            yield f"{kind} of {copy.name} still hold {name}, which had read it"


def _files(paths: SessionPaths, name: str) -> Iterable[Path]:
    """The files of a class."""
    if name == "journal":
        return paths.folder.glob(f"{paths.journal.name}*")
    return (path for path in (paths.folder / _FOLDERS[name]).rglob("*") if path.is_file())


_FOLDERS = {"segments": "segments", "snapshots": "snapshots", "index": "index.lance"}


def _found(windows: Iterable[bytes], files: Iterable[Path]) -> dict[bytes, set[Path]]:
    """Which windows stand in the raw bytes of some file, and in which. A file with several names is read once."""
    found: dict[bytes, set[Path]] = {}
    seen: dict[tuple[int, int], Path] = {}
    for path in files:
        about = path.stat()
        first = seen.setdefault((about.st_dev, about.st_ino), path)
        if first is path:
            data = path.read_bytes()
            for window in windows:
                if window in data:
                    found.setdefault(window, set()).add(path)
        else:
            for paths in found.values():
                if first in paths:
                    paths.add(path)
    return found


def _count(copies: Iterable[Mapping[str, Mapping[str, Collection[bytes]]]]) -> dict[str, dict[str, int]]:
    """How many pieces, by class of file and kind, in all copies together."""
    counts: dict[str, dict[str, int]] = {}
    for classes in copies:
        for name, kinds in classes.items():
            counted = counts.setdefault(name, {})
            for kind, windows in kinds.items():
                if windows:
                    counted[kind] = counted.get(kind, 0) + len(windows)
    return counts
