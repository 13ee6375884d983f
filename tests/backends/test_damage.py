"""Torn writes and flipped bits, 200 over the classes of files: what is read is what was written, or an error.

The index has trials of its own: tests/runtime/test_index_damage.py.
"""

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memtier.errors import MemtierError
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths
from memtier_backends.records import RawArray, SnapshotRecord
from memtier_backends.segment_store import FileSegmentStore
from memtier_backends.segments import pack_segment, read_innovation, read_kv, read_landmarks
from memtier_backends.tensors import content_hash, pack_tensors, unpack_tensors
from memtier_backends.testing import BLOCK_TOKENS, begin_turn, damage_file, make_payloads

TRIALS = 200
CLASSES = ["journal.sqlite3", "journal.sqlite3-wal", "segments", "snapshots"]


@dataclass
class Stored:
    """A session on disk, part of it still in the write-ahead log, and all that it said over time."""

    folder: Path
    tokens: list[int]
    said: dict[str, list[Any]]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    live = tmp_path_factory.mktemp("live")
    journal = SqliteJournal.open(SessionPaths(live).journal)
    segments, snapshots = FileSegmentStore(SessionPaths(live).segments), FileSegmentStore(SessionPaths(live).snapshots)
    journal.set_meta("session", {"id": "a", "tenant": "b"})
    said: dict[str, list[Any]] = {}

    def remember() -> None:
        for what, answer in everything(journal, segments, snapshots).items():
            said.setdefault(what, []).append(answer)

    for number in range(6):
        turn = begin_turn(journal, source=f"source {number}")
        ids = [1000 * number + n for n in range(8 * BLOCK_TOKENS)]
        journal.commit(turn, ids, text=f"text of turn {number}", mark=number % 2 == 0)
        remember()
        if number == 3:
            # of the second of these two part still stands
            journal.commit(turn, [1] * 5)
            journal.rollback(journal.position - 5, "test")
            journal.commit(turn, [2, 3, 4, 5, 6])
            journal.rollback(journal.position - 3, "test")
            remember()
            journal.checkpoint()
        data, manifest = pack_segment(make_payloads(8 * number, 8))
        segments.put(manifest.name, data)
        journal.add_segment(manifest)
        remember()
        state = RawArray("F32", (64,), np.arange(64, dtype="<f4").tobytes())
        data = pack_tensors({"state": state}, {"n": str(number)})
        name = f"{journal.position:012d}-{content_hash(data)[:16]}.safetensors"
        snapshots.put(name, data)
        journal.add_snapshot(SnapshotRecord(journal.position, name, len(data), content_hash(data), 0))
        remember()
    folder = tmp_path_factory.mktemp("stored") / "session"
    shutil.copytree(live, folder)
    tokens = journal.tokens(0, journal.position).tolist()
    journal.close()
    return Stored(folder, tokens, said)


def everything(journal: SqliteJournal, segments: FileSegmentStore, snapshots: FileSegmentStore) -> dict[str, Any]:
    """All that can be read, each answer by what was asked; an error of ours stands for an answer."""
    answers: dict[str, Any] = {}

    def ask(what: str, call: Any) -> Any:
        try:
            answers[what] = call()
        except MemtierError as error:
            answers[what] = error
        return answers[what]

    for turn in _listed(ask("turns", journal.turns)):
        answers[f"turn {turn.turn}"] = turn
    answers.pop("turns")
    ask("marks", lambda: tuple(journal.marks(0, 10**9)))
    ask("meta", lambda: str(journal.get_meta("session")))
    for manifest in _listed(ask("segments", lambda: tuple(journal.segments()))):
        answers[f"manifest {manifest.name}"] = manifest
        for layer in range(len(manifest.layers)):
            for block in range(manifest.first_block, manifest.end_block):
                ask(f"kv {layer} {block}", lambda m=manifest, a=layer, b=block: bytes(read_kv(segments, m, a, b).data))
            ask(
                f"landmarks {layer} {manifest.name}",
                lambda m=manifest, a=layer: read_landmarks(segments, m, a).tobytes(),
            )
        ask(f"innovation {manifest.name}", lambda m=manifest: read_innovation(segments, m).tobytes())
    answers.pop("segments")
    for record in _listed(ask("snapshots", lambda: tuple(journal.snapshots()))):
        answers[f"snapshot {record.name}"] = record
        ask(f"state {record.name}", lambda r=record: _state(snapshots, r))
    answers.pop("snapshots")
    return answers


def _listed(answer: Any) -> Any:
    return () if isinstance(answer, MemtierError) else answer


def _state(snapshots: FileSegmentStore, record: SnapshotRecord) -> bytes:
    arrays, _ = unpack_tensors(snapshots.get(record.name), record.name, record.hash)
    return bytes(arrays["state"].data)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", CLASSES)
def test_no_damage_is_read_in_silence(stored: Stored, tmp_path: Path, kind: str) -> None:
    choose = random.Random(kind)
    loud, wal = 0, kind.endswith("-wal")
    for number in range(TRIALS // len(CLASSES)):
        folder = tmp_path / str(number)
        shutil.copytree(stored.folder, folder)
        target = folder / kind
        how = damage_file(choose, choose.choice(sorted(target.iterdir())) if target.is_dir() else target)
        paths = SessionPaths(folder)
        try:
            journal = SqliteJournal.open(paths.journal)
        except MemtierError:
            loud += 1
            continue
        try:
            position = journal.position
            tokens = journal.tokens(0, position).tolist()
        except MemtierError:
            loud += 1
        else:
            # a log that lost its end is a session that ended earlier; the last transaction here holds no tokens
            assert tokens == (stored.tokens[:position] if wal and how.startswith("cut") else stored.tokens), how
        answers = everything(journal, FileSegmentStore(paths.segments), FileSegmentStore(paths.snapshots))
        loud += any(isinstance(answer, MemtierError) for answer in answers.values())
        for what, answer in answers.items():
            known = stored.said.get(what, []) if wal else stored.said.get(what, [])[-1:]
            assert isinstance(answer, MemtierError) or answer in known, (how, what, answer, known[-1:])
        try:
            journal.close()
        except MemtierError:
            loud += 1
        shutil.rmtree(folder)
    assert loud > TRIALS // len(CLASSES) // 5
