"""What the files hold of a span that is to be forgotten: pieces to look for, in each copy by class of file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memtier.folder import META
from memtier.recovery.holders import Range, Said, checkpoint_name, ranges_in
from memtier.recovery.windows import (
    WINDOW_TOKENS,
    aligned,
    kv_windows,
    landmark_windows,
    session_block,
    spread,
    state_windows,
    text_windows,
)
from memtier_backends.base import Journal
from memtier_backends.files import storage_errors
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths
from memtier_backends.segment_store import FileSegmentStore

__all__ = ["Copy", "Evidence", "collect"]

Decode = Callable[[NDArray[np.int32]], str]


@dataclass(slots=True)
class Copy:
    """A place that holds some of it, and its files.

    `windows` are looked for, by class of file and kind of bytes; `found` is what the first scan found of them. `ids`
    are the windows of token ids. `old` are names of segments and snapshots that read the span.
    """

    name: str
    paths: SessionPaths
    windows: dict[str, dict[str, list[bytes]]] = field(default_factory=dict)
    found: dict[str, dict[str, set[bytes]]] = field(default_factory=dict)
    ids: list[bytes] = field(default_factory=list)
    old: dict[str, set[str]] = field(default_factory=dict)


@dataclass(slots=True)
class Evidence:
    """What is looked for, copy by copy, the session first; `texts` in the index's rows too."""

    copies: list[Copy]
    texts: list[str]


@storage_errors("read what is to be forgotten")
def collect(folders: Sequence[Path], said: Said, text: str, decode: Decode) -> Evidence:
    """What the files hold of it, all that was sealed being on disk.

    Args:
        folders: the session's, then those of the forks that forget it too.
        said: what is to be forgotten.
        text: the same as text; empty without a tokenizer.
        decode: text of tokens of the session's tokenizer.

    Raises:
        StorageError: a file cannot be read.
    """
    opened: list[tuple[Copy, Journal, list[Range]]] = []
    try:
        for paths in [paths for folder in folders for paths in _with_checkpoints(SessionPaths(folder))]:
            journal = SqliteJournal.open(paths.journal, read_only=True)
            ranges = ranges_in(journal, said)
            opened.append((Copy(_name(journal, paths), paths), journal, ranges))
        tokens = [journal.tokens(0, journal.position) for _, journal, _ in opened]
        rests = [_rest(ids, ranges) for ids, (_, _, ranges) in zip(tokens, opened, strict=True)]
        rest_texts = [
            _rest_text(journal, ranges, rest, said, decode)
            for (_, journal, ranges), rest in zip(opened, rests, strict=True)
        ]
        texts = [told for told in text_windows(text) if not any(told in rest for rest in rest_texts)]
        for (copy, journal, ranges), ids in zip(opened, tokens, strict=True):
            if ranges:
                _fill(copy, journal, ranges, ids, texts, rests)
    finally:
        for _, journal, _ in opened:
            journal.close()
    return Evidence([copy for copy, _, ranges in opened if ranges], texts)


def _with_checkpoints(paths: SessionPaths) -> list[SessionPaths]:
    return [paths, *paths.checkpoint_folders()]


def _name(journal: Journal, paths: SessionPaths) -> str:
    if paths.folder.parent.name == "checkpoints":
        return f"checkpoint {checkpoint_name(journal, paths)!r}"
    return f"session {journal.get_meta(META)['id']!r}"


def _rest(ids: NDArray[np.int32], ranges: Sequence[Range]) -> list[NDArray[np.int32]]:
    """The stretches of tokens between the ranges."""
    edges = [0, *(edge for span in ranges for edge in span), ids.size]
    return [ids[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _rest_text(
    journal: Journal, ranges: Sequence[Range], rest: Sequence[NDArray[np.int32]], said: Said, decode: Decode
) -> str:
    """What a copy says beside it."""
    if journal.get_meta(META)["model"]["tokenizer"] == said.tokenizer:
        return "\0".join(decode(ids) for ids in rest)
    # in other tokens whole turns go, and the text of the others is known, or they could not have been read
    gone = {turn.turn for start, end in ranges for turn in journal.turns(start, end)}
    return "\0".join(turn.text or "" for turn in journal.turns() if turn.turn not in gone)


def _fill(
    copy: Copy, journal: Journal, ranges: Sequence[Range], ids: NDArray[np.int32], texts: Sequence[str],
    rests: Sequence[Sequence[NDArray[np.int32]]],
) -> None:  # fmt: skip
    tokens = ids.astype("<i4")
    stays = [stretch.astype("<i4").tobytes() for rest in rests for stretch in rest]
    places = [
        at
        for at in spread([at for start, end in ranges for at in range(start, end - WINDOW_TOKENS + 1)])
        if not any(aligned(tokens[at : at + WINDOW_TOKENS].tobytes(), stretch) for stretch in stays)
    ]
    copy.ids = [tokens[at : at + WINDOW_TOKENS].tobytes() for at in places]
    told = [text.encode() for text in texts]
    turns = [turn.text or "" for start, end in ranges for turn in journal.turns(start, end)]
    copy.windows["journal"] = {
        "ids": copy.ids,
        # a turn's text is one piece; of a span over two turns some windows stand in none
        "text": [text.encode() for text in texts if any(text in turn for turn in turns)],
        "source and metadata": _provenance(journal, ranges),
    }
    start = ranges[0][0]
    sealed = [m for m in journal.segments() if m.end > start]
    segments, snapshots = FileSegmentStore(copy.paths.segments), FileSegmentStore(copy.paths.snapshots)
    inside = [m for m in sealed if any(m.start < b and m.end > a for a, b in ranges)]
    copy.windows["segments"] = {
        "keys and values": list(kv_windows(segments, inside, places)),
        "landmarks": list(landmark_windows(segments, inside, ranges)),
    }
    after = [record for record in journal.snapshots() if record.position > start]
    copy.windows["snapshots"] = {
        "state": [window for record in after for window in state_windows(snapshots, record.name, record.hash)]
    }
    copy.old = {"segments": {m.name for m in sealed}, "snapshots": {record.name for record in after}}
    indexed = inside and journal.indexed_through * session_block(inside[0]) > start and copy.paths.index.is_dir()
    copy.windows["index"] = {"text": told if indexed else []}


def _provenance(journal: Journal, ranges: Sequence[Range]) -> list[bytes]:
    """Source and metadata of the turns that go as a whole, but for what other turns say too."""

    def strings(value: object) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            for inner in value.values():
                yield from strings(inner)
        elif isinstance(value, list):
            for inner in value:
                yield from strings(inner)

    going: set[str] = set()
    staying: list[str] = []
    for turn in journal.turns():
        whole = any(a <= turn.start and turn.end <= b for a, b in ranges)
        told = [text for value in (turn.source, dict(turn.metadata)) for text in strings(value)]
        if whole:
            going.update(told)
        else:
            staying += told
    # JSON writes other characters than ASCII in its own way
    plain = [text for text in going if text.isascii() and text.isprintable() and len(text) >= 8]
    return [t.encode() for t in plain if not set('"\\') & set(t) and not any(t in other for other in staying)]
