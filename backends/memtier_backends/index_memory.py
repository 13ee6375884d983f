"""An index in memory: for tests, and as the plain statement of what a search must find."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from memtier.errors import StorageError
from memtier_backends.index_schema import check_rows, check_vector, rows_schema, rows_table
from memtier_backends.records import IndexHit, IndexRow

__all__ = ["MemoryIndexAdapter"]

# BM25 as Robertson and Zaragoza give it, "The Probabilistic Relevance Framework" (2009), section 3.4.
_K1 = 1.2
_B = 0.75


class MemoryIndexAdapter:
    """MemoryIndex in a dict; BM25 computed in full at each search, landmarks scored in full.

    Args:
        layers: landmark size of each memory layer.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = tuple(layers)
        self._rows: dict[int, IndexRow] = {}
        self._words: dict[int, Counter[str]] = {}
        self._closed = False

    async def add(self, rows: Sequence[IndexRow]) -> None:
        self._check_open()
        check_rows(rows, self._layers)
        for row in rows:
            if row.block not in self._rows:
                self._rows[row.block] = row
                self._words[row.block] = Counter(_words(row.text))

    async def search_text(self, query: str, k: int, *, first_block: int = 0) -> list[IndexHit]:
        self._check_open()
        n = len(self._rows)
        if not n:
            return []
        mean_length = sum(words.total() for words in self._words.values()) / n
        scores: defaultdict[int, float] = defaultdict(float)
        for word in set(_words(query)):
            holding = [block for block, words in self._words.items() if word in words]
            weight = math.log(1 + (n - len(holding) + 0.5) / (len(holding) + 0.5))
            for block in holding:
                words = self._words[block]
                count, length = words[word], words.total() / mean_length
                scores[block] += weight * count * (_K1 + 1) / (count + _K1 * (1 - _B + _B * length))
        return self._best({block: score for block, score in scores.items() if block >= first_block}, k)

    async def search_landmarks(self, layer: int, vector: NDArray[np.float32], k: int) -> list[IndexHit]:
        self._check_open()
        check_vector(layer, vector, self._layers)
        return self._best({block: float(row.landmarks[layer] @ vector) for block, row in self._rows.items()}, k)

    async def count(self, first_block: int = 0) -> int:
        self._check_open()
        return sum(block >= first_block for block in self._rows)

    async def rows(self, start_block: int, end_block: int) -> pa.Table:
        self._check_open()
        chosen = [self._rows[block] for block in sorted(self._rows) if start_block <= block < end_block]
        return rows_table(chosen, rows_schema(self._layers))

    async def drop_from(self, block: int) -> None:
        self._check_open()
        self._drop([b for b in self._rows if b >= block])

    async def drop_before(self, block: int) -> None:
        self._check_open()
        self._drop([b for b in self._rows if b < block])

    async def compact(self) -> None:
        """Nothing to merge in a dict."""
        self._check_open()

    async def fragments(self) -> int:
        self._check_open()
        return 1 if self._rows else 0

    async def close(self) -> None:
        self._closed = True

    def _drop(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            del self._rows[block], self._words[block]

    def _check_open(self) -> None:
        if self._closed:
            raise StorageError("the index in memory is closed; make another.")

    def _best(self, scores: Mapping[int, float], k: int) -> list[IndexHit]:
        best = sorted(scores.items(), key=lambda item: (-item[1], -item[0]))[: max(k, 0)]
        return [self._hit(self._rows[block], score) for block, score in best]

    def _hit(self, row: IndexRow, score: float) -> IndexHit:
        return IndexHit(row.block, row.start, row.end, row.text, score, row.created_at)


def _words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case and without accents."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
    return "".join(c if c.isalnum() else " " for c in plain).split()
