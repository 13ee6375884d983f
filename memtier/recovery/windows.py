"""Pieces of a span that can be looked for in raw files: of its text, its ids, its keys and values, what read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memtier_backends.base import SegmentStore
from memtier_backends.records import RawArray, SegmentManifest
from memtier_backends.segments import read_kv, read_landmarks
from memtier_backends.tensors import unpack_tensors

__all__ = [
    "WINDOW_TOKENS",
    "aligned",
    "kv_windows",
    "landmark_windows",
    "session_block",
    "spread",
    "state_windows",
    "text_windows",
]

WINDOW_TOKENS = 8
WINDOW_BYTES = 24
WINDOWS = 48
"""Places of a span that are looked for, at most, of each kind."""
SLICES = 8
"""Places of one tensor of a snapshot."""


def session_block(manifest: SegmentManifest) -> int:
    """Tokens of a block."""
    return (manifest.end - manifest.start) // manifest.blocks


def spread(values: Sequence) -> list:
    """At most WINDOWS of them, evenly."""
    if len(values) <= WINDOWS:
        return list(values)
    return [values[i * (len(values) - 1) // (WINDOWS - 1)] for i in range(WINDOWS)]


def aligned(window: bytes, data: bytes) -> bool:
    """Whether token ids of four bytes each stand in others."""
    at = data.find(window)
    while at >= 0 and at % 4:
        at = data.find(window, at + 1)
    return at >= 0


def text_windows(said: str) -> list[str]:
    """Stretches of a text; none of one that is too short to be known again."""
    starts = range(0, max(0, len(said) - WINDOW_BYTES) + 1, 4)
    windows = spread([said[i : i + WINDOW_BYTES] for i in starts])
    return [text for text in windows if len(text) >= WINDOW_BYTES // 2]


def kv_windows(store: SegmentStore, sealed: Sequence[SegmentManifest], places: Sequence[int]) -> Iterator[bytes]:
    """Rows of K and V of tokens of the span that stand in one block together."""
    for manifest in sealed:
        size = session_block(manifest)
        for at in (at for at in places if manifest.start <= at < manifest.end):
            block, offset = divmod(at, size)
            for layer in range(len(manifest.layers)):
                raw = read_kv(store, manifest, layer, block)
                row = raw.nbytes // (2 * size)
                rows = min(size - offset, WINDOW_TOKENS)
                for half in (0, raw.nbytes // 2):
                    window = bytes(raw.data[half + offset * row : half + (offset + rows) * row])
                    if _tells(window):
                        yield window


def landmark_windows(
    store: SegmentStore, sealed: Sequence[SegmentManifest], ranges: Sequence[tuple[int, int]]
) -> Iterator[bytes]:
    """Landmarks of the blocks that lie in the span as a whole."""
    for manifest in sealed:
        size = session_block(manifest)
        starts = [manifest.start + block * size for block in range(manifest.blocks)]
        blocks = [b for b, at in enumerate(starts) if any(first <= at <= end - size for first, end in ranges)]
        for layer in range(len(manifest.layers)):
            rows = read_landmarks(store, manifest, layer)
            for block in spread(blocks):
                window = rows[block].tobytes()[: 4 * WINDOW_BYTES]
                if _tells(window):
                    yield window


def state_windows(store: SegmentStore, name: str, digest: str) -> Iterator[bytes]:
    """Numbers of a snapshot: of recurrent states, which every token since has changed, and of the window's K and V."""
    arrays, _ = unpack_tensors(store.get(name), name, digest)
    numbers = [raw for raw in arrays.values() if raw.dtype.startswith(("F", "BF"))]
    yield from spread([window for raw in numbers for window in _slices(raw)])


def _slices(raw: RawArray) -> Iterator[bytes]:
    step = max(WINDOW_BYTES, raw.nbytes // SLICES)
    for at in range(0, raw.nbytes - WINDOW_BYTES + 1, step):
        window = bytes(raw.data[at : at + WINDOW_BYTES])
        if _tells(window):
            yield window


def _tells(window: bytes) -> bool:
    return len(window) >= WINDOW_BYTES and len(set(window)) > 4
