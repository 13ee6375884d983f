"""Training sequences of bytes: running text, text with copies, and facts told once and asked for later.

Every batch is a function of (seed, step, level, sequence_tokens) alone, so a resumed run reads what it would have read.

    B sequences     T tokens of a sequence; token 0 is always BOS
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from memtier.training.corpus import Corpus
from memtier.training.facts import Fact, FactSplit, draw_code, draw_name
from memtier.training.levels import LEVELS, Curriculum, Level
from memtier.training.tokenizer import BOS_ID

__all__ = ["ANSWER", "COPY", "FRAME", "IGNORED", "TEXT", "Batch", "TaskMixer", "fact_sequence"]

# What a token is, as a target.
IGNORED, TEXT, FRAME, ANSWER, COPY = range(5)

# Repeats that are told to be repeats only by their own first bytes: those bytes are no fair target.
_COPY_CUE_TOKENS = 6
# A session chooses its span anew at the end of a question. In training choices fall on multiples of this, so most
# questions are made to end there: it is the place where a landmark has something to learn.
BOUNDARY_TOKENS = 16
_ALIGNED = 0.75
_SEPARATORS = ("\n", "\n", " ", "\n\n")


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Sequences and what each of their tokens is.

    Args:
        tokens: (B, T) int64.
        kinds: (B, T) uint8, what the token is as a target: IGNORED, TEXT, FRAME (wording of a fact), ANSWER or COPY.
        distance: (B, T) int32, for ANSWER: tokens since the code was last seen; else 0.
        levels: (B,) int8, curriculum level of a sequence of facts; -1 for other sequences.
    """

    tokens: np.ndarray
    kinds: np.ndarray
    distance: np.ndarray
    levels: np.ndarray

    def loss_weights(self, *, answer_share: float = 0.5, copy_share: float = 0.15, most: float = 24.0) -> np.ndarray:
        """(B, T) float32: weight of predicting each token, text 1, so that answers and copies get a share of the loss.

        Args:
            answer_share, copy_share: of the summed weights; text and wording have the rest.
            most: no token weighs more than this.
        """
        counts = np.bincount(self.kinds.ravel(), minlength=5)
        base = counts[TEXT] + 0.5 * counts[FRAME]
        rest = 1.0 - answer_share - copy_share
        table = np.zeros(5, np.float32)
        table[TEXT], table[FRAME] = 1.0, 0.5
        for kind, share in ((ANSWER, answer_share), (COPY, copy_share)):
            wanted = share / rest * base / counts[kind] if counts[kind] else 0.0
            table[kind] = min(max(wanted, 0.5), most)
        return table[self.kinds]


@dataclass(frozen=True, slots=True)
class TaskMixer:
    """Makes the batches of a run.

    Args:
        corpus: book text.
        seed: of the whole run.
        fact_share, copy_share: of the sequences; the rest is running text.
        early_fact_share, early_copy_share: the same up to level `early_until`. Recall is learned several times sooner
            where next to nothing else is asked for.
    """

    corpus: Corpus
    seed: int
    fact_share: float = 0.5
    copy_share: float = 0.2
    early_fact_share: float = 0.9
    early_copy_share: float = 0.1
    early_until: int = 4

    def batch(self, step: int, *, level: int, sequence_tokens: int, batch_tokens: int) -> Batch:
        """The batch of one step: batch_tokens // sequence_tokens sequences (at least one)."""
        count = max(1, batch_tokens // sequence_tokens)
        tokens = np.empty((count, sequence_tokens), np.int64)
        kinds = np.empty((count, sequence_tokens), np.uint8)
        distance = np.zeros((count, sequence_tokens), np.int32)
        levels = np.full(count, -1, np.int8)
        facts, copies = self.fact_share, self.copy_share
        if level <= self.early_until:
            facts, copies = self.early_fact_share, self.early_copy_share
        for row in range(count):
            rng = random.Random(f"{self.seed}/{step}/{row}")
            # Kinds are dealt by row, not drawn, so that every batch holds the same mix.
            place = (row + rng.random()) / count
            if place < facts:
                levels[row] = Curriculum.draw(level, rng)
                made = fact_sequence(self.corpus, LEVELS[levels[row]], sequence_tokens, rng)
                tokens[row], kinds[row], distance[row] = made
            elif place < facts + copies:
                make = _text_with_copies if rng.random() < 0.6 else _repeated_lines
                tokens[row], kinds[row] = make(self.corpus, sequence_tokens, rng)
            else:
                tokens[row], kinds[row] = _running_text(self.corpus, sequence_tokens, rng)
        return Batch(tokens, kinds, distance, levels)


def fact_sequence(
    corpus: Corpus, level: Level, sequence_tokens: int, rng: random.Random, *, split: FactSplit = "train"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Facts told early in a stream, then asked for again and again.

    Args:
        corpus: filler between facts; the held-out text if the names are held out.
        split: which names.

    Returns:
        tokens (T,) int64, kinds (T,) uint8, distance (T,) int32 as in `Batch`.
    """
    size = sequence_tokens - 1
    writer = _Writer()
    facts = _draw_facts(level, sequence_tokens, rng, split)
    told: list[tuple[Fact, int]] = []
    filler_mean = _item_tokens(level) * level.filler / (1.0 - level.filler)
    gap = int(size * level.gap * (0.5 + 0.5 * rng.random()))
    tell_probability = 0.5 if level.style == "bare" else 0.8
    while len(writer.data) < size:
        if filler_mean:
            writer.add(_filler(corpus, split, int(min(rng.expovariate(1.0 / filler_mean), size / 2)), rng), TEXT)
        if gap and not facts:
            writer.add(_filler(corpus, split, gap, rng), TEXT)
            gap = 0
        if facts and (not told or rng.random() < tell_probability):
            fact = facts.pop()
            _tell(writer, fact, level, rng)
            told.append((fact, len(writer.data)))
        else:
            # Two draws, the one not heard of for longer: most questions then reach far back.
            index = min(rng.randrange(len(told)), rng.randrange(len(told)), key=lambda i: told[i][1])
            fact, seen = told[index]
            _ask(writer, fact, level, seen, rng, corpus, split)
            told[index] = (fact, len(writer.data))
    return writer.finish(sequence_tokens)


class _Writer:
    """Bytes so far, and the spans of them that are not FRAME."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._spans: list[tuple[int, int, int, int]] = []

    def add(self, text: str | bytes, kind: int, distance: int = 0) -> None:
        start = len(self.data)
        self.data += text.encode() if isinstance(text, str) else text
        if kind != FRAME:
            self._spans.append((start, len(self.data), kind, distance))

    def finish(self, sequence_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = np.empty(sequence_tokens, np.int64)
        kinds = np.full(sequence_tokens, FRAME, np.uint8)
        distance = np.zeros(sequence_tokens, np.int32)
        tokens[0], kinds[0] = BOS_ID, IGNORED
        tokens[1:] = np.frombuffer(self.data, np.uint8, count=sequence_tokens - 1)
        for start, end, kind, steps in self._spans:
            kinds[start + 1 : end + 1] = kind
            distance[start + 1 : end + 1] = steps
        return tokens, kinds, distance


def _draw_facts(level: Level, sequence_tokens: int, rng: random.Random, split: FactSplit) -> list[Fact]:
    most = level.facts
    if level.style == "full":
        # Telling takes half of the places, so that there is room to ask.
        places = sequence_tokens * (1.0 - level.gap) * (1.0 - level.filler) / _item_tokens(level)
        most = max(2, min(level.facts * sequence_tokens // 1024, int(0.5 * places)))
    wanted = rng.randint(max(2, most // 3), most)
    names: dict[str, None] = {}
    while len(names) < wanted:
        names[draw_name(rng, letters=level.letters, split=split)] = None
    return [Fact(name, draw_code(rng, digits=level.digits)) for name in names]


def _item_tokens(level: Level) -> float:
    """About how long one telling or question is."""
    return 50.0 if level.style == "full" else 4.0 + level.letters + level.digits


def _filler(corpus: Corpus, split: FactSplit, size: int, rng: random.Random) -> bytes:
    if size < 12:
        return b""
    data, starts = corpus.train, corpus.line_starts
    if split == "held_out":
        data, starts = corpus.held_out, corpus.held_out_line_starts
    start = int(starts[rng.randrange(len(starts))])
    return data[start : start + size].tobytes() + b"\n"


def _exactly(corpus: Corpus, split: FactSplit, size: int, rng: random.Random) -> bytes:
    """So many bytes of a book, the last of them the end of a line."""
    data = corpus.held_out if split == "held_out" else corpus.train
    start = rng.randrange(len(data) - BOUNDARY_TOKENS)
    return data[start : start + size - 1].tobytes() + b"\n" if size else b""


def _tell(writer: _Writer, fact: Fact, level: Level, rng: random.Random) -> None:
    if level.style == "full":
        writer.add(fact.statement(rng) + rng.choice(_SEPARATORS), FRAME)
    else:
        # Random letters and digits, told for the first time: nothing in them can be predicted.
        writer.add(_cue(fact, level) + fact.code + _end(level), IGNORED)


def _ask(
    writer: _Writer, fact: Fact, level: Level, seen: int, rng: random.Random, corpus: Corpus, split: FactSplit
) -> None:
    if level.style == "full":
        question = fact.question(rng)
        if rng.random() < _ALIGNED:
            missing = -(len(writer.data) + len(question)) % BOUNDARY_TOKENS
            writer.add(_exactly(corpus, split, missing, rng), TEXT)
        writer.add(question, FRAME)
        writer.add(fact.code, ANSWER, len(writer.data) - seen)
        writer.add("." + rng.choice(_SEPARATORS), FRAME)
    else:
        writer.add(_cue(fact, level), IGNORED)
        writer.add(fact.code, ANSWER, len(writer.data) - seen)
        writer.add(_end(level), FRAME)


def _cue(fact: Fact, level: Level) -> str:
    return fact.name if level.style == "bare" else f"{fact.name} is "


def _end(level: Level) -> str:
    return " " if level.style == "bare" else ". "


def _running_text(corpus: Corpus, sequence_tokens: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full(sequence_tokens, BOS_ID, np.int64)
    kinds = np.full(sequence_tokens, TEXT, np.uint8)
    kinds[0] = IGNORED
    start = rng.randrange(len(corpus.train) - sequence_tokens)
    tokens[1:] = corpus.train[start : start + sequence_tokens - 1]
    return tokens, kinds


def _text_with_copies(corpus: Corpus, sequence_tokens: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Running text in which segments of 16 to 64 bytes come again later."""
    tokens, kinds = _running_text(corpus, sequence_tokens, rng)
    spans = [(rng.randint(16, 64), rng.random()) for _ in range(max(1, sequence_tokens // 100))]
    places = sorted((1 + size + int(u * (sequence_tokens - 2 * size - 1)), size) for size, u in spans)
    # In the order of their places, so that no source is changed after it was copied.
    end = 0
    for place, size in places:
        if place < end:
            continue
        end = place + size
        source = rng.randint(1, place - size)
        tokens[place : place + size] = tokens[source : source + size]
        kinds[place : place + _COPY_CUE_TOKENS] = IGNORED
        kinds[place + _COPY_CUE_TOKENS : place + size] = COPY
    return tokens, kinds


def _repeated_lines(corpus: Corpus, sequence_tokens: int, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """A few lines of random words, drawn again and again; a repeat is a target after its first three bytes."""
    del corpus
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 7))) for _ in range(24)]
    lines = [" ".join(rng.choices(words, k=rng.randint(1, 5))) + "\n" for _ in range(rng.randint(4, 16))]
    writer, seen = _Writer(), set[int]()
    while len(writer.data) < sequence_tokens - 1:
        index = rng.randrange(len(lines))
        line, cue = lines[index], 3 if index in seen else len(lines[index])
        seen.add(index)
        writer.add(line[:cue], IGNORED)
        writer.add(line[cue:], COPY)
    tokens, kinds, _ = writer.finish(sequence_tokens)
    return tokens, kinds
