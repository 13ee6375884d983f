"""Where what was forgotten is said again: told, and left where it is, for to quote is to say it oneself."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from memtier.recovery.holders import Range, joined

__all__ = ["quotations"]

QUOTED_TOKENS = 16
QUOTED_CHARACTERS = 24
"""So many tokens or characters of it in a row, or all of it where it is shorter, are a quotation."""
FEWEST = 3
"""Less than this, of a span that is shorter, is said by chance."""
STRETCH_TOKENS = 2048

Decode = Callable[[NDArray[np.int32]], str]


def quotations(ids: NDArray[np.int32], rest: NDArray[np.int32], decode: Decode | None) -> list[Range]:
    """Ranges of `rest` that repeat some of the tokens `ids`, or of their text, however it is cut into tokens.

    Args:
        decode: text of tokens; None without a tokenizer.
    """
    found = list(_repeated(ids.tobytes(), rest.tobytes(), QUOTED_TOKENS, unit=ids.itemsize))
    if decode is not None:
        found += _said_again(decode(ids).strip(), rest, decode)
    return joined(found)


def _repeated(said: bytes | str, rest: bytes | str, size: int, *, unit: int = 1) -> Iterator[Range]:
    """Where `size` units in a row, or all of `said`, stand in `rest`, in units."""
    length = len(said) // unit
    size = min(size, length)
    if size >= FEWEST:
        windows = {said[unit * at : unit * (at + size)] for at in range(length - size + 1)}
        for at in range(len(rest) // unit - size + 1):
            if rest[unit * at : unit * (at + size)] in windows:
                yield at, at + size


def _said_again(said: str, rest: NDArray[np.int32], decode: Decode) -> Iterator[Range]:
    """Ranges of tokens whose text repeats it. A stretch at a time, for a character's place is sought by decoding."""
    # a stretch reaches over the next one's beginning, so that a quotation between them is whole in one
    overlap = 2 * QUOTED_CHARACTERS
    for first in range(0, rest.size, STRETCH_TOKENS):
        tokens = rest[first : first + STRETCH_TOKENS + overlap]
        for start, end in joined(_repeated(said, decode(tokens), QUOTED_CHARACTERS)):
            lengths = _Lengths(tokens, decode)
            at = bisect_right(lengths, start) - 1
            yield first + at, first + bisect_right(lengths, end - 1)


class _Lengths:
    """Characters of the first n tokens, for n from 0 on, as a sequence to search in."""

    def __init__(self, tokens: NDArray[np.int32], decode: Decode) -> None:
        self._tokens = tokens
        self._decode = decode

    def __len__(self) -> int:
        return self._tokens.size + 1

    def __getitem__(self, n: int) -> int:
        return len(self._decode(self._tokens[:n])) if n else 0
