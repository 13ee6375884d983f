"""Storage that is slow, fails, or dies: wrappers of a journal, a segment store and an index that share one `Faults`."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
from numpy.typing import NDArray

from memtier.errors import StorageError
from memtier_backends.base import Journal, MemoryIndex, SegmentStore
from memtier_backends.records import IndexHit, IndexRow, SegmentManifest, SnapshotRecord, TurnRecord

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Faults", "FaultyIndex", "FaultyJournal", "FaultySegmentStore"]


@dataclass(slots=True)
class Faults:
    """What goes wrong, and a log of what was called. One object is shared by all wrappers, so that writes are counted
    in the order in which the whole store saw them; its fields may be changed between calls.

    Args:
        latency_seconds: every chosen call takes this much longer.
        fail_times: the next n chosen writes raise, then all is well again.
        fail_always: every chosen write raises.
        kill_at: the process kills itself (SIGKILL) just before the n-th write, counted from 1.
        operations: the chosen calls, such as {"segments.put", "index.add"}; None: all of them.
        error: what a failing write raises.
    """

    latency_seconds: float = 0.0
    fail_times: int = 0
    fail_always: bool = False
    kill_at: int | None = None
    operations: frozenset[str] | None = None
    error: type[StorageError] = StorageError
    calls: list[str] = field(default_factory=list)
    writes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def strike(self, operation: str, *, write: bool) -> None:
        """Log a call, then wait, raise or die as configured."""
        delay = self._delay(operation)
        if delay:
            time.sleep(delay)
        self._break(operation, write)

    async def strike_async(self, operation: str, *, write: bool) -> None:
        """As `strike`, without stopping the event loop."""
        delay = self._delay(operation)
        if delay:
            await anyio.sleep(delay)
        self._break(operation, write)

    def _delay(self, operation: str) -> float:
        with self._lock:
            self.calls.append(operation)
        return self.latency_seconds if self._chosen(operation) else 0.0

    def _break(self, operation: str, write: bool) -> None:
        if not write:
            return
        with self._lock:
            self.writes += 1
            if self.writes == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if not self._chosen(operation) or not (self.fail_always or self.fail_times > 0):
                return
            self.fail_times = max(0, self.fail_times - 1)
        raise self.error(f"{operation} was made to fail (write {self.writes}). Clear the fault and call again.")

    def _chosen(self, operation: str) -> bool:
        return self.operations is None or operation in self.operations


class FaultyJournal:
    """A Journal with faults; operations are named "journal.commit" and so on."""

    def __init__(self, inner: Journal, faults: Faults) -> None:
        self.inner = inner
        self.faults = faults

    @property
    def position(self) -> int:
        return self.inner.position

    @property
    def bytes_on_disk(self) -> int:
        return self.inner.bytes_on_disk

    @property
    def indexed_through(self) -> int:
        return self.inner.indexed_through

    def get_meta(self, key: str) -> Any:
        self._read("get_meta")
        return self.inner.get_meta(key)

    def set_meta(self, key: str, value: Any) -> None:
        self._write("set_meta")
        self.inner.set_meta(key, value)

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
        self._write("begin_turn")
        return self.inner.begin_turn(
            role=role,
            source=source,
            metadata=metadata,
            created_at=created_at,
            retrieval=retrieval,
            span_blocks=span_blocks,
            retained_from=retained_from,
            turn=turn,
            forgotten=forgotten,
        )

    def commit(
        self, turn: int, tokens: NDArray[np.integer] | Sequence[int], *, text: str | None = None, mark: bool = False
    ) -> int:
        self._write("commit")
        return self.inner.commit(turn, tokens, text=text, mark=mark)

    def rollback(self, position: int, reason: str) -> None:
        self._write("rollback")
        self.inner.rollback(position, reason)

    def newest_commit(self) -> tuple[int, int] | None:
        self._read("newest_commit")
        return self.inner.newest_commit()

    def tokens(self, start: int, end: int) -> NDArray[np.int32]:
        self._read("tokens")
        return self.inner.tokens(start, end)

    def turns(self, start: int = 0, end: int | None = None) -> list[TurnRecord]:
        self._read("turns")
        return self.inner.turns(start, end)

    def marks(self, start: int, end: int) -> list[int]:
        self._read("marks")
        return self.inner.marks(start, end)

    def add_segment(self, manifest: SegmentManifest) -> None:
        self._write("add_segment")
        self.inner.add_segment(manifest)

    @property
    def first_block(self) -> int:
        return self.inner.first_block

    def begin_with(self, block: int) -> None:
        self._write("begin_with")
        self.inner.begin_with(block)

    def merge_segments(self, manifest: SegmentManifest) -> list[str]:
        self._write("merge_segments")
        return self.inner.merge_segments(manifest)

    def segments(self) -> list[SegmentManifest]:
        self._read("segments")
        return self.inner.segments()

    def drop_before(self, block: int) -> list[str]:
        self._write("drop_before")
        return self.inner.drop_before(block)

    @property
    def index_seal(self) -> str:
        return self.inner.index_seal

    def set_indexed_through(self, blocks: int, *, seal: str) -> None:
        self._write("set_indexed_through")
        self.inner.set_indexed_through(blocks, seal=seal)

    def add_snapshot(self, record: SnapshotRecord) -> None:
        self._write("add_snapshot")
        self.inner.add_snapshot(record)

    def snapshots(self) -> list[SnapshotRecord]:
        self._read("snapshots")
        return self.inner.snapshots()

    def drop_snapshot(self, name: str) -> None:
        self._write("drop_snapshot")
        self.inner.drop_snapshot(name)

    def drop_after(self, position: int) -> None:
        self._write("drop_after")
        self.inner.drop_after(position)

    def forget(
        self, start: int, end: int, *, scrub: Collection[int] = (), derived_to: int, meta: Mapping[str, Any]
    ) -> None:
        self._write("forget")
        self.inner.forget(start, end, scrub=scrub, derived_to=derived_to, meta=meta)

    def drop_rolled_back(self) -> None:
        self._write("drop_rolled_back")
        self.inner.drop_rolled_back()

    def copy_to(self, path: Path) -> None:
        self._write("copy_to")
        self.inner.copy_to(path)

    def replace_with(self, path: Path) -> None:
        self._write("replace_with")
        self.inner.replace_with(path)

    def verify(self) -> None:
        self._read("verify")
        self.inner.verify()

    def checkpoint(self) -> None:
        self._write("checkpoint")
        self.inner.checkpoint()

    def close(self) -> None:
        self._read("close")
        self.inner.close()

    def _read(self, name: str) -> None:
        self.faults.strike(f"journal.{name}", write=False)

    def _write(self, name: str) -> None:
        self.faults.strike(f"journal.{name}", write=True)


class FaultySegmentStore:
    """A SegmentStore with faults; operations are named "<name>.put" and so on, by default "segments.put"."""

    def __init__(self, inner: SegmentStore, faults: Faults, name: str = "segments") -> None:
        self.inner = inner
        self.faults = faults
        self.name = name

    def put(self, name: str, data: bytes | memoryview) -> None:
        self.faults.strike(f"{self.name}.put", write=True)
        self.inner.put(name, data)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        self.faults.strike(f"{self.name}.get", write=False)
        return self.inner.get(name, offset, length)

    def list(self) -> list[str]:
        self.faults.strike(f"{self.name}.list", write=False)
        return self.inner.list()

    def delete(self, name: str) -> None:
        self.faults.strike(f"{self.name}.delete", write=True)
        self.inner.delete(name)

    def size(self, name: str) -> int:
        self.faults.strike(f"{self.name}.size", write=False)
        return self.inner.size(name)

    def clean(self) -> list[str]:
        self.faults.strike(f"{self.name}.clean", write=True)
        return self.inner.clean()


class FaultyIndex:
    """A MemoryIndex with faults; operations are named "index.add" and so on."""

    def __init__(self, inner: MemoryIndex, faults: Faults) -> None:
        self.inner = inner
        self.faults = faults

    async def add(self, rows: Sequence[IndexRow]) -> None:
        await self.faults.strike_async("index.add", write=True)
        await self.inner.add(rows)

    async def search_text(self, query: str, k: int, *, first_block: int = 0) -> list[IndexHit]:
        await self.faults.strike_async("index.search_text", write=False)
        return await self.inner.search_text(query, k, first_block=first_block)

    async def search_landmarks(self, layer: int, vector: NDArray[np.float32], k: int) -> list[IndexHit]:
        await self.faults.strike_async("index.search_landmarks", write=False)
        return await self.inner.search_landmarks(layer, vector, k)

    async def count(self, first_block: int = 0) -> int:
        await self.faults.strike_async("index.count", write=False)
        return await self.inner.count(first_block)

    async def rows(self, start_block: int, end_block: int) -> pyarrow.Table:
        await self.faults.strike_async("index.rows", write=False)
        return await self.inner.rows(start_block, end_block)

    async def drop_from(self, block: int) -> None:
        await self.faults.strike_async("index.drop_from", write=True)
        await self.inner.drop_from(block)

    async def drop_before(self, block: int) -> None:
        await self.faults.strike_async("index.drop_before", write=True)
        await self.inner.drop_before(block)

    async def compact(self) -> None:
        await self.faults.strike_async("index.compact", write=True)
        await self.inner.compact()

    async def fragments(self) -> int:
        await self.faults.strike_async("index.fragments", write=False)
        return await self.inner.fragments()

    async def close(self) -> None:
        await self.faults.strike_async("index.close", write=False)
        await self.inner.close()
