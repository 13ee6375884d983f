"""The records that storage exchanges with those who use it, and the digests that they carry.

`layer` is always the ordinal of a memory layer, 0 .. L-1 in the order of `BlockPayload.kv`, never a layer number of the
model.

Shape letters: S block tokens, G key/value heads, D head size, C landmark size, n blocks of a segment, L memory layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memtier.errors import ConfigError

__all__ = [
    "DIGEST_BYTES",
    "ITEM_BYTES",
    "BlockPayload",
    "IndexHit",
    "IndexRow",
    "LayerLayout",
    "RawArray",
    "SegmentManifest",
    "SnapshotRecord",
    "TurnRecord",
    "fields_digest",
    "row_digest",
]

# Bytes of one element, by safetensors name.
ITEM_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip

# Bytes of every BLAKE2b digest on disk: 128 bits find every accident, which is what they are for.
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class RawArray:
    """A tensor as bytes: C order, little endian, `dtype` by its safetensors name ("F16", "BF16", "F32", "I64" ...).

    Raises:
        ConfigError: unknown dtype, or `data` is not as long as `shape` says.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_BYTES:
            raise ConfigError(f"dtype is {self.dtype!r}; it must be one of {', '.join(ITEM_BYTES)}.")
        expected = prod(self.shape) * ITEM_BYTES[self.dtype]
        got = memoryview(self.data).nbytes
        if got != expected:
            raise ConfigError(f"data has {got} bytes; {self.dtype} of shape {self.shape} needs {expected}.")

    @property
    def nbytes(self) -> int:
        return memoryview(self.data).nbytes


@dataclass(frozen=True, slots=True, eq=False)
class BlockPayload:
    """One sealed block on its way to a segment.

    Args:
        block: block number; it holds the tokens [start, end).
        kv: one (2, S, G, D) a memory layer: keys, then values.
        landmarks: one (C,) float32 a memory layer.
        innovation: (S,) float32; NaN where no layer measures it.
    """

    block: int
    start: int
    end: int
    kv: tuple[RawArray, ...]
    landmarks: tuple[NDArray[np.float32], ...]
    innovation: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """Where one memory layer lies in a segment file, and what its bytes hash to.

    Args:
        dtype: safetensors name of K and V.
        shape: (2, S, G, D) of one block.
        kv_offset: byte of the file where block 0 of this layer begins; blocks follow one another.
        kv_hashes: one hex digest a block.
        landmark_size: C.
        landmark_offset: byte of the file where the (n, C) float32 landmarks begin.
        landmark_hash: hex digest of all of them.
    """

    dtype: str
    shape: tuple[int, int, int, int]
    kv_offset: int
    kv_hashes: tuple[str, ...]
    landmark_size: int
    landmark_offset: int
    landmark_hash: str

    @property
    def block_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class SegmentManifest:
    """What the journal knows of a segment file: its blocks [first_block, first_block + blocks), layout and hashes."""

    name: str
    first_block: int
    blocks: int
    start: int
    end: int
    layers: tuple[LayerLayout, ...]
    innovation_offset: int
    innovation_hash: str
    size: int
    hash: str

    @property
    def end_block(self) -> int:
        return self.first_block + self.blocks

    def to_json(self) -> dict[str, Any]:
        """Plain lists, numbers and strings; `from_json` reads them back."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        plain["layers"] = [{name: getattr(layer, name) for name in LayerLayout.__slots__} for layer in self.layers]
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> SegmentManifest:
        layers = tuple(
            LayerLayout(**{**layer, "shape": tuple(layer["shape"]), "kv_hashes": tuple(layer["kv_hashes"])})
            for layer in plain["layers"]
        )
        return cls(**{**plain, "layers": layers})


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """A turn that holds tokens: [start, end) are those that no rollback took back.

    `text` is the original text of the turn's pieces, joined; None unless texts cover every token of the turn (token
    ids, a turn that was cut off, a piece cut by a rollback). `forgotten` are the ranges that were forgotten of it, as
    offsets into the turn as it was said.

    How it was read: `retrieval` and `span_blocks` say how blocks were chosen; those that end at or before the token
    `retained_from` were not among them any more.
    """

    turn: int
    role: str
    start: int
    end: int
    text: str | None
    source: str | None
    metadata: dict[str, Any]
    created_at: float
    retrieval: str
    span_blocks: int
    forgotten: tuple[tuple[int, int], ...] = ()
    retained_from: int = 0


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """A snapshot file: the session's state once it had read `position` tokens. `hash` is segments.content_hash.

    It can be used only where blocks [`first_block`, `blocks`) are in segments: those that had left the window by then,
    without those that had been dropped.
    """

    position: int
    name: str
    size: int
    hash: str
    blocks: int
    first_block: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class IndexRow:
    """One block as the index knows it.

    Args:
        block: block number; the key of the row.
        start, end: the tokens of the block.
        text: what is searched, and returned by a hit.
        created_at: Unix time in seconds.
        innovation: mean innovation of the block; None where no layer measures it.
        landmarks: one (C,) float32 a memory layer.
    """

    block: int
    start: int
    end: int
    text: str
    created_at: float
    innovation: float | None
    landmarks: tuple[NDArray[np.float32], ...]

    @property
    def digest(self) -> str:
        """Stored beside the row and checked on every hit: a flipped bit in a table is otherwise a silent wrong read."""
        return row_digest(self.block, self.start, self.end, self.text, self.created_at)


@dataclass(frozen=True, slots=True)
class IndexHit:
    """One row that a search found; a higher score is a better one."""

    block: int
    start: int
    end: int
    text: str
    score: float
    created_at: float


def row_digest(block: int, start: int, end: int, text: str, created_at: float) -> str:
    """Hex digest of an index row. The kind of number (a numpy integer, say) does not matter."""
    return fields_digest(int(block), int(start), int(end), text, float(created_at)).hex()


def fields_digest(*fields: bytes | str | int | float | None) -> bytes:
    """BLAKE2b of typed, length-prefixed fields, so that no two different lists of fields give the same input."""
    digest = blake2b(digest_size=DIGEST_BYTES)
    for value in fields:
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        digest.update(f"{type(value).__name__}:{len(data)}:".encode())
        digest.update(data)
    return digest.digest()
