"""Retention: which old blocks a session still retrieves, by tokens, bytes and age.

What is dropped when a turn begins is journaled with the turn, and stays dropped: a replay repeats it, whatever the
config says by then. Segments of dropped blocks go with the next snapshot. The journal keeps the tokens: nothing is
erased. That is `Session.forget`.
"""

from __future__ import annotations

from memtier.config import MemoryConfig
from memtier.history import History

__all__ = ["Retention"]

PAGE_TOKENS = 4096


class Retention:
    """What a config drops.

    Args:
        config: its `retain_tokens`, `retain_bytes` and `retain_seconds`; the strictest counts.
        block_tokens: S.
        block_bytes: of one block in a segment, all layers.
    """

    def __init__(self, config: MemoryConfig, block_tokens: int, block_bytes: int) -> None:
        self._tokens = config.retain_tokens
        self._blocks = None if config.retain_bytes is None else config.retain_bytes // max(1, block_bytes)
        self._seconds = config.retain_seconds
        self._block_tokens = block_tokens
        self._oldest: tuple[int, float] | None = None  # a turn that was young enough: where it begins, and when it did

    async def retained_from(self, history: History, before: int, now: float) -> int:
        """The token from which on blocks are retrieved in a turn that begins now; blocks that end there are not.

        Args:
            history: the session's journal.
            before: the same of the turn before; never less than this is dropped.
            now: Unix time.
        """
        end, kept = history.position, before
        if self._tokens is not None:
            kept = max(kept, end - self._tokens)
        if self._blocks is not None:
            kept = max(kept, (end // self._block_tokens - self._blocks) * self._block_tokens)
        if self._seconds is not None:
            kept = max(kept, await self._said_since(history, kept, end, now - self._seconds))
        return kept

    async def _said_since(self, history: History, start: int, end: int, since: float) -> int:
        """Where the first turn begins, of those that hold a token of [start, end), that began no earlier than that."""
        if self._oldest is not None and self._oldest[1] >= since:
            return self._oldest[0]
        at = start
        while at < end:
            for turn in await history.turns(at, min(at + PAGE_TOKENS, end)):
                if turn.created_at >= since:
                    self._oldest = turn.start, turn.created_at
                    return turn.start
                at = turn.end
        return end
