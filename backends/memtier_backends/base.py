"""The contracts of storage: what a journal, a segment store and an index must do. What they exchange: records.py.

A session on disk is one folder (`layout.SessionPaths`) with one owner (`lock.SessionLock`). Its journal is the truth;
the segments, snapshots and the index are derived from it and can be made again. Everything here is bytes and numpy: no
torch.

    Journal        sync, durable on return          journal_sqlite.SqliteJournal.open(path, *, read_only=False)
    SegmentStore   sync, immutable files by name    segment_store.FileSegmentStore(folder)
    MemoryIndex    async, derived, rebuildable      await index_lance.LanceIndex.open(folder, layers), layers: sizes C
                                                    index_memory.MemoryIndexAdapter(layers)

Beside the protocols:

    layout     check_store(store) -> Path; session_folder(store, tenant, session) -> Path;
               SessionPaths(folder).lock, .journal, .segments, .snapshots, .index;
               session_folders(store, tenant) -> list[Path]; remove_session(folder)
    lock       SessionLock.acquire(folder) -> SessionLock; .release(); a context manager too
    segments   pack_segment(payloads) -> (bytes, SegmentManifest); read_kv(store, manifest, layer, block) -> RawArray;
               read_landmarks(store, manifest, layer) -> (n, C); read_innovation(store, manifest) -> (n, S);
               verify_segment(store, manifest); read_payloads(store, manifest) -> list of BlockPayload
    tensors    pack_tensors(arrays, metadata) -> bytes; unpack_tensors(data, name, hash=None) -> (arrays, metadata);
               content_hash(data) -> str
    merging    next_merge(manifests, cuts, most_blocks=, patience=) -> neighbours;
               merged(store, neighbours) -> (bytes, SegmentManifest)
    faults     Faults and FaultyJournal, FaultySegmentStore, FaultyIndex (no pytest needed)
    testing    the conformance suites that every adapter's tests subclass (needs pytest); re-exports faults

`layer` is always the ordinal of a memory layer, never a layer number of the model. Shape letters: records.py.

Errors: StorageFullError when there is no space (nothing acknowledged is lost, the call may be sent again),
CorruptMemoryError when bytes are not those that were written, IncompatibleMemoryError for another format, ConfigError
for a caller's mistake, StorageError for the rest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from memtier_backends.records import IndexHit, IndexRow, SegmentManifest, SnapshotRecord, TurnRecord

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Journal", "MemoryIndex", "SegmentStore"]


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
        retained_from: int = 0,
        turn: int | None = None,
        forgotten: Sequence[tuple[int, int]] = (),
    ) -> int:
        """Begin a turn and return its number. It is listed by `turns` once it holds tokens.

        `retrieval`, `span_blocks` and `retained_from` say how its tokens are read: see `TurnRecord`.

        Args:
            turn: its number, where a session is written anew; by default the one after the newest.
            forgotten: what was forgotten of it before: ranges as in `TurnRecord.forgotten`.

        Raises:
            ConfigError: `metadata` is not JSON, `turn` is not above the newest, or `forgotten` are no ranges in order.
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

    def newest_commit(self) -> tuple[int, int] | None:
        """The tokens [start, end) of the newest commit; None once anything but a text of theirs was written after it.

        So these alone may never have been read: whoever commits reads before anything else is written.
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

    @property
    def first_block(self) -> int:
        """Segments begin with this block: 0, unless older ones were dropped."""
        ...

    def begin_with(self, block: int) -> None:
        """Let segments begin with this block. Raises ConfigError if there is one already."""
        ...

    def add_segment(self, manifest: SegmentManifest) -> None:
        """Add a segment; harmless if it is the newest already.

        Raises:
            ConfigError: its blocks do not follow those of the segment before.
        """
        ...

    def merge_segments(self, manifest: SegmentManifest) -> list[str]:
        """Let one segment stand for all that hold its blocks; their names. Harmless if it does already: no names.

        Raises:
            ConfigError: they hold other blocks too, or are not there.
        """
        ...

    def segments(self) -> list[SegmentManifest]:
        """In order of their blocks, from `first_block` on, without a gap."""
        ...

    def drop_before(self, block: int) -> list[str]:
        """Forget segments that hold only blocks < block, and snapshots that need one of these blocks; their names."""
        ...

    @property
    def indexed_through(self) -> int:
        """Blocks [0, indexed_through) are in the index."""
        ...

    @property
    def index_seal(self) -> str:
        """Hash of the index's files as they were when the mark was set last; "" where there were none."""
        ...

    def set_indexed_through(self, blocks: int, *, seal: str) -> None:
        """Set the mark and the hash of the index's files, both or neither.

        Raises:
            ConfigError: the mark is past the blocks in segments.
        """
        ...

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

        A segment that straddles `position` goes as a whole. Where older ones were dropped and no snapshot is left to
        go on from, all go, and segments begin with block 0 again. Files are the caller's: those that no record names
        are orphans.
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

    def drop_rolled_back(self) -> None:
        """Leave out for good what rollbacks took back, if anything was. What stands is not changed.

        Of turns that hold nothing only the newest is kept, without its source and metadata.
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

    async def search_text(self, query: str, k: int, *, first_block: int = 0) -> list[IndexHit]:
        """BM25, best first; of the hits, equal scores newest first. Any characters are allowed; no words, no hits.

        Only blocks >= first_block are found.
        """
        ...

    async def search_landmarks(self, layer: int, vector: NDArray[np.float32], k: int) -> list[IndexHit]:
        """The k largest inner products with the landmarks of a memory layer, exact, best first."""
        ...

    async def count(self, first_block: int = 0) -> int:
        """Rows of blocks >= first_block."""
        ...

    async def rows(self, start_block: int, end_block: int) -> pyarrow.Table:
        """Blocks [start_block, end_block) by number; columns block, start, end, text, created_at, innovation, digest,
        landmark_0 .. landmark_{L-1}."""
        ...

    async def drop_from(self, block: int) -> None:
        """Drop the rows of blocks >= block."""
        ...

    async def drop_before(self, block: int) -> None:
        """Drop the rows of blocks < block."""
        ...

    async def compact(self) -> None:
        """Merge fragments, bring the text index up to date, drop old versions. Changes no answer."""
        ...

    async def fragments(self) -> int: ...

    async def close(self) -> None: ...
