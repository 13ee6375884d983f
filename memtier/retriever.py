"""What a memory layer retrieves: the SpanSelector over the storage tier, in four modes.

    on       the k blocks whose landmarks answer the boundary's query best, and the newest where nothing is sought
             (`memtier.layers.landmarks`)
    recent   the k newest sealed blocks                     a control: does retrieval beat a longer window?
    random   the k blocks of highest hash(layer, boundary, block)   a control: does the choice matter?
    off      none

Blocks before `first_block` were dropped (`memtier.retention`) and are not among them.

Every landmark of a session is scored, exactly, at every boundary; those beyond the host's budget are read back from
their segments and scored in pieces. An index of candidates is not asked: the query of a boundary exists only inside
the forward pass, so candidates fetched before it would depend on where calls were split. So no choice depends on an
index, a cache, the split of calls, or what is on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from memtier.blocks import RetrievalMode
from memtier.layers.landmarks import candidates, extend_window, recent_blocks, settle
from memtier.tiers.device_pool import DevicePool, PoolKey
from memtier.tiers.storage import StorageTier

__all__ = ["OverlaySelector", "StorageSelector", "random_blocks"]


class StorageSelector:
    """The selector of a session: what it reads is appended to the storage tier, and chosen from it.

    Args:
        storage: the session's storage tier.
        mode: how blocks are chosen; may be set between two steps.
        pool: of the runtime, for blocks on the device; None if there is none.
    """

    def __init__(self, storage: StorageTier, mode: RetrievalMode = "on", pool: DevicePool | None = None) -> None:
        self.storage = storage
        self.mode: RetrievalMode = mode
        self.first_block = 0
        self.pool = pool
        self.owner = 0 if pool is None else pool.new_owner()

    def append(
        self, layer: int, first_block: int, keys: torch.Tensor, values: torch.Tensor, landmarks: torch.Tensor
    ) -> None:
        """See `SpanSelector.append`."""
        self.storage.append(layer, first_block, _one(keys).cpu(), _one(values).cpu(), _one(landmarks).cpu())

    def select(
        self, layer: int, queries: torch.Tensor, boundaries: torch.Tensor, visible: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SpanSelector.select`. Scores are inner products, hashes (random) or zeros (recent)."""
        rows = boundaries.numel()
        ids = torch.full((1, rows, k), -1, dtype=torch.int64)
        scores = torch.full((1, rows, k), float("-inf"), dtype=torch.float32)
        if rows and k and self.mode != "off" and int(visible.max()) > self.first_block:
            if self.mode == "on":
                ids, scores = self._best(layer, queries.to("cpu", torch.float32), visible, k)
            elif self.mode == "recent":
                ids, scores = recent_blocks(visible, k, self.first_block)
            else:
                ids, scores = random_blocks(layer, boundaries, visible, k, self.first_block)
        return ids, scores

    def fetch(self, layer: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SpanSelector.fetch`."""
        wanted = _one(ids)
        unique, place = torch.unique(wanted, return_inverse=True)
        blocks = unique.tolist()
        zeros = torch.zeros(self.storage.block_shape, dtype=self.storage.dtype)
        found = iter(self._tensors(layer, [block for block in blocks if block >= 0]))
        stacked = torch.stack([zeros if block < 0 else next(found) for block in blocks])
        both = stacked[place]
        return both[None, :, 0], both[None, :, 1]

    def resident(self, layer: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """See `SpanSelector.resident`."""
        if self.pool is None:
            return None
        unique, place = torch.unique(_one(ids), return_inverse=True)
        blocks = [block for block in unique.tolist() if block >= 0]
        slots = self.pool.place(
            [(self._owner_of(block), layer, block) for block in blocks], lambda missing: self._load(layer, missing)
        )
        if slots is None:
            return None
        keys, values = self.pool.keys[None], self.pool.values[None]
        none = [-1] * (unique.numel() - len(blocks))
        return keys, values, torch.tensor(none + slots)[place][None].to(keys.device, non_blocking=True)

    def release(self, first_block: int = 0) -> None:
        """Let go of what the pool holds for this selector, from a block on. Runs on the model thread."""
        if self.pool is not None:
            self.pool.free(self.owner, first_block)

    def _best(
        self, layer: int, queries: torch.Tensor, visible: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        best: tuple[torch.Tensor, torch.Tensor] | None = None
        for first, rows in self._pieces(layer, self.first_block, int(visible.max())):
            ids, scores = candidates(queries, rows[None], (visible - first).clamp(min=0), k)
            ids = torch.where(ids < 0, ids, ids + first)
            best = (ids, scores) if best is None else _better(best, (ids, scores), ids.shape[-1])
        assert best is not None, "select was called with nothing visible"
        share = self.storage.settings.recency_share
        return extend_window(*settle(queries, *best, k), visible, share, oldest=self.first_block)

    def _pieces(self, layer: int, first: int, upto: int) -> Iterator[tuple[int, torch.Tensor]]:
        return self.storage.pieces(layer, first, upto)

    def _tensors(self, layer: int, blocks: Sequence[int]) -> list[torch.Tensor]:
        return self.storage.fetch(layer, blocks)

    def _load(self, layer: int, missing: Sequence[PoolKey]) -> list[torch.Tensor]:
        return self._tensors(layer, [block for _, _, block in missing])

    def _owner_of(self, block: int) -> int:
        """Whose block it is, as the pool knows it."""
        return self.owner


class OverlaySelector(StorageSelector):
    """A selector that sees a session's blocks and keeps its own to itself: for answers that are not remembered.

    Args:
        base: the session's selector, whose tier must not grow while this one is in use.
    """

    def __init__(self, base: StorageSelector) -> None:
        super().__init__(base.storage, base.mode, base.pool)
        self.first_block = base.first_block
        self._base_owner = base.owner
        self._own_first = base.storage.blocks
        self._tensors_of: dict[int, list[torch.Tensor]] = {layer: [] for layer in base.storage.layers}
        self._landmarks: dict[int, list[torch.Tensor]] = {layer: [] for layer in base.storage.layers}

    def append(
        self, layer: int, first_block: int, keys: torch.Tensor, values: torch.Tensor, landmarks: torch.Tensor
    ) -> None:
        """See `SpanSelector.append`. Blocks that the session has already stay: after a forget its tier may hold some
        that its cache has yet to seal again.
        """
        own = self._tensors_of[layer]
        skip = self._own_first + len(own) - first_block
        assert skip >= 0, f"block {first_block} follows {first_block + skip} blocks"
        pairs = zip(_one(keys)[skip:].cpu(), _one(values)[skip:].cpu(), strict=True)
        own += [torch.stack(pair) for pair in pairs]
        self._landmarks[layer] += [row.clone() for row in _one(landmarks)[skip:].cpu()]

    def _pieces(self, layer: int, first: int, upto: int) -> Iterator[tuple[int, torch.Tensor]]:
        mine = self._own_first
        if first < mine:
            yield from self.storage.pieces(layer, first, min(upto, mine))
        if upto > mine:
            begin = max(first, mine)
            yield begin, torch.stack(self._landmarks[layer][begin - mine : upto - mine])

    def _tensors(self, layer: int, blocks: Sequence[int]) -> list[torch.Tensor]:
        below = [block for block in blocks if block < self._own_first]
        own = [self._tensors_of[layer][block - self._own_first] for block in blocks if block >= self._own_first]
        return self.storage.fetch(layer, below, counted=False) + own

    def _owner_of(self, block: int) -> int:
        return self._base_owner if block < self._own_first else self.owner


def _one(batched: torch.Tensor) -> torch.Tensor:
    assert batched.shape[0] == 1, "a session is a batch of one"
    return batched[0]


def random_blocks(
    layer: int, boundaries: torch.Tensor, visible: torch.Tensor, k: int, oldest: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest hashes a boundary; of layer, boundary and block alone, so nothing else moves it."""
    blocks = np.arange(oldest, int(visible.max()), dtype=np.uint64)
    rows = []
    for boundary, seen in zip(boundaries.tolist(), visible.tolist(), strict=True):
        there = max(0, seen - oldest)
        hashes = _mix(blocks[:there] ^ _mix(np.uint64(boundary) ^ _mix(np.uint64(layer))))
        best = np.sort(np.argsort(hashes, kind="stable")[max(0, there - k) :])
        ids = np.full(k, -1)
        scores = np.full(k, -np.inf, np.float32)
        ids[: best.size] = best + oldest
        scores[: best.size] = (hashes[best] >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
        rows.append((ids, scores))
    return torch.from_numpy(np.stack([r[0] for r in rows]))[None], torch.from_numpy(np.stack([r[1] for r in rows]))[
        None
    ]


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """The finaliser of splitmix64: every bit of x moves half of the bits that come out."""
    x = np.atleast_1d(np.asarray(x, dtype=np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _better(
    one: tuple[torch.Tensor, torch.Tensor], two: tuple[torch.Tensor, torch.Tensor], k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of two choices (1, R, k), the second of newer blocks than the first; ties to the newer."""
    # newest first, so that a stable sort by score puts the newer of two equals first
    ids = torch.cat([two[0].flip(-1), one[0].flip(-1)], -1)
    scores = torch.cat([two[1].flip(-1), one[1].flip(-1)], -1)
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    ids, scores = ids.gather(-1, best), scores.gather(-1, best)
    # ascending by block; absent ones, whose score is -inf, last
    order = torch.where(ids < 0, torch.iinfo(torch.int64).max, ids).argsort(dim=-1)
    return ids.gather(-1, order), scores.gather(-1, order)
