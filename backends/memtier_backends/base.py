"""The contracts of storage: what a journal, a segment store and an index must do, and the records they exchange.

A session on disk is one folder (`layout.SessionPaths`) with one owner (`lock.SessionLock`). Its journal is the truth;
the segments, snapshots and the index are derived from it and can be made again. Everything here is bytes and numpy: no
torch.

    Journal        sync, durable on return          journal_sqlite.SqliteJournal.open(path, *, read_only=False)
    SegmentStore   sync, immutable files by name    segments.FileSegmentStore(folder)
    MemoryIndex    async, derived, rebuildable      await index_lance.LanceIndex.open(folder, layers), layers: sizes C
                                                    index_memory.MemoryIndexAdapter(layers)

Beside the protocols:

    layout     check_store(store) -> Path; session_folder(store, tenant, session) -> Path;
               SessionPaths(folder).lock, .journal, .segments, .snapshots, .index;
               session_folders(store, tenant) -> list[Path]; remove_session(folder)
    lock       SessionLock.acquire(folder) -> SessionLock; .release(); a context manager too
    segments   pack_segment(payloads) -> (bytes, SegmentManifest); read_kv(store, manifest, layer, block) -> RawArray;
               read_landmarks(store, manifest, layer) -> (n, C); read_innovation(store, manifest) -> (n, S);
               verify_segment(store, manifest); pack_tensors(arrays, metadata) -> bytes;
               unpack_tensors(data, name, hash=None) -> (arrays, metadata); content_hash(data) -> str
    faults     Faults and FaultyJournal, FaultySegmentStore, FaultyIndex (no pytest needed)
    testing    the conformance suites that every adapter's tests subclass (needs pytest); re-exports faults

`layer` is always the ordinal of a memory layer, 0 .. L-1 in the order of `BlockPayload.kv`, never a layer number of the
model.

Shape letters: S block tokens, G key/value heads, D head size, C landmark size, n blocks of a segment, L memory layers.

Errors: StorageFullError when there is no space (nothing acknowledged is lost, the call may be sent again),
CorruptMemoryError when bytes are not those that were written, IncompatibleMemoryError for another format, ConfigError
for a caller's mistake, StorageError for the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from memtier.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "BlockPayload",
    "IndexHit",
    "IndexRow",
    "Journal",
    "LayerLayout",
    "MemoryIndex",
    "RawArray",
    "SegmentManifest",
    "SegmentStore",
    "SnapshotRecord",
    "TurnRecord",
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


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """A snapshot file: the session's state once it had read `position` tokens. `hash` is segments.content_hash.

    It can be used only where blocks [0, `blocks`), which had left the window by then, are in segments.
    """

    position: int
    name: str
    size: int
    hash: str
    blocks: int


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


class Journal(Protocol):
    """The session itself: tokens and turns, in order, durable on return. Called by one thread at a time.

    Rows are only ever added; each carries a hash chained over all before it, and each is checked when it is read.
    """

    @property
    def position(self) -> int:
        """Tokens that stand: the position of the next one."""
        ...

    @property
    def bytes_on_disk(self) -> int: ...

    def get_meta(self, key: str) -> Any:
        """The JSON value of `key`, or None."""
        ...

    def set_meta(self, key: str, value: Any) -> None: ...

    def begin_turn(
        self,
        *,
        role: str,
        source: str | None,
        metadata: Mapping[str, Any] | None,
        created_at: float,
        retrieval: str,
        span_blocks: int,
    ) -> int:
        """Begin a turn and return its number. It is listed by `turns` once it holds tokens.

        Raises:
            ConfigError: `metadata` is not JSON.
        """
        ...

    def commit(
        self, turn: int, tokens: NDArray[np.integer] | Sequence[int], *, text: str | None = None, mark: bool = False
    ) -> int:
        """Append tokens to the newest turn in one transaction, durable on return.

        Args:
            turn: the number that the last `begin_turn` returned.
            tokens: (n,) ids in [0, 2**31); may be empty if `text` is given.
            text: the original text of a piece, given with its last tokens: it stands for every token of the turn since
                the piece before.
            mark: set a retrieval mark at the last of these tokens.

        Returns:
            The new position.

        Raises:
            ConfigError: another turn than the newest, ids out of range, a text or a mark without tokens.
            StorageFullError: nothing of this commit was written.
        """
        ...

    def rollback(self, position: int, reason: str) -> None:
        """Take back the tokens >= position by a record of its own; what was derived from them is forgotten with it.

        Texts of cut pieces and marks go too, and so does what `drop_after` drops, all in one transaction.
        """
        ...

    def tokens(self, start: int, end: int) -> NDArray[np.int32]:
        """(end - start,) ids. Raises ConfigError outside [0, position], CorruptMemoryError for a damaged row."""
        ...

    def turns(self, start: int = 0, end: int | None = None) -> list[TurnRecord]:
        """Turns that hold a token of [start, end), in order, each whole."""
        ...

    def marks(self, start: int, end: int) -> list[int]:
        """Positions of the marks in [start, end), ascending."""
        ...

    def add_segment(self, manifest: SegmentManifest) -> None:
        """Raises ConfigError unless its blocks follow those of the segment before (0 for the first)."""
        ...

    def segments(self) -> list[SegmentManifest]:
        """In order of their blocks, without a gap."""
        ...

    @property
    def indexed_through(self) -> int:
        """Blocks [0, indexed_through) are in the index."""
        ...

    def set_indexed_through(self, blocks: int) -> None: ...

    def add_snapshot(self, record: SnapshotRecord) -> None:
        """Replaces a record of the same name."""
        ...

    def snapshots(self) -> list[SnapshotRecord]:
        """By position, oldest first."""
        ...

    def drop_snapshot(self, name: str) -> None:
        """Forget a record; the file is the caller's. A name that is not there is no error."""
        ...

    def drop_after(self, position: int) -> None:
        """Forget segments and snapshots that hold anything past `position`; the index mark falls back with them.

        A segment that straddles `position` goes as a whole. Files are the caller's: those that no record names are
        orphans.
        """
        ...

    def forget(
        self, start: int, end: int, *, scrub: Collection[int] = (), derived_to: int, meta: Mapping[str, Any]
    ) -> None:
        """Take the tokens [start, end) out for good, in one transaction. Tokens after them move down.

        Texts that stand for one of them go, and so does all that a rollback took back before; the index mark falls to
        0. No byte of what went is left in the file once `checkpoint` has returned.

        Args:
            scrub: turns whose source and metadata go too; those that are left without tokens go as a whole.
            derived_to: at most `start`; then as `drop_after(derived_to)`.
            meta: set in the same transaction.

        Raises:
            ConfigError: not a range of tokens, or `derived_to` is past its start.
        """
        ...

    def copy_to(self, path: Path) -> None:
        """Write a copy of this moment as a new file, which appears whole. Raises StorageError if there is one."""
        ...

    def replace_with(self, path: Path) -> None:
        """Become what the journal at `path`, once checked, says: all of it, or nothing of it.

        Raises:
            CorruptMemoryError: the journal at `path` is damaged; this one is as it was.
        """
        ...

    def verify(self) -> None:
        """Read and check every row and the file's structure. Raises CorruptMemoryError naming what is damaged."""
        ...

    def checkpoint(self) -> None:
        """Fold the write-ahead log into the file and truncate it.

        Raises:
            StorageError: a reader held it busy. Nothing is lost; call again when the reader is gone.
        """
        ...

    def close(self) -> None:
        """Checkpoint and close; harmless when closed already."""
        ...


class SegmentStore(Protocol):
    """Immutable files by name: put whole, get a range, list, delete. Safe to call from several threads.

    A name is letters, digits, '-', '_' and '.', and does not begin with '.'; else ConfigError.
    """

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Write a file whole, durable on return; after a crash there is all of it or nothing. Replaces atomically."""
        ...

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes [offset, offset + length), to the end if length is None.

        Raises:
            CorruptMemoryError: there is no such file, or it is shorter than that.
        """
        ...

    def list(self) -> list[str]:
        """Names, sorted; unfinished files are not among them."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file, durable on return; one that is not there is no error."""
        ...

    def size(self, name: str) -> int: ...

    def clean(self) -> list[str]:
        """Drop what unfinished `put`s of a dead process left; returns their names. For the session's owner only."""
        ...


class MemoryIndex(Protocol):
    """Search over a session's blocks. Derived: whatever it loses can be sent again, and rows sent twice are harmless.

    One event loop uses it; calls may overlap. A write once begun is finished even if its task is cancelled.
    """

    async def add(self, rows: Sequence[IndexRow]) -> None:
        """Add rows; a block that is there already stays as it is. Rows are found by searches at once."""
        ...

    async def search_text(self, query: str, k: int) -> list[IndexHit]:
        """BM25, best first; of the hits, equal scores newest first. Any characters are allowed; no words, no hits."""
        ...

    async def search_landmarks(self, layer: int, vector: NDArray[np.float32], k: int) -> list[IndexHit]:
        """The k largest inner products with the landmarks of a memory layer, exact, best first."""
        ...

    async def count(self) -> int: ...

    async def rows(self, start_block: int, end_block: int) -> pyarrow.Table:
        """Blocks [start_block, end_block) by number; columns block, start, end, text, created_at, innovation, digest,
        landmark_0 .. landmark_{L-1}."""
        ...

    async def drop_from(self, block: int) -> None:
        """Drop the rows of blocks >= block."""
        ...

    async def compact(self) -> None:
        """Merge fragments, bring the text index up to date, drop old versions. Changes no answer."""
        ...

    async def fragments(self) -> int: ...

    async def close(self) -> None: ...


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
