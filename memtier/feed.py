"""Input cut into steps: pieces joined while short, cut while long, the end of a piece always the end of a step."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memtier.errors import ConfigError
from memtier.reader import STEP_TOKENS
from memtier.text import Piece, TextCodec, as_pieces
from memtier.threads import WorkerThread

__all__ = ["Feed", "Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """Tokens to commit and read at once; `text` is that of the whole pieces which end with them."""

    tokens: NDArray[np.int32]
    text: str | None


class Feed:
    """What one call was given, in steps of at most STEP_TOKENS.

    Args:
        x: text, UTF-8 bytes, token ids, or an (async) iterator of these.
        codec: encodes text.
        thread: where encoding runs.
        max_tokens: more than so many are refused.

    `role` is who says it, where it becomes a turn of its own.
    """

    role = "user"

    def __init__(self, x: Any, codec: TextCodec, thread: WorkerThread, *, max_tokens: int) -> None:
        self._source = as_pieces(x)
        self._streams = isinstance(self._source, AsyncGenerator)
        self._waits = hasattr(x, "__aiter__")
        self._codec = codec
        self._thread = thread
        self._max_tokens = max_tokens
        self._whole: Piece | None = None
        self.tokens = 0
        self.text_bytes = 0

    @property
    def known_tokens(self) -> int | None:
        """Tokens of the whole input; None for an iterator."""
        return None if self._whole is None else self._whole.tokens.size

    async def open(self) -> None:
        """Check and encode input that is there as a whole: what is wrong with it is told before anything is written.

        Raises:
            ConfigError: empty, invalid, or too long.
        """
        if self._streams:
            return
        self._whole = await self._encode(self._source)
        if not self._whole.tokens.size:
            raise ConfigError("the input is empty; give text or token ids of at least one token.")
        if self._whole.tokens.size > self._max_tokens:
            raise ConfigError(
                f"the input has {self._whole.tokens.size} tokens, and max_turn_tokens is {self._max_tokens}. Nothing "
                f"was written. Split it into several calls, or open with a larger MemoryConfig(max_turn_tokens=...)."
            )

    async def steps(self, *, at_start: bool) -> AsyncGenerator[Step]:
        """The input in steps; if the session is empty (`at_start`) a text has BOS before it.

        Raises:
            ConfigError: a piece is invalid, or one too many; the steps before stand.
        """
        held: list[Piece] = []
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                if at_start:
                    piece = self._with_bos(piece)
                    at_start = False
                    self._whole = None if self._whole is None else piece
                self._count(piece)
                joined = sum(p.tokens.size for p in held) + piece.tokens.size
                alike = not held or (held[0].text is None) == (piece.text is None)
                if held and (joined > STEP_TOKENS or not alike):
                    yield _join(held)
                    held = []
                rest = (piece.tokens.size - 1) % STEP_TOKENS + 1
                for start in range(0, piece.tokens.size - rest, STEP_TOKENS):
                    yield Step(piece.tokens[start : start + STEP_TOKENS], None)
                held.append(replace(piece, tokens=piece.tokens[-rest:]))
                if self._waits:
                    # what an async iterator gave is read before it is asked for more, which may take long
                    yield _join(held)
                    held = []
        if held:
            yield _join(held)

    def _with_bos(self, piece: Piece) -> Piece:
        if piece.text is None or piece.framed or self._codec.bos_token_id is None:
            return piece
        return replace(piece, tokens=np.concatenate([np.array([self._codec.bos_token_id], np.int32), piece.tokens]))

    async def _pieces(self) -> AsyncGenerator[Piece]:
        if self._whole is not None:
            yield self._whole
            return
        async with aclosing(self._source) as values:
            async for value in values:
                piece = await self._encode(value)
                if piece.tokens.size:
                    yield piece

    async def _encode(self, value: Any) -> Piece:
        return await self._thread.run(self._codec.piece, value)

    def _count(self, piece: Piece) -> None:
        self.tokens += piece.tokens.size
        if self.tokens > self._max_tokens + 1:
            raise ConfigError(
                f"the input has more than max_turn_tokens ({self._max_tokens}) tokens. What came before is remembered; "
                f"give the rest in another call, or open with a larger MemoryConfig(max_turn_tokens=...)."
            )
        self.text_bytes += piece.text_bytes


def _join(pieces: list[Piece]) -> Step:
    texts = [piece.text for piece in pieces if piece.text is not None]
    return Step(np.concatenate([piece.tokens for piece in pieces]), "".join(texts) if texts else None)
