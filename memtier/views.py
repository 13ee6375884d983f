"""What a session shows of itself: reports and contents, read between two steps without holding the session."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pyarrow as pa
import torch

from memtier.cache import TieredCache
from memtier.errors import ConfigError, SessionError
from memtier.recall import turn_at
from memtier.reports import BlockContent, ContextReport, EideticToken, MemoryReport, StorageReport
from memtier.text import TextCodec
from memtier.threads import WorkerThread
from memtier.tiers.context import context_view, last_selection
from memtier.tiers.state import state_report
from memtier.tiers.storage import StorageTier
from memtier.tiers.weights import WeightsTier
from memtier.timeline import Timeline
from memtier.updater import Updater

__all__ = ["Views"]

BATCH_BLOCKS = 64


class Views:
    """The readable side of one session.

    Args:
        name: its id.
        weights, timeline, storage, updater: its parts.
        model: the model thread: what is on the device is looked at between two steps.
        io: reads files.
        journal: the journal thread.
    """

    def __init__(
        self, name: str, weights: WeightsTier, timeline: Timeline, storage: StorageTier, updater: Updater, *,
        model: WorkerThread, io: WorkerThread, journal: WorkerThread,
    ) -> None:  # fmt: skip
        self._name = name
        self._weights = weights
        self._codec: TextCodec = weights.codec
        self._timeline = timeline
        self._storage = storage
        self._updater = updater
        self._model = model
        self._io = io
        self._journal = journal

    async def report(self) -> MemoryReport:
        """The four tiers as they stand."""
        position = self._timeline.position
        state, context, selection, mass = await self._model.run(self._look)
        window = await self._timeline.tokens(context.window_start, context.window_end)
        letters = {p: await self._token_text(p) for kept in context.eidetic.values() for p, _ in kept}
        blocks, size = self._storage.blocks, self._storage.settings.span_block_tokens
        return MemoryReport(
            session=self._name,
            position=position,
            weights=self._weights.report(),
            state=state,
            context=ContextReport(
                window_start=context.window_start,
                window_end=context.window_end,
                window_text=self._codec.decode(window),
                eidetic={
                    layer: tuple(EideticToken(position=p, text=letters[p], innovation=e) for p, e in kept)
                    for layer, kept in context.eidetic.items()
                },
            ),
            storage=StorageReport(
                blocks=blocks,
                dropped_blocks=self.dropped_blocks,
                tokens=blocks * size,
                bytes_on_disk=self._storage.segment_bytes + await self._journal_bytes(),
                pending_blocks=self._updater.pending,
                lag_tokens=(blocks - self._updater.indexed) * size,
                last_selection=selection,
            ),
            attention_mass=mass,
        )

    @property
    def dropped_blocks(self) -> int:
        """Blocks that are not given any more."""
        size = self._storage.settings.span_block_tokens
        return min(self._storage.blocks, self._timeline.retained_from // size)

    async def state(self, layer: int) -> dict[str, torch.Tensor]:
        """Copies of all that a layer carries on the device, by name.

        Raises:
            ConfigError: there is no such layer.
        """
        layers = self._weights.config.num_hidden_layers
        if not 0 <= layer < layers:
            raise ConfigError(f"layer is {layer}; this model has layers 0 to {layers - 1}.")
        return await self._model.run(lambda: self._cache().layer_state(layer))

    async def block(self, block: int) -> BlockContent:
        """One block of long-term memory.

        Raises:
            SessionError: there is no such block, or it was dropped.
        """
        if 0 <= block < self.dropped_blocks:
            raise SessionError(
                f"block {block} was dropped, as blocks before {self.dropped_blocks} were (MemoryConfig.retain_tokens, "
                f"retain_bytes, retain_seconds). Its text is in history()."
            )
        on_disk = block < self._storage.durable_blocks
        kv, landmarks, innovation = await self._io.run(self._storage.read_block, block)
        size = self._storage.settings.span_block_tokens
        start, end = block * size, (block + 1) * size
        tokens = await self._timeline.tokens(start, end)
        turn = turn_at(await self._timeline.history.turns(start, end), start)
        arrays = [tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).numpy() for tensor in kv]
        arrays = [array.copy() for array in arrays]
        for array in (*arrays, *landmarks, innovation):
            array.setflags(write=False)
        return BlockContent(
            block_id=block,
            start=start,
            end=end,
            text=self._codec.decode(tokens),
            role="" if turn is None else turn.role,
            source=None if turn is None else turn.source,
            metadata={} if turn is None else turn.metadata,
            created_at=0.0 if turn is None else turn.created_at,
            on_disk=on_disk,
            keys=tuple(array[0] for array in arrays),
            values=tuple(array[1] for array in arrays),
            landmarks=tuple(landmarks),
            innovation=innovation,
        )

    def blocks(self, start: int, end: int | None) -> pa.RecordBatchReader:
        """Blocks that hold tokens of [start, end), read as the reader is advanced, on the thread that advances it.

        Raises:
            ConfigError: a range that ends before it begins.
        """
        end = self._timeline.position if end is None else end
        if not 0 <= start <= end:
            raise ConfigError(f"tokens [{start}, {end}) were asked for; give 0 <= start <= end.")
        size = self._storage.settings.span_block_tokens
        first, last = max(start // size, self.dropped_blocks), min(self._storage.blocks, -(-end // size))
        schema = _schema(len(self._storage.layers))
        return pa.RecordBatchReader.from_batches(schema, self._batches(schema, first, last))

    def _batches(self, schema: pa.Schema, first: int, last: int) -> Iterator[pa.RecordBatch]:
        size = self._storage.settings.span_block_tokens
        for low in range(first, last, BATCH_BLOCKS):
            high = min(low + BATCH_BLOCKS, last)
            tokens, turns = self._journal.wait_for(self._rows_of, low * size, high * size)
            rows = []
            for block in range(low, high):
                _, landmarks, innovation = self._storage.read_block(block, with_kv=False)
                turn = turn_at(turns, block * size)
                at = (block - low) * size
                rows.append(
                    {
                        "block": block,
                        "start": block * size,
                        "end": (block + 1) * size,
                        "text": self._codec.decode(tokens[at : at + size]),
                        "tokens": tokens[at : at + size].tolist(),
                        "role": "" if turn is None else turn.role,
                        "source": None if turn is None else turn.source,
                        "metadata": json.dumps({} if turn is None else turn.metadata),
                        "created_at": 0.0 if turn is None else turn.created_at,
                        "on_disk": block < self._storage.durable_blocks,
                        "innovation": innovation.tolist(),
                        **{f"landmark_{i}": row.tolist() for i, row in enumerate(landmarks)},
                    }
                )
            yield pa.RecordBatch.from_pylist(rows, schema=schema)

    def _rows_of(self, start: int, end: int) -> tuple:
        journal = self._timeline.history.journal
        return journal.tokens(start, end), journal.turns(start, end)

    def _look(self) -> tuple:
        cache = self._cache()
        return state_report(cache), context_view(cache), last_selection(cache), cache.attention_mass()

    def _cache(self) -> TieredCache:
        cache = self._timeline.reader.cache
        if cache is None:
            raise SessionError(
                f"session {self._name!r} has nothing on the device since its last step failed. Call session.observe or "
                f"session.generate: what the journal holds is read again first."
            )
        return cache

    async def _token_text(self, position: int) -> str:
        return self._codec.decode(await self._timeline.tokens(position, position + 1))

    async def _journal_bytes(self) -> int:
        return await self._timeline.history.call(lambda: self._timeline.history.journal.bytes_on_disk)


def _schema(memory_layers: int) -> pa.Schema:
    fields: list[tuple[str, pa.DataType]] = [
        ("block", pa.int64()), ("start", pa.int64()), ("end", pa.int64()), ("text", pa.string()),
        ("tokens", pa.list_(pa.int32())), ("role", pa.string()), ("source", pa.string()), ("metadata", pa.string()),
        ("created_at", pa.float64()), ("on_disk", pa.bool_()), ("innovation", pa.list_(pa.float32())),
    ]  # fmt: skip
    return pa.schema(fields + [(f"landmark_{i}", pa.list_(pa.float32())) for i in range(memory_layers)])
