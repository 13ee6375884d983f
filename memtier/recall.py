"""Finding passages by words: the index for what is sealed, the journal for the newest tokens, one ranking for both.

BM25 scores of two collections do not compare, so the index proposes candidates, and these and the passages of the
newest tokens are ranked together as one small collection. A hit's text is decoded from the journal, never taken from a
table.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from memtier.arguments import whole_number
from memtier.blocks import MemoryHit
from memtier.errors import ConfigError
from memtier.text import TextCodec, check_text
from memtier.timeline import Timeline
from memtier_backends.base import MemoryIndex
from memtier_backends.index_memory import MemoryIndexAdapter
from memtier_backends.records import IndexRow, TurnRecord

__all__ = ["find", "turn_at"]

CANDIDATES_A_HIT = 8
"""Neighbouring blocks hold the same words, and are merged into one hit."""
NEARLY_AS_GOOD = 0.7


@dataclass(slots=True)
class _Passage:
    start: int
    end: int
    score: float
    block: int


async def find(
    query: str,
    k: int,
    *,
    timeline: Timeline,
    index: MemoryIndex,
    codec: TextCodec,
    block_tokens: int,
    sealed_blocks: int,
    retained_from: int,
    edition: str,
) -> list[MemoryHit]:
    """The k best passages, best first, equal scores newest first.

    Args:
        query: words to look for.
        k: hits wanted.
        timeline: the session's tokens.
        index: what is sealed.
        codec: decodes.
        block_tokens: S.
        sealed_blocks: blocks in the index; what follows them is read from the journal.
        retained_from: blocks that end at or before this token were dropped, and are not found.
        edition: of the session; each hit carries it.

    Raises:
        ConfigError: an empty query, k below 1, or a model without a tokenizer.
    """
    if not isinstance(query, str) or not query.strip():
        raise ConfigError(f"recall was asked for {query!r}; give some words to look for.")
    check_text(query, "the query")
    k = whole_number("k", k, lambda number: number >= 1, "a whole number of at least 1")
    if codec.tokenizer is None:
        raise ConfigError("recall looks for text, and this model has no tokenizer. Pass tokenizer= to memtier.open.")
    end = timeline.position
    # no more hits than blocks; an index takes no number of any size
    k = min(k, end // block_tokens + 1)
    oldest = retained_from // block_tokens
    begin = min(oldest * block_tokens, end)
    rows: dict[int, IndexRow] = {}
    for hit in await index.search_text(query, k * CANDIDATES_A_HIT, first_block=oldest):
        text = hit.text
        if hit.block == oldest > 0:
            # a row's text reaches into the blocks beside it, of which one was dropped
            text = codec.decode(await timeline.tokens(begin, min(begin + 2 * block_tokens, end)))
        rows[hit.block] = IndexRow(hit.block, hit.start, hit.end, text, hit.created_at, None, ())
    first = max(sealed_blocks * block_tokens, begin)
    origin = max(begin, first - block_tokens)
    newest = await timeline.tokens(origin, end)
    for start in range(first, end, block_tokens):
        text = codec.decode(newest[max(0, start - block_tokens - origin) : start + 2 * block_tokens - origin])
        rows[start // block_tokens] = IndexRow(
            start // block_tokens, start, min(start + block_tokens, end), text, 0.0, None, ()
        )
    ranked = MemoryIndexAdapter([])
    await ranked.add([rows[block] for block in sorted(rows)])
    passages = _merged(
        [
            _Passage(max(begin, hit.start - block_tokens), min(end, hit.end + block_tokens), hit.score, hit.block)
            for hit in await ranked.search_text(query, len(rows))
        ]
    )[:k]
    return [
        replace(await _hit(passage, timeline, codec, sealed_blocks, block_tokens), edition=edition)
        for passage in passages
    ]


def turn_at(turns: list[TurnRecord], position: int) -> TurnRecord | None:
    """The turn that holds a position; None if none does."""
    at = bisect_right(turns, position, key=lambda turn: turn.start) - 1
    return turns[at] if at >= 0 and position < turns[at].end else None


def _merged(passages: list[_Passage]) -> list[_Passage]:
    """Best first; a passage that overlaps a better one lengthens it if it is nearly as good, else it goes."""
    merged: list[_Passage] = []
    for passage in passages:
        better = next((m for m in merged if passage.start < m.end and m.start < passage.end), None)
        if better is None:
            merged.append(passage)
        elif passage.score >= NEARLY_AS_GOOD * better.score:
            better.start, better.end = min(better.start, passage.start), max(better.end, passage.end)
    return merged


async def _hit(passage: _Passage, timeline: Timeline, codec: TextCodec, sealed: int, block_tokens: int) -> MemoryHit:
    tokens: NDArray[np.int32] = await timeline.tokens(passage.start, passage.end)
    inside = min(passage.block * block_tokens, timeline.history.position - 1)
    turns = await timeline.history.turns(inside, inside + 1) if inside >= 0 else []
    turn = turn_at(turns, inside)
    return MemoryHit(
        text=codec.decode(tokens),
        start=passage.start,
        end=passage.end,
        score=passage.score,
        block_id=passage.block,
        tier="storage" if passage.block < sealed else "context",
        created_at=0.0 if turn is None else turn.created_at,
        role="" if turn is None else turn.role,
        source=None if turn is None else turn.source,
        metadata={} if turn is None else turn.metadata,
    )
