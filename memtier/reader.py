"""The device side of a session: a cache, the last logits, one step at a time. All of it runs on the model thread."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from memtier.blocks import MemorySettings, RetrievalMode
from memtier.cache import TieredCache
from memtier.errors import CorruptMemoryError
from memtier.retriever import OverlaySelector, StorageSelector
from memtier.tiers.device_pool import DevicePool
from memtier.tiers.state import pack_snapshot, unpack_snapshot
from memtier.tiers.storage import StorageTier
from memtier.tiers.weights import WeightsTier

__all__ = ["STEP_TOKENS", "Manner", "Reader", "StepResult"]

STEP_TOKENS = 512
"""The longest step: what one session may keep the model thread busy with."""


_NUMBERS = itertools.count()


@dataclass(frozen=True, slots=True)
class Manner:
    """How tokens are read: the choices of a turn that change outputs, and which its journal therefore keeps.

    Args:
        retrieval: how blocks are chosen.
        span_blocks: how many at a time.
        retained_from: blocks that end at or before this token are not chosen any more.
    """

    retrieval: RetrievalMode
    span_blocks: int
    retained_from: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave.

    Args:
        sealed: blocks that now wait for the disk.
        nats: summed surprise of the tokens that were predicted, `predicted` of them.
        logits: (T, V), if they were asked for.
    """

    sealed: Sequence[int]
    nats: float = 0.0
    predicted: int = 0
    logits: torch.Tensor | None = None

    def followed_by(self, other: StepResult) -> StepResult:
        """Two steps, told as one."""
        logits = None if self.logits is None or other.logits is None else torch.cat([self.logits, other.logits])
        sealed = [*self.sealed, *other.sealed]
        return StepResult(sealed, self.nats + other.nats, self.predicted + other.predicted, logits)


class Reader:
    """Reads tokens into a cache.

    `cache` is None once a step failed: what the device held is then unknown, and is made again from the journal.
    `number` is no other reader's.

    Args:
        weights: the model.
        settings: memory sizes.
        storage: where blocks go.
        pool: blocks on the device; None if there is no pool.
    """

    def __init__(
        self, weights: WeightsTier, settings: MemorySettings, storage: StorageTier, pool: DevicePool | None = None
    ) -> None:
        self._weights = weights
        self._settings = settings
        self._storage = storage
        self._pool = pool
        self._selector = StorageSelector(storage, pool=pool)
        self.number = next(_NUMBERS)
        self.cache: TieredCache | None = None
        self.logits: torch.Tensor | None = None

    @property
    def weights(self) -> WeightsTier:
        """The model that it reads with, and the adapter."""
        return self._weights

    @property
    def position(self) -> int:
        """Tokens read."""
        return 0 if self.cache is None else self.cache.position

    def begin(self) -> None:
        """An empty cache, at position 0."""
        self.logits = None
        self._selector.first_block = 0
        self.cache = TieredCache(
            self._weights.config, settings=self._settings, selector=self._selector, device=self._weights.device,
            dtype=self._weights.dtype,
        )  # fmt: skip

    def restore(self, data: bytes, name: str, digest: str, position: int, first_block: int = 0) -> None:
        """Begin from a snapshot of a position. `first_block`: the oldest block that may still be retrieved there.

        Raises:
            CorruptMemoryError: it is damaged, or of another position.
            IncompatibleMemoryError: it is of another model or dtype.
        """
        self.begin()
        assert self.cache is not None
        try:
            self.logits = unpack_snapshot(data, name, digest, position, self.cache)
            if self.cache.sealed_blocks > self._storage.blocks:
                raise CorruptMemoryError(
                    f"snapshot {name} needs {self.cache.sealed_blocks} blocks, and {self._storage.blocks} are stored."
                )
        except BaseException:
            self.drop()
            raise
        self._selector.first_block = first_block

    def drop(self) -> None:
        """Let go of what the device holds."""
        self.cache = self.logits = None
        self._selector.release()

    def step(
        self, tokens: NDArray[np.int32] | Sequence[int], manner: Manner, *, marks: Collection[int] = (),
        score: bool = False, keep_logits: bool = False,
    ) -> StepResult:  # fmt: skip
        """Read at most STEP_TOKENS tokens.

        Args:
            tokens: (T,) ids.
            manner: how to retrieve.
            marks: positions among these tokens at which the span is chosen anew.
            score: measure how well the tokens were predicted.
            keep_logits: return all logits.

        Raises:
            ModelError: the model refused; the cache is dropped, and blocks sealed in this step are forgotten.
            StorageError: a retrieved block could not be read; likewise.
        """
        if self._pool is not None:
            self._pool.begin_step()
        cache = self.cache
        assert cache is not None, "a dropped reader must be restored before it reads"
        blocks_before = self._storage.blocks
        self._selector.mode = manner.retrieval
        self._drop_old(manner)
        cache.settings = replace(self._settings, span_blocks=manner.span_blocks)
        ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64))
        try:
            for mark in marks:
                cache.mark(mark)
            logits = self._weights.step(ids, cache, 0 if score or keep_logits else 1)
            sealed = self._take_sealed(cache)
        except BaseException:
            self.drop()
            self._forget_blocks(blocks_before)
            raise
        nats, predicted = self._surprise(ids, logits) if score else (0.0, 0)
        self.logits = logits[-1].clone()
        return StepResult(sealed, nats, predicted, logits if keep_logits else None)

    def plain_settings(self, manner: Manner) -> MemorySettings | None:
        """The sizes under which the next token is read, if that may happen in a batch: nothing is chosen at it."""
        cache = self.cache
        if cache is None:
            return None
        self._drop_old(manner)
        if cache.settings.span_blocks != manner.span_blocks:
            cache.settings = replace(self._settings, span_blocks=manner.span_blocks)
        return None if cache.chooses_next else cache.settings

    def settle(self) -> None:
        """Take what is carried out of a batch, into memory of its own."""
        if self.cache is not None:
            self.cache.settle()

    def snapshot(self) -> tuple[bytes, int]:
        """All that is carried, as bytes, and the oldest block that whoever goes on from there may need."""
        assert self.cache is not None, "there is nothing to take a snapshot of"
        carried = [block for selection in self.cache.last_selection() for block in selection.block_ids]
        return pack_snapshot(self.cache, self.logits), min([self._selector.first_block, *carried])

    def aside(self) -> Reader:
        """A copy that reads on without leaving a trace: its blocks stay its own."""
        assert self.cache is not None, "a dropped reader must be restored before it is copied"
        return _Aside(self)

    def _drop_old(self, manner: Manner) -> None:
        self._selector.first_block = manner.retained_from // self._settings.span_block_tokens

    def _take_sealed(self, cache: TieredCache) -> Sequence[int]:
        return self._storage.keep_innovation(cache.take_sealed())

    def _forget_blocks(self, blocks_before: int) -> None:
        self._storage.truncate(blocks_before)

    def _surprise(self, ids: torch.Tensor, logits: torch.Tensor) -> tuple[float, int]:
        """Nats of each token under the logits of the token before, summed, and how many were predicted."""
        before = logits[:-1] if self.logits is None else torch.cat([self.logits[None], logits[:-1]])
        told = ids[ids.numel() - before.shape[0] :]
        nats = torch.nn.functional.cross_entropy(before, told, reduction="none").double().sum()
        return float(nats), before.shape[0]


class _Aside(Reader):
    """See `Reader.aside`."""

    def __init__(self, original: Reader) -> None:
        super().__init__(original._weights, original._settings, original._storage, original._pool)
        assert original.cache is not None
        self._selector = OverlaySelector(original._selector)
        self.cache = original.cache.clone(self._selector)
        self.logits = None if original.logits is None else original.logits.clone()

    def _take_sealed(self, cache: TieredCache) -> Sequence[int]:
        cache.take_sealed()
        return ()

    def _forget_blocks(self, blocks_before: int) -> None:
        """Nothing of this reader is in the tier."""
