"""The storage tier: every block that left the window, in host memory while hot or not yet on disk, else in segments.

The model thread appends, scores and fetches; the updater's threads pack blocks and report what is on disk. One lock
guards the tables; nothing is read from disk while it is held.

Tensors of a block and a layer are (2, S, G, D): keys, then values, in the storage dtype, in memory of their own.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from memtier.blocks import MemoryBlock, MemorySettings
from memtier.errors import CorruptMemoryError, IncompatibleMemoryError, SessionError
from memtier.tiers.landmarks import Held, LandmarkTable
from memtier.tiers.raw import NAMES, to_raw, to_tensor
from memtier.tiers.retry import retry_reads
from memtier_backends.base import SegmentStore
from memtier_backends.records import BlockPayload, SegmentManifest
from memtier_backends.segments import read_innovation, read_kv

__all__ = ["StorageTier"]

R = TypeVar("R")


class StorageTier:
    """Blocks of one session, by memory layer.

    Args:
        settings: sizes; `settings.memory_layers` are the layers of the model.
        kv_heads: G.
        head_dim: D.
        store: where the segments lie.
        hot_bytes: K/V of blocks on disk that may stay in memory too; None for all.
        landmark_bytes: landmarks in memory, all layers together; None for all.
    """

    def __init__(
        self, settings: MemorySettings, kv_heads: int, head_dim: int, store: SegmentStore, *,
        hot_bytes: int | None, landmark_bytes: int | None,
    ) -> None:  # fmt: skip
        self.settings = settings
        self.store = store
        self.layers = {layer: ordinal for ordinal, layer in enumerate(settings.memory_layers)}
        self.block_shape = (2, settings.span_block_tokens, kv_heads, head_dim)
        self.dtype: torch.dtype = getattr(torch, settings.storage_dtype)
        self._hot_limit = hot_bytes
        share = None if landmark_bytes is None else landmark_bytes // max(1, len(self.layers))
        # as stored and kept, a landmark is one row: its keys one after another
        self.channels, keys = kv_heads * head_dim, settings.landmark_keys
        bounds = 2 if settings.landmark_kind == "bounds" else 1
        self._landmark_shape = (bounds * self.channels,) if not keys else (keys, kv_heads, head_dim)
        size = self.channels * max(bounds, keys)
        self._landmarks = [LandmarkTable(i, size, share, store) for i in self.layers.values()]
        self._manifests: list[SegmentManifest] = []
        self._first_blocks: list[int] = []
        self._pinned: list[dict[int, torch.Tensor]] = [{} for _ in self.layers]
        self._hot: OrderedDict[tuple[int, int], torch.Tensor] = OrderedDict()
        self._block_bytes = int(np.prod(self.block_shape)) * self.dtype.itemsize
        self._innovation: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        self.first_block = 0  # segments begin with it: older blocks were dropped
        self.durable_blocks = 0
        self.blocks_from_hot = 0
        self.blocks_from_disk = 0

    # -- what it holds

    @property
    def blocks(self) -> int:
        """Blocks that every memory layer has; 0 without memory layers."""
        return min((table.count for table in self._landmarks), default=0)

    @property
    def pinned_bytes(self) -> int:
        """K/V in memory because it is not on disk yet."""
        return sum(map(len, self._pinned)) * self._block_bytes

    @property
    def hot_bytes(self) -> int:
        """K/V in memory, pinned or not."""
        return self.pinned_bytes + len(self._hot) * self._block_bytes

    @property
    def landmark_bytes(self) -> int:
        """Landmarks in memory."""
        return sum(table.nbytes for table in self._landmarks)

    @property
    def segment_bytes(self) -> int:
        """Bytes of the segment files."""
        with self._lock:
            return sum(manifest.size for manifest in self._manifests)

    def segments(self) -> Sequence[SegmentManifest]:
        """Manifests in order."""
        with self._lock:
            return tuple(self._manifests)

    # -- the model thread

    @property
    def bytes_a_block(self) -> int:
        """Of a block in a segment: K/V, landmarks, innovation."""
        landmarks = sum(table.size for table in self._landmarks)
        return len(self.layers) * self._block_bytes + 4 * (landmarks + self.settings.span_block_tokens)

    def landmarks_in_memory(self) -> list[Held]:
        """Copies of the landmarks that are in memory, a layer: for a session that begins with the same blocks."""
        return [table.held() for table in self._landmarks]

    def load(
        self, manifests: Sequence[SegmentManifest], first_block: int = 0, landmarks: Sequence[Held] | None = None
    ) -> None:
        """Begin with what is on disk, and nothing else.

        Args:
            manifests: of all segments.
            first_block: the segments begin with it.
            landmarks: see `landmarks_in_memory`; None to read them.

        Raises:
            IncompatibleMemoryError: blocks of another shape or dtype than this model's; names the segment and field.
            CorruptMemoryError: landmarks are damaged.
        """
        for manifest in manifests:
            self._check_form(manifest)
        with self._lock:
            self._set_manifests(list(manifests))
            self.first_block = first_block
            self.durable_blocks = manifests[-1].end_block if manifests else first_block
            self._pinned = [{} for _ in self.layers]
            self._innovation.clear()
            self._hot.clear()
        for table, known in zip(self._landmarks, landmarks or [None] * len(self._landmarks), strict=True):
            table.load(manifests, self.durable_blocks, known)

    def append(
        self, layer: int, first_block: int, keys: torch.Tensor, values: torch.Tensor, landmarks: torch.Tensor
    ) -> None:
        """Take blocks that a layer sealed: keys and values (n, S, G, D), landmarks (n, C) or (n, m, G, D). Known
        ones stay.

        A replay seals blocks again that are here already; their bits are those of the first time.
        """
        ordinal = self.layers[layer]
        table = self._landmarks[ordinal]
        skip = table.count - first_block
        assert skip >= 0, f"block {first_block} follows {table.count} blocks"
        if skip >= keys.shape[0]:
            return
        fresh = {first_block + i: torch.stack((keys[i], values[i])) for i in range(skip, keys.shape[0])}
        with self._lock:
            table.append(landmarks[skip:].flatten(1), self.durable_blocks, self.first_block)
            self._pinned[ordinal].update(fresh)
            self._shrink()

    def keep_innovation(self, blocks: Sequence[MemoryBlock]) -> list[int]:
        """Note the innovation of sealed blocks, and say which of them are not on disk yet."""
        new = [block for block in blocks if block.index >= self.durable_blocks and block.index not in self._innovation]
        with self._lock:
            self._innovation.update({block.index: block.innovation.to(torch.float32).numpy().copy() for block in new})
        return [block.index for block in new]

    def truncate(self, blocks: int) -> None:
        """Forget blocks >= `blocks`, which a step that failed had sealed; none of them may be on disk."""
        assert blocks >= self.durable_blocks, "a block on disk cannot be taken back"
        with self._lock:
            for table, pinned in zip(self._landmarks, self._pinned, strict=True):
                table.truncate(blocks)
                for block in [b for b in pinned if b >= blocks]:
                    del pinned[block]
            for block in [b for b in self._innovation if b >= blocks]:
                del self._innovation[block]

    def pieces(self, layer: int, first: int, upto: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Landmarks of blocks [first, upto) of a layer as (first block, (n, C) or (n, m, G, D)) pieces; views, not to
        be kept."""
        for at, rows in self._landmarks[self.layers[layer]].pieces(first, upto, self._on_disk):
            yield at, rows.unflatten(1, self._landmark_shape)

    def fetch(self, layer: int, ids: Sequence[int], *, counted: bool = True) -> list[torch.Tensor]:
        """K and V (2, S, G, D) of each block, not to be written to. Each id once.

        Raises:
            CorruptMemoryError: a segment is damaged.
            StorageError: it cannot be read.
        """
        ordinal = self.layers[layer]
        with self._lock:
            found = {block: self._in_memory(ordinal, block) for block in ids}
        missing = [block for block, tensor in found.items() if tensor is None]
        read = {block: self._read(ordinal, block) for block in missing}
        if counted:
            self.blocks_from_hot += len(found) - len(missing)
            self.blocks_from_disk += len(missing)
        with self._lock:
            self._hot.update({(ordinal, block): tensor for block, tensor in read.items()})
            self._shrink()
        return [tensor if (tensor := found[block]) is not None else read[block] for block in ids]

    # -- the updater

    def payloads(self, first: int, end: int) -> list[BlockPayload]:
        """Blocks [first, end), which are not on disk, for `pack_segment`."""
        size = self.settings.span_block_tokens
        with self._lock:
            rows = [table.in_memory(first, end).numpy() for table in self._landmarks]
            return [
                BlockPayload(
                    block=block,
                    start=block * size,
                    end=(block + 1) * size,
                    kv=tuple(to_raw(pinned[block]) for pinned in self._pinned),
                    landmarks=tuple(row[block - first] for row in rows),
                    innovation=self._innovation[block],
                )
                for block in range(first, end)
            ]

    def on_disk(self, manifest: SegmentManifest) -> None:
        """A segment and its manifest are safe: its blocks need not stay in memory."""
        with self._lock:
            self._set_manifests([*self._manifests, manifest])
            self.durable_blocks = manifest.end_block
            for block in range(manifest.first_block, manifest.end_block):
                self._innovation.pop(block, None)
                for ordinal, pinned in enumerate(self._pinned):
                    self._hot[ordinal, block] = pinned.pop(block)
            self._shrink()

    def merged(self, manifest: SegmentManifest) -> None:
        """A segment stands for those that held its blocks, whose files may go."""
        with self._lock:
            others = [m for m in self._manifests if not manifest.first_block <= m.first_block < manifest.end_block]
            self._set_manifests(sorted([*others, manifest], key=lambda m: m.first_block))

    def drop_before(self, first_block: int) -> None:
        """Segments of older blocks go: nothing asks for these blocks any more."""
        with self._lock:
            self._set_manifests([m for m in self._manifests if m.first_block >= first_block])
            self.first_block = first_block
            for key in [key for key in self._hot if key[1] < first_block]:
                del self._hot[key]

    # -- one block, to look at

    def read_block(
        self, block: int, *, with_kv: bool = True
    ) -> tuple[list[torch.Tensor], list[np.ndarray], np.ndarray]:
        """K/V a layer (none if not asked for), landmark a layer, and innovation of one block.

        Raises:
            SessionError: there is no such block.
        """
        if not self.first_block <= block < self.blocks:
            raise SessionError(
                f"block {block} is not in storage, which holds blocks {self.first_block} to {self.blocks - 1}. "
                f"The newest tokens are in the window: see inspect().context."
            )
        with self._lock:
            on_disk = block < self.durable_blocks
            innovation = self._innovation.get(block)
            rows = [table.row(block) for table in self._landmarks]
        kv = [self.fetch(layer, [block], counted=False)[0] for layer in self.layers] if with_kv else []
        if not on_disk:
            assert innovation is not None, f"block {block} is neither pending nor on disk"
            return kv, [row for row in rows if row is not None], innovation
        landmarks = [
            table.row_on_disk(block, self._on_disk) if row is None else row
            for table, row in zip(self._landmarks, rows, strict=True)
        ]
        innovation = self._on_disk(block, lambda m: read_innovation(self.store, m)[block - m.first_block])
        return kv, landmarks, np.array(innovation)

    # -- private

    def _check_form(self, manifest: SegmentManifest) -> None:
        size, dtype = self.settings.span_block_tokens, self.settings.storage_dtype
        fields = [
            ("layers", len(manifest.layers), len(self.layers)),
            ("tokens of a block", (manifest.end - manifest.start) / manifest.blocks, size),
            ("first token", manifest.start, manifest.first_block * size),
        ]
        for table, layout in zip(self._landmarks, manifest.layers, strict=False):
            fields += [
                ("shape of K and V", layout.shape, self.block_shape),
                ("dtype of K and V", layout.dtype, NAMES[self.dtype]),
                ("landmark size", layout.landmark_size, table.size),
            ]
        for field, stored, expected in fields:
            if stored != expected:
                raise IncompatibleMemoryError(
                    f"segment {manifest.name} was written with {field} {stored}, and {expected} is expected of this "
                    f"model with storage_dtype {dtype!r}. Open the session with the model and config that wrote it."
                )

    def _in_memory(self, ordinal: int, block: int) -> torch.Tensor | None:
        tensor = self._pinned[ordinal].get(block)
        if tensor is None and (tensor := self._hot.get((ordinal, block))) is not None:
            self._hot.move_to_end((ordinal, block))
        return tensor

    def _set_manifests(self, manifests: list[SegmentManifest]) -> None:
        self._manifests = manifests
        self._first_blocks = [manifest.first_block for manifest in manifests]

    def _manifest(self, block: int) -> SegmentManifest:
        with self._lock:
            there = self.first_block <= block < self.durable_blocks
            assert there, f"block {block} is neither in memory nor on disk, where blocks {self.first_block} to " + (
                f"{self.durable_blocks - 1} are"
            )
            return self._manifests[bisect_right(self._first_blocks, block) - 1]

    def _on_disk(self, block: int, read: Callable[[SegmentManifest], R]) -> R:
        """What `read` finds in the segment of a block."""
        while True:
            manifest = self._manifest(block)
            try:
                return retry_reads(partial(read, manifest))
            except CorruptMemoryError:
                # its segment may have been merged into another meanwhile, and its file be gone
                if self._manifest(block) is manifest:
                    raise

    def _read(self, ordinal: int, block: int) -> torch.Tensor:
        return to_tensor(self._on_disk(block, lambda manifest: read_kv(self.store, manifest, ordinal, block)))

    def _shrink(self) -> None:
        if self._hot_limit is None:
            return
        room = max(0, self._hot_limit - self.pinned_bytes) // self._block_bytes
        while len(self._hot) > room:
            self._hot.popitem(last=False)
