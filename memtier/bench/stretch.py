"""A session of a million tokens without reading them: what the model would have handed over is random numbers.

Everything else is the real thing: tokens are committed step by step, blocks are packed, indexed and merged by the
session's own updater, and snapshots stand where they would. So opening and copying it cost what they would cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from memtier.bench.demo import OnProgress
from memtier.blocks import MemoryBlock
from memtier.errors import ConfigError
from memtier.layers.landmarks import block_landmarks
from memtier.reader import STEP_TOKENS, Manner, Reader
from memtier.session import Session
from memtier.tiers.storage import StorageTier

__all__ = ["FIRST_TOKENS", "stretch"]

FIRST_TOKENS = 4 * STEP_TOKENS
"""At least so many must be read, so that windows are full; what is added is whole steps."""
TURN_TOKENS = 8 * STEP_TOKENS


async def stretch(session: Session, tokens: int, on_progress: OnProgress) -> None:
    """Lengthen a session that has read at least FIRST_TOKENS to `tokens`, by whole steps.

    Raises:
        ConfigError: these lengths are not whole steps apart, or a step is not whole blocks and refreshes.
    """
    settings, timeline, updater = session._storage.settings, session.timeline, session.updater
    sizes = (settings.span_block_tokens, settings.span_refresh_tokens)
    if timeline.position < FIRST_TOKENS or (tokens - timeline.position) % STEP_TOKENS or any(
        STEP_TOKENS % size for size in sizes
    ):  # fmt: skip
        raise ConfigError(
            f"a session of {timeline.position} tokens was to be lengthened to {tokens}; it must hold {FIRST_TOKENS} "
            f"and lack whole steps of {STEP_TOKENS}, which must be whole blocks and refreshes ({sizes})."
        )
    letters, numbers = np.random.default_rng(0), torch.Generator().manual_seed(0)
    manner = Manner(session._config.retrieval, settings.span_blocks)
    first, turn = timeline.position, 0
    async with session.exclusive(None):
        while timeline.position < tokens:
            await updater.ready()
            if (timeline.position - first) % TURN_TOKENS == 0:
                turn = await timeline.begin_turn("user", manner)
            ids = letters.integers(ord("a"), ord("z") + 1, STEP_TOKENS, dtype=np.int32)
            await timeline.history.commit(turn, ids, text=session._weights.codec.decode(ids))
            sealed = await session.model_thread.run(_move_on, timeline.reader, session._storage, numbers)
            updater.offer(sealed)
            if timeline.snapshot_due:
                await timeline.snapshot()
            on_progress("making", timeline.position, tokens)


def _move_on(reader: Reader, storage: StorageTier, numbers: torch.Generator) -> Sequence[int]:
    """What a step does to a session, but for reading: blocks are sealed, and the cache stands a step further on."""
    cache, settings = reader.cache, storage.settings
    assert cache is not None, "the session was caught up"
    cache.position += STEP_TOKENS
    cache.boundary += STEP_TOKENS
    first, size = storage.blocks, settings.span_block_tokens
    count = STEP_TOKENS // size
    for layer in storage.layers:
        keys, values = torch.randn(2, count, *storage.block_shape[1:], generator=numbers).to(storage.dtype)
        surprise = torch.rand(1, count, size, generator=numbers)
        landmarks = block_landmarks(keys[None].float(), surprise, settings.landmark_keys, settings.landmark_kind)[0]
        storage.append(layer, first, keys, values, landmarks)
    return storage.keep_innovation(
        [
            MemoryBlock(b, b * size, (b + 1) * size, (), (), (), torch.rand(size, generator=numbers))
            for b in range(first, first + count)
        ]
    )
