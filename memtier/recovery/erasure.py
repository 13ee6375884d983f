"""Proof that a span is gone: its bytes are looked for in the raw files, before it is forgotten and after.

A scan that finds nothing proves nothing unless it would have found something. So the same scan runs before: for each
class of file that holds something of the span (journal, segments, snapshots, index) it must find its bytes there, or
the proof is refused. Afterwards every file is scanned for all of them, and each store is asked through its own reader.

Bytes that also belong to what stays (a sentence that was said twice) prove nothing and are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from memtier.folder import SessionFolder
from memtier.recovery.reports import ErasureProof
from memtier_backends.files import storage_errors
from memtier_backends.layout import SessionPaths
from memtier_backends.records import RawArray, SegmentManifest
from memtier_backends.segments import read_kv, read_landmarks
from memtier_backends.tensors import unpack_tensors

__all__ = ["Evidence", "collect", "control", "prove"]

WINDOW_TOKENS = 8
WINDOW_BYTES = 24
WINDOWS = 48
"""Places of a span that are looked for, at most, of each kind."""


@dataclass(slots=True)
class Evidence:
    """Bytes of a span, by class of file and kind of bytes, and what the first scan found of them."""

    windows: dict[str, dict[str, list[bytes]]] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    ids: list[bytes] = field(default_factory=list)
    kv_hashes: frozenset[str] = frozenset()
    found_before: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def all_windows(self) -> list[bytes]:
        kinds = (kinds.values() for kinds in self.windows.values())
        return sorted({window for lists in kinds for windows in lists for window in windows})


def collect(session: SessionFolder, start: int, end: int, said: str, rest: str) -> Evidence:
    """What the files of a session hold of the tokens [start, end), all that was sealed being on disk.

    Args:
        said: the text of these tokens; empty without a tokenizer.
        rest: the text of all others.
    """
    journal = session.journal
    tokens = journal.tokens(0, journal.position).astype("<i4")
    places = _places(tokens, start, end)
    evidence = Evidence()
    evidence.ids = [tokens[at : at + WINDOW_TOKENS].tobytes() for at in places]
    texts = _spread([said[i : i + WINDOW_BYTES] for i in range(0, max(0, len(said) - WINDOW_BYTES) + 1, 4)])
    evidence.texts = [text for text in texts if len(text) >= WINDOW_BYTES // 2 and text not in rest]
    told = [text.encode() for text in evidence.texts]
    kept_text = any(turn.text is not None for turn in journal.turns(start, end))
    evidence.windows["journal"] = {"ids": evidence.ids, "text": told if kept_text else []}
    sealed = [m for m in journal.segments() if m.start < end and m.end > start]
    evidence.windows["segments"] = {
        "keys and values": list(_kv_windows(session, sealed, places)),
        "landmarks": list(_landmark_windows(session, sealed, start, end)),
    }
    evidence.kv_hashes = frozenset(_kv_hashes(sealed, start, end))
    snapshots = [record for record in journal.snapshots() if record.position > start]
    evidence.windows["snapshots"] = {
        "state": [w for record in snapshots for w in _state_windows(session, record.name, record.hash)]
    }
    indexed = sealed and journal.indexed_through * session_block(sealed[0]) > start and session.paths.index.is_dir()
    evidence.windows["index"] = {"text": told if indexed else []}
    return evidence


@storage_errors("read all files, to find what is to be forgotten")
def control(evidence: Evidence, folders: Sequence[SessionPaths]) -> None:
    """The scan before: what it finds of each kind in the files of its class."""
    for name, kinds in evidence.windows.items():
        files = [path for paths in folders for path in _files(paths, name)]
        evidence.found_before[name] = {kind: len(_found(windows, files)) for kind, windows in kinds.items() if windows}


@storage_errors("read all files, to prove that nothing is left in them")
def prove(
    evidence: Evidence, session: SessionFolder, folders: Sequence[SessionPaths], indexed: Sequence[str]
) -> ErasureProof:
    """The scan after, of every file, and through each store's own reader.

    Args:
        evidence: collected and controlled before.
        session: the session, all of it on disk.
        folders: the session's and those of its forks and checkpoints.
        indexed: the text of each row of the session's index, as the index reads it.

    Raises:
        StorageError: a file cannot be read.
    """
    reasons = []
    for name, kinds in evidence.windows.items():
        for kind, windows in kinds.items():
            if windows and not evidence.found_before[name][kind]:
                reasons.append(f"the scan did not find the {kind} in the {name} before they were forgotten")
    if not evidence.ids:
        reasons.append("the span is too short, or said elsewhere too, to be told apart from what stays")
    journal = session.journal
    files = [path for paths in folders for path in sorted(paths.folder.rglob("*")) if path.is_file()]
    # a memory that has faded is the same whether or not the span was read: those numbers tell nothing of it
    states = evidence.windows["snapshots"]["state"]
    fresh = [session.paths.snapshots / record.name for record in journal.snapshots()]
    faded = _found(states, fresh)
    evidence.windows["snapshots"]["state"] = [window for window in states if window not in faded]
    if states and len(faded) == len(set(states)):
        reasons.append("every number of the snapshots that was looked for has faded, and tells nothing")
    left = _found(evidence.all_windows, files)
    remains = sorted({str(path) for path in left.values()})
    reasons += [f"bytes of it are in {path}" for path in remains]
    tokens = journal.tokens(0, journal.position).astype("<i4").tobytes()
    if any(_aligned(window, tokens) for window in evidence.ids):
        reasons.append("the journal reads tokens of it")
    if any(evidence.kv_hashes.intersection(layer.kv_hashes) for m in journal.segments() for layer in m.layers):
        reasons.append("a segment holds a block of it")
    if any(text in row for row in indexed for text in evidence.texts):
        reasons.append("the index reads text of it")
    return ErasureProof(
        proven=not reasons,
        reasons=tuple(reasons),
        looked_for={name: {k: len(w) for k, w in kinds.items() if w} for name, kinds in evidence.windows.items()},
        found_before=evidence.found_before,
        remains=tuple(remains),
        files=len(files),
        bytes=sum(path.stat().st_size for path in files),
    )


def session_block(manifest: SegmentManifest) -> int:
    """Tokens of a block."""
    return (manifest.end - manifest.start) // manifest.blocks


def _places(tokens: np.ndarray, start: int, end: int) -> list[int]:
    """Where windows of the span begin that stand nowhere else."""
    before, after = tokens[:start].tobytes(), tokens[end:].tobytes()
    places = []
    for at in _spread(list(range(start, end - WINDOW_TOKENS + 1))):
        window = tokens[at : at + WINDOW_TOKENS].tobytes()
        if not _aligned(window, before) and not _aligned(window, after):
            places.append(at)
    return places


def _aligned(window: bytes, data: bytes) -> bool:
    at = data.find(window)
    while at >= 0 and at % 4:
        at = data.find(window, at + 1)
    return at >= 0


def _kv_windows(session: SessionFolder, sealed: Sequence[SegmentManifest], places: Sequence[int]) -> Iterator[bytes]:
    """Rows of K and V of tokens of the span that stand in one block together."""
    for manifest in sealed:
        size = session_block(manifest)
        for at in (at for at in places if manifest.start <= at < manifest.end):
            block, offset = divmod(at, size)
            for layer in range(len(manifest.layers)):
                raw = read_kv(session.segments, manifest, layer, block)
                row = raw.nbytes // (2 * size)
                rows = min(size - offset, WINDOW_TOKENS, -(-64 // row))
                for half in (0, raw.nbytes // 2):
                    window = bytes(raw.data[half + offset * row : half + (offset + rows) * row])
                    if len(window) >= WINDOW_BYTES and len(set(window)) > 4:
                        yield window


def _landmark_windows(
    session: SessionFolder, sealed: Sequence[SegmentManifest], start: int, end: int
) -> Iterator[bytes]:
    """Landmarks of the blocks that lie in the span as a whole."""
    for manifest in sealed:
        size = session_block(manifest)
        blocks = [b for b in range(manifest.blocks) if start <= manifest.start + b * size <= end - size]
        for layer in range(len(manifest.layers)):
            rows = read_landmarks(session.segments, manifest, layer)
            for block in _spread(blocks):
                window = rows[block].tobytes()[: 4 * WINDOW_BYTES]
                if len(set(window)) > 4:
                    yield window


def _kv_hashes(sealed: Sequence[SegmentManifest], start: int, end: int) -> Iterator[str]:
    for manifest in sealed:
        size = session_block(manifest)
        for block in range(manifest.blocks):
            at = manifest.start + block * size
            if at < end and at + size > start:
                yield from (layer.kv_hashes[block] for layer in manifest.layers)


def _state_windows(session: SessionFolder, name: str, digest: str) -> Iterator[bytes]:
    """Numbers of the fading memories, which every token since has changed."""
    arrays, _ = unpack_tensors(session.snapshots.get(name), name, digest)
    for key, raw in arrays.items():
        if key.endswith(".ssm"):
            yield from _slices(raw)


def _slices(raw: RawArray) -> Iterator[bytes]:
    step = max(WINDOW_BYTES, raw.nbytes // 8)
    for at in range(0, raw.nbytes - WINDOW_BYTES + 1, step):
        window = bytes(raw.data[at : at + WINDOW_BYTES])
        if len(set(window)) > 4:
            yield window


def _files(paths: SessionPaths, name: str) -> Iterable[Path]:
    """The files of a class, of a session and of its checkpoints."""
    for one in (paths, *paths.checkpoint_folders()):
        if name == "journal":
            yield from one.folder.glob(f"{one.journal.name}*")
        else:
            yield from (path for path in (one.folder / _FOLDERS[name]).rglob("*") if path.is_file())


_FOLDERS = {"segments": "segments", "snapshots": "snapshots", "index": "index.lance"}


def _found(windows: Sequence[bytes], files: Iterable[Path]) -> dict[bytes, Path]:
    """Which windows stand in the raw bytes of some file, and in which."""
    found: dict[bytes, Path] = {}
    for path in files:
        data = path.read_bytes()
        for window in windows:
            if window not in found and window in data:
                found[window] = path
    return found


def _spread(values: Sequence) -> list:
    """At most WINDOWS of them, evenly."""
    if len(values) <= WINDOWS:
        return list(values)
    return [values[i * (len(values) - 1) // (WINDOWS - 1)] for i in range(WINDOWS)]
