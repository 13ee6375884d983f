"""Landmarks of one memory layer: the newest in host memory, within a budget; older ones read back from their segments.

Scoring asks for all of them, always, so what is chosen does not depend on the budget. Landmarks of blocks that are not
on disk stay in memory whatever the budget says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch

from memtier.tiers.retry import retry_reads
from memtier_backends.base import SegmentStore
from memtier_backends.records import SegmentManifest
from memtier_backends.segments import read_landmarks

__all__ = ["LandmarkTable"]

OnDisk = Callable[[int, Callable[[SegmentManifest], torch.Tensor]], torch.Tensor]
Held = tuple[int, torch.Tensor]

PIECE_BLOCKS = 4096
"""Landmarks read from disk are scored so many at a time, and take no more memory than that."""


class LandmarkTable:
    """A growable (n, C) float32 table of which the rows [base, count) are in memory. Those before may be gone.

    Args:
        layer: ordinal of the memory layer.
        size: C.
        limit_bytes: rows kept in memory, in bytes; None keeps all.
        store: where the segments lie.
    """

    def __init__(self, layer: int, size: int, limit_bytes: int | None, store: SegmentStore) -> None:
        self._layer = layer
        self.size = size
        self._store = store
        self._limit = None if limit_bytes is None else limit_bytes // (4 * size)
        self._rows = torch.empty(0, size, dtype=torch.float32)
        self.base = 0
        self.count = 0

    @property
    def nbytes(self) -> int:
        """Bytes of host memory taken."""
        return self._rows.numel() * 4

    def load(self, manifests: Sequence[SegmentManifest], count: int, known: Held | None = None) -> None:
        """Take what is on disk: the newest rows into memory, as many as the budget allows.

        Args:
            manifests: of all segments.
            count: blocks that there were, the last of them in the last segment.
            known: what a table of the very same rows holds, to be taken over instead.
        """
        self.base = self.count = count
        self._rows = self._rows[:0].clone()
        if known is not None and known[0] + known[1].shape[0] == count:
            self.base, self._rows = known
            return
        newest: list[torch.Tensor] = []
        for manifest in reversed(manifests):
            if self._limit is not None and self.count - manifest.first_block > self._limit:
                break
            newest.append(retry_reads(partial(self._read, manifest)))
            self.base = manifest.first_block
        if newest:
            self._rows = torch.cat(newest[::-1])

    def held(self) -> Held:
        """A copy of what is in memory. Runs on the model thread."""
        return self.base, self.in_memory(self.base, self.count)

    def append(self, rows: torch.Tensor, durable_blocks: int, first_block: int) -> None:
        """Take (n, C) rows of the next blocks, and let go of the oldest that are on disk if the budget is spent.

        Those before `first_block` are not asked for any more.
        """
        held = self.count - self.base
        need = held + rows.shape[0]
        if need > self._rows.shape[0]:
            grown = torch.empty(max(need, 2 * held, 64), self._rows.shape[1], dtype=torch.float32)
            grown[:held] = self._rows[:held]
            self._rows = grown
        self._rows[held:need] = rows
        self.count += rows.shape[0]
        # a quarter more than needed goes, so that rows are not moved at every step
        base = first_block if first_block - self.base > need // 4 else self.base
        if self._limit is not None and need > self._limit:
            base = max(base, min(durable_blocks, self.count - 3 * self._limit // 4))
        if base > self.base:
            self._rows = self._rows[base - self.base : need].clone()
            self.base = base

    def truncate(self, count: int) -> None:
        """Forget rows >= count. None of them may be on disk."""
        self.count = max(self.base, min(self.count, count))

    def in_memory(self, start: int, end: int) -> torch.Tensor:
        """A copy of the rows [start, end), all of which are in memory."""
        return self._rows[start - self.base : end - self.base].clone()

    def pieces(self, first: int, upto: int, on_disk: OnDisk) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows [first, upto) as (first block, (n, C)) pieces in order; views, not to be kept.

        Args:
            on_disk: calls a function with the manifest of the segment that holds a block.

        Raises:
            CorruptMemoryError: a segment is damaged.
        """
        end = min(self.base, upto)
        held: list[torch.Tensor] = []
        at = first
        while at < end:
            rows = on_disk(at, self._rows_from(at))[: end - at]
            held.append(rows)
            at += rows.shape[0]
            if at - first >= PIECE_BLOCKS or at == end:
                yield first, torch.cat(held)
                held, first = [], at
        if upto > max(self.base, first):
            begin = max(self.base, first)
            yield begin, self._rows[begin - self.base : upto - self.base]

    def row(self, block: int) -> np.ndarray | None:
        """A copy of the landmark of one block, (C,) float32; None if it is not in memory."""
        return self._rows[block - self.base].numpy().copy() if block >= self.base else None

    def row_on_disk(self, block: int, on_disk: OnDisk) -> np.ndarray:
        """The landmark of one block of a segment, (C,) float32."""
        return on_disk(block, self._rows_from(block))[0].numpy()

    def _rows_from(self, block: int) -> Callable[[SegmentManifest], torch.Tensor]:
        return lambda manifest: self._read(manifest)[block - manifest.first_block :]

    def _read(self, manifest: SegmentManifest) -> torch.Tensor:
        return torch.from_numpy(np.array(read_landmarks(self._store, manifest, self._layer)))
