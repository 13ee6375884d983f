"""The device pool: K and V of retrieved blocks in fixed slots on the device, which attention reads through a table.

Made once a runtime and shared by its sessions, so it is constant memory whatever is read. A slot holds the bits that
the storage tier holds; what a model sees does not depend on the pool, its size, or whether there is one.

All of it runs on the model thread; only the counters are read from elsewhere.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from memtier.blocks import MemorySettings
from memtier.errors import ConfigError

__all__ = ["DevicePool", "PoolKey"]

log = logging.getLogger("memtier")

PoolKey = tuple[int, int, int]
"""Owner, layer, block."""

AUTO_SHARE, AUTO_LIMIT = 1 / 8, 2 * 2**30
"""What `device_pool_bytes=None` takes on a GPU: a share of what is free once the model is there, and no more than."""

STAGED_BLOCKS = 64
"""Blocks that pass through pinned host memory at a time."""


class DevicePool:
    """Slots for blocks, the least recently used given away first.

    Args:
        slots: how many.
        block: (S, G, D) of the keys of one block.
        dtype: of the storage tier.
        device: where.
    """

    def __init__(self, slots: int, block: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.slots = slots
        # zeros, since attention multiplies a missing block, which reads slot 0, by a weight of zero
        self.keys = torch.zeros(slots, *block, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self._upload = _Upload(min(slots, STAGED_BLOCKS), self.keys) if device.type == "cuda" else None
        self.nbytes = 2 * self.keys.nbytes + (0 if self._upload is None else self._upload.device_bytes)
        self.hits = self.misses = self.refusals = 0
        self._slot_of: OrderedDict[PoolKey, int] = OrderedDict()
        self._vacant = list(range(slots))[::-1]
        self._owners = 0
        self._step = 0
        self._step_of_slot = [0] * slots
        self._held_by_step = 0

    @classmethod
    def make(
        cls, wanted_bytes: int | None, settings: MemorySettings, kv_heads: int, head_dim: int, device: torch.device,
        *, step_tokens: int,
    ) -> DevicePool | None:  # fmt: skip
        """The pool that `device_pool_bytes` asks for, or None.

        Args:
            wanted_bytes: None chooses: none on a CPU, whose attention reads host memory anyway.
            settings: sizes.
            kv_heads, head_dim: of the model.
            device: where.
            step_tokens: the longest step.

        Raises:
            ConfigError: no block fits into so few bytes, or the device has not that much.
        """
        dtype: torch.dtype = getattr(torch, settings.storage_dtype)
        block = (settings.span_block_tokens, kv_heads, head_dim)
        block_bytes = 2 * block[0] * block[1] * block[2] * dtype.itemsize
        chosen = wanted_bytes
        if chosen is None:
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
            chosen = min(int(free * AUTO_SHARE), AUTO_LIMIT)
        if not settings.memory_layers or chosen == 0 or (wanted_bytes is None and chosen < block_bytes):
            return None
        if chosen < block_bytes:
            raise ConfigError(
                f"device_pool_bytes is {chosen}; one block of this model takes {block_bytes}. Give at least that, "
                f"better many times as much, or 0 for no pool."
            )
        slots = chosen // block_bytes
        groups = -(-step_tokens // settings.span_refresh_tokens) + 1
        most = len(settings.memory_layers) * groups * settings.span_blocks
        if slots < most:
            log.info(
                "the device pool holds %d blocks; a step of %d tokens may retrieve %d. Steps that need more than there "
                "are slots copy their blocks: slower, and the same numbers. device_pool_bytes=%d holds them all.",
                slots, step_tokens, most, most * block_bytes,
            )  # fmt: skip
        try:
            return cls(slots, block, dtype, device)
        except RuntimeError as error:
            raise ConfigError(
                f"device_pool_bytes is {chosen}, and {device} cannot give that much: {error}. "
                f"Give fewer bytes, or 0 for no pool."
            ) from error

    @property
    def blocks(self) -> int:
        """Slots in use."""
        return len(self._slot_of)

    @property
    def hit_rate(self) -> float | None:
        """Share of the blocks asked for that were here; None before the first."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None

    def new_owner(self) -> int:
        """A number that no other line of tokens has, nor ever had."""
        self._owners += 1
        return self._owners

    def begin_step(self) -> None:
        """What the last step held may be given away."""
        self._step += 1
        self._held_by_step = 0

    def place(
        self, wanted: Sequence[PoolKey], load: Callable[[Sequence[PoolKey]], Sequence[torch.Tensor]]
    ) -> list[int] | None:
        """The slot of each block, which stay theirs until the next step begins; what is missing is copied in.

        Args:
            wanted: keys, none twice.
            load: K and V (2, S, G, D) of blocks on the host. If it raises, nothing has changed.

        Returns:
            Slots, or None if this step would hold more blocks than there are.
        """
        missing = [key for key in wanted if key not in self._slot_of]
        found = [key for key in wanted if key in self._slot_of]
        newly = sum(self._step_of_slot[self._slot_of[key]] != self._step for key in found)
        if self._held_by_step + newly + len(missing) > self.slots:
            self.refusals += 1
            return None
        blocks = load(missing) if missing else ()
        for key in found:
            self._slot_of.move_to_end(key)
            self._step_of_slot[self._slot_of[key]] = self._step
        slots = [self._vacant.pop() if self._vacant else self._slot_of.popitem(last=False)[1] for _ in missing]
        try:
            if missing:
                self._fill(slots, blocks)
        except BaseException:
            self._vacant += slots
            raise
        for key, slot in zip(missing, slots, strict=True):
            self._slot_of[key] = slot
            self._step_of_slot[slot] = self._step
        self._held_by_step += newly + len(missing)
        self.hits += len(found)
        self.misses += len(missing)
        return [self._slot_of[key] for key in wanted]

    def free(self, owner: int, first_block: int = 0) -> None:
        """Let go of an owner's blocks from `first_block` on."""
        for key in [key for key in self._slot_of if key[0] == owner and key[2] >= first_block]:
            self._vacant.append(self._slot_of.pop(key))

    def close(self) -> None:
        """Give the memory back."""
        self._slot_of.clear()
        self._vacant.clear()
        self.slots = self.nbytes = 0
        self.keys = self.values = torch.empty(0)
        self._upload = None

    def _fill(self, slots: Sequence[int], blocks: Sequence[torch.Tensor]) -> None:
        if self._upload is not None:
            self._upload.run(slots, blocks, self.keys, self.values)
            return
        for slot, block in zip(slots, blocks, strict=True):
            self.keys[slot].copy_(block[0])
            self.values[slot].copy_(block[1])


class _Upload:
    """Copies blocks to a CUDA device through pinned memory, on a stream of its own. Not measured on a GPU.

    The compute stream waits for an event, the host for nothing but the pinned buffer of the last copy.
    """

    def __init__(self, count: int, like: torch.Tensor) -> None:
        shape = (count, 2, *like.shape[1:])
        self._pinned = torch.empty(shape, dtype=like.dtype, pin_memory=True)
        self._landing = torch.empty(shape, dtype=like.dtype, device=like.device)
        self._pinned_slots = torch.empty(count, dtype=torch.int64, pin_memory=True)
        self._landing_slots = torch.empty(count, dtype=torch.int64, device=like.device)
        self._stream = torch.cuda.Stream(like.device)
        self._done = torch.cuda.Event()
        self.device_bytes = self._landing.nbytes + self._landing_slots.nbytes

    def run(
        self, slots: Sequence[int], blocks: Sequence[torch.Tensor], keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """keys[slots], values[slots] = blocks."""
        compute = torch.cuda.current_stream(keys.device)
        # attention of an earlier step may still read the slots that are given away
        self._stream.wait_stream(compute)
        for first in range(0, len(slots), self._pinned.shape[0]):
            part = blocks[first : first + self._pinned.shape[0]]
            count = len(part)
            self._done.synchronize()
            self._pinned_slots[:count] = torch.tensor(slots[first : first + count])
            for i, block in enumerate(part):
                self._pinned[i].copy_(block)
            with torch.cuda.stream(self._stream):
                at = self._landing_slots[:count].copy_(self._pinned_slots[:count], non_blocking=True)
                landed = self._landing[:count].copy_(self._pinned[:count], non_blocking=True)
                keys.index_copy_(0, at, landed[:, 0])
                values.index_copy_(0, at, landed[:, 1])
                self._done.record(self._stream)
        compute.wait_event(self._done)
