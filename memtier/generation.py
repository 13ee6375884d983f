"""Sampling and stopping: one token a step, text in whole characters.

A `Generation` is a plain object, not an async generator: nothing is held between two steps, so leaving a loop early, or
being cancelled, cannot keep a lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Protocol, cast

import anyio
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from memtier.arguments import real_number, whole_number
from memtier.errors import ConfigError
from memtier.reports import FinishReason
from memtier.text import IncrementalText, StopText, TextCodec, check_text
from memtier.threads import own_task, to_the_end
from memtier.turn_lock import TurnLock

__all__ = ["Generation", "Sampler", "TokenLine", "check_stop"]


class Sampler:
    """Chooses a token from logits, by transformers' own warpers.

    Args:
        temperature: 0 takes the most likely token.
        top_p: keep the most likely tokens up to this share of probability.
        top_k: keep this many; 0 keeps all.
        seed: of the random choice; None for a fresh one.

    Raises:
        ConfigError: a value out of its range.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int | None = None) -> None:
        temperature = real_number(
            "temperature", temperature, lambda number: number >= 0, "a number, 0 (most likely token) or more"
        )
        top_p = real_number("top_p", top_p, lambda number: 0 < number <= 1, "a number in (0, 1]")
        top_k = whole_number("top_k", top_k, lambda number: number >= 0, "a whole number, 0 (all tokens) or more")
        if seed is not None:
            seed = whole_number(
                "seed", seed, lambda number: -(2**63) <= number < 2**64,
                "a whole number from -2**63 to 2**64 - 1, or None for a fresh one",
            )  # fmt: skip
        self._greedy = temperature == 0.0
        self._warpers = LogitsProcessorList()
        if not self._greedy:
            self._warpers.append(TemperatureLogitsWarper(temperature))
            if top_k:
                self._warpers.append(TopKLogitsWarper(top_k))
            if top_p < 1.0:
                self._warpers.append(TopPLogitsWarper(top_p))
        self._random = torch.Generator()
        if seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """A token id from logits (V,). Runs on the model thread."""
        if self._greedy:
            return int(logits.argmax())
        # the warpers look at scores alone; the ids that other processors would want are not needed
        none_before = cast(torch.LongTensor, torch.empty((1, 0), dtype=torch.int64))
        scores = cast(torch.Tensor, self._warpers(none_before, cast(torch.FloatTensor, logits[None])))
        return int(torch.multinomial(scores.softmax(-1)[0], 1, generator=self._random))


class TokenLine(Protocol):
    """Where a generation's tokens come from: a session, or a copy of one."""

    async def next(self, sample: Callable[[torch.Tensor], int]) -> int | None:
        """One step; the sampled token, or None if another call on the session has ended this line."""
        ...

    async def end(self) -> None:
        """Acknowledge what was sampled. Harmless when ended already."""
        ...


def check_stop(stop: str | Sequence[str], codec: TextCodec) -> tuple[str, ...]:
    """Stop texts as a tuple.

    Raises:
        ConfigError: an empty one, one that is no text, or any for a model without a tokenizer.
    """
    if not isinstance(stop, Iterable):
        raise ConfigError(f"stop is {stop!r}; it must be a text or several; () for none.")
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ConfigError(f"stop holds {text!r}; each stop text must be a string of at least one character.")
        check_text(text, "stop")
    if texts and codec.tokenizer is None:
        raise ConfigError("stop texts need a tokenizer, and this model has none. Stop on token ids in your own loop.")
    return texts


class Generation:
    """An answer being written: an async iterator over pieces of text, each of whole characters.

    Without a tokenizer the pieces are token ids. Use it as ``async for piece in generation``; ``aclose()``, or ``async
    with``, ends it early, and so does any other call on its session.
    """

    def __init__(
        self, line: TokenLine, codec: TextCodec, sampler: Sampler, *, stop: Sequence[str], max_new_tokens: int,
        end_tokens: frozenset[int],
    ) -> None:  # fmt: skip
        self._line = line
        self._codec = codec
        self._sampler = sampler
        self._max_new_tokens = max_new_tokens
        self._end_tokens = end_tokens
        self._characters = IncrementalText(codec)
        self._stop = StopText(stop)
        self._shown: list[str] = []
        self._tokens: list[int] = []
        self._reason: FinishReason | None = None
        self._turns = TurnLock("this generation")

    @property
    def text(self) -> str:
        """What was handed out so far."""
        return "".join(self._shown)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Every token sampled so far, those of a held-back or stop text too."""
        return tuple(self._tokens)

    @property
    def finish_reason(self) -> FinishReason | None:
        """ "stop", "length", "closed" or "cancelled"; None while more may come."""
        return self._reason

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> str:
        """The next piece. Two tasks that ask at a time take turns.

        Raises:
            ModelError: the model refused a step; the session goes on without that token.
            StorageError: memory could not be read or written.
        """
        try:
            return await self._next()
        except anyio.get_cancelled_exc_class():
            await self._end("cancelled")
            raise

    def note_closed(self) -> None:
        """Its session ended it, for another call."""
        if self._reason is None:
            self._reason = "closed"

    async def aclose(self) -> None:
        """End it; what was sampled so far is part of the session."""
        await self._end("closed")

    async def __aenter__(self) -> Generation:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @own_task
    async def _next(self) -> str:
        async with self._turns:
            while self._reason is None:
                piece = await self._advance()
                if self._codec.tokenizer is None:
                    if piece is not None:
                        return piece
                elif piece:
                    self._shown.append(piece)
                    return piece
        raise StopAsyncIteration

    async def _advance(self) -> str | None:
        """One step, and the text it completes: '' for none; None if there was no step."""
        try:
            token = await self._line.next(self._sampler)
        except Exception:
            self._reason = "closed"
            raise
        if token is None:
            self._reason = "closed"
            return None
        self._tokens.append(token)
        ended = token in self._end_tokens
        if self._codec.tokenizer is None:
            piece = cast(str, token)
        else:
            # a token that ends the text is no part of it
            piece = "" if ended else self._stop.push(self._characters.push(token))
        if ended or self._stop.found:
            await self._end("stop")
        elif len(self._tokens) >= self._max_new_tokens:
            await self._end("length")
        else:
            return piece
        return piece + self._stop.rest() if self._codec.tokenizer is not None else piece

    @to_the_end
    async def _end(self, reason: FinishReason) -> None:
        if self._reason is None:
            self._reason = reason
            await self._line.end()
