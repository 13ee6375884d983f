"""The corpus, the curriculum and the sequences that training reads."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest

from memtier.errors import ConfigError
from memtier.training.corpus import Corpus, load_corpus
from memtier.training.facts import is_held_out
from memtier.training.levels import LEVELS, Curriculum
from memtier.training.tasks import ANSWER, COPY, FRAME, TEXT, TaskMixer, fact_sequence
from memtier.training.tokenizer import BOS_ID

LINE = "It was a quiet morning at the river, and nobody — not even the miller — was awake yet.\n"


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    rng = random.Random(0)
    text = "".join(" ".join(rng.choices(LINE.split(), k=12)) + "\n" for _ in range(1500)).encode()
    return Corpus.from_bytes(text[:-20_000], text[-20_000:])


def as_text(tokens: np.ndarray) -> str:
    return bytes(tokens[1:].astype(np.uint8)).decode("latin-1")


def test_a_corpus_is_the_text_files_of_a_folder_with_their_hashes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text(LINE * 200)
    (tmp_path / "sub" / "a.txt").write_text(LINE * 100)
    (tmp_path / "README.md").write_text("about the data")
    (tmp_path / "c.py").write_text("code")
    corpus = load_corpus(tmp_path, held_out_fraction=0.1)
    assert [f.name for f in corpus.files] == ["b.md", "sub/a.txt"]
    assert corpus.files[0].sha256 == hashlib.sha256((LINE * 200).encode()).hexdigest()
    total = sum(f.size_bytes for f in corpus.files)
    assert abs(len(corpus.held_out) / total - 0.1) < 0.01
    # a cut never falls inside a character
    assert corpus.held_out.tobytes().decode().endswith(LINE + "\n")
    corpus.train.tobytes().decode()


@pytest.mark.parametrize("what", ["absent", "empty"])
def test_a_folder_without_text_is_refused(tmp_path: Path, what: str) -> None:
    with pytest.raises(ConfigError, match=r"folder|bytes"):
        load_corpus(tmp_path / "no" if what == "absent" else tmp_path)


def test_a_batch_depends_on_seed_and_step_alone(corpus: Corpus) -> None:
    sizes = {"level": 5, "sequence_tokens": 512, "batch_tokens": 4096}
    first, again = (TaskMixer(corpus, 7).batch(3, **sizes) for _ in range(2))
    assert np.array_equal(first.tokens, again.tokens)
    assert np.array_equal(first.kinds, again.kinds)
    assert not np.array_equal(first.tokens, TaskMixer(corpus, 7).batch(4, **sizes).tokens)
    assert not np.array_equal(first.tokens, TaskMixer(corpus, 8).batch(3, **sizes).tokens)


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_every_answer_was_told_before_at_its_distance(corpus: Corpus, level: int) -> None:
    for seed in range(4):
        tokens, kinds, distance = fact_sequence(corpus, LEVELS[level], 1024, random.Random(seed))
        assert tokens[0] == BOS_ID
        answers = np.flatnonzero(kinds == ANSWER)
        assert len(answers)
        text = as_text(tokens)
        starts = answers[np.diff(answers, prepend=-2) > 1]
        for start in starts:
            digits = int((kinds[start : start + 4] == ANSWER).cumprod().sum())
            code = text[start - 1 : start - 1 + digits]
            # the last telling ends within a sentence's end of where the distance points
            told = text[: start - 1 - int(distance[start]) + 8].rfind(code)
            assert code.isdigit()
            assert told >= 0


def test_training_never_reads_held_out_names_and_evaluation_only_those(corpus: Corpus) -> None:
    import re

    for split in ("train", "held_out"):
        names: set[str] = set()
        for seed in range(10):
            tokens, _, _ = fact_sequence(corpus, LEVELS[5], 1024, random.Random(seed), split=split)
            names |= set(re.findall(r"code (?:for|of) ([A-Z][a-z]{4})\b", as_text(tokens)))
        assert names
        assert {is_held_out(name) for name in names} == {split == "held_out"}


def test_copied_bytes_stood_in_the_sequence_before(corpus: Corpus) -> None:
    batch = TaskMixer(corpus, 0, early_fact_share=0.0, early_copy_share=1.0).batch(
        0, level=0, sequence_tokens=512, batch_tokens=8192
    )
    assert (batch.kinds == COPY).any(axis=1).all()
    for tokens, kinds in zip(batch.tokens, batch.kinds, strict=True):
        where = np.flatnonzero(kinds == COPY)
        runs = np.split(where, np.flatnonzero(np.diff(where) > 1) + 1)
        for run in runs:
            needle = bytes(tokens[run].astype(np.uint8))
            assert needle in bytes(tokens[1 : run[-1]].astype(np.uint8))


def test_answers_and_copies_get_their_share_of_the_loss(corpus: Corpus) -> None:
    batch = TaskMixer(corpus, 0).batch(0, level=1, sequence_tokens=512, batch_tokens=16384)
    weights = batch.loss_weights(answer_share=0.5, copy_share=0.15)
    shares = {kind: weights[batch.kinds == kind].sum() / weights.sum() for kind in (TEXT, FRAME, ANSWER, COPY)}
    assert abs(shares[ANSWER] - 0.5) < 0.01
    assert abs(shares[COPY] - 0.15) < 0.01
    assert weights[batch.kinds == TEXT].max() == 1.0


def test_a_level_is_left_when_it_is_passed_or_when_time_is_up() -> None:
    curriculum = Curriculum()
    assert not curriculum.update(0.1, 0.1)
    assert [curriculum.update(1.0, 0.1) for _ in range(3)] == [False, False, True]
    assert (curriculum.level, curriculum.accuracy) == (1, 0.0)
    for _ in LEVELS:
        curriculum.update(None, 1.0)
    assert curriculum.level == len(LEVELS) - 1


def test_most_sequences_are_of_the_present_level() -> None:
    rng = random.Random(0)
    drawn = [Curriculum.draw(4, rng) for _ in range(1000)]
    assert drawn.count(4) > 650
    assert min(drawn) == 2
    assert max(drawn) == len(LEVELS) - 1
