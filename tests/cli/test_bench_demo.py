"""The pieces of the demo: its text, its facts, its questions."""

from __future__ import annotations

from pathlib import Path

import pytest

from memtier.bench.demo import choose_questions, first_code, quarters, tail_of
from memtier.bench.text import load_text, plant
from memtier.errors import ConfigError
from memtier.training.facts import make_facts


def test_the_manual_is_cut_to_the_bytes_asked_for() -> None:
    assert len(load_text(size_bytes=10_000).encode()) == 10_000


def test_a_text_is_never_cut_inside_a_character(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("añb")
    assert load_text(file, 2) == "a"


def test_more_bytes_than_the_text_holds_are_refused() -> None:
    with pytest.raises(ConfigError, match="holds"):
        load_text(size_bytes=100_000_000)


def test_planted_facts_stand_in_order_near_the_beginning_and_the_text_stays_whole() -> None:
    text = load_text(size_bytes=50_000)
    facts = make_facts(50, seed=3)
    planted = plant(text, facts, seed=3)
    places = [planted.index(fact.name) for fact in facts]
    assert places == sorted(places)
    assert places[-1] < len(planted) * 0.2
    without = "".join(
        line for line in planted.splitlines(keepends=True) if not any(f.name in line and f.code in line for f in facts)
    )
    assert without == text


def test_facts_can_be_planted_in_a_text_of_one_line() -> None:
    facts = make_facts(5, seed=0)
    planted = plant("x" * 1000, facts, seed=0)
    assert planted.count("x") == 1000 + sum((fact.name + fact.code).count("x") for fact in facts)
    assert all(fact.name in planted for fact in facts)


def test_questions_are_the_same_for_a_seed_and_differ_between_seeds() -> None:
    facts = make_facts(100, seed=0)
    assert choose_questions(facts, 0) == choose_questions(facts, 0)
    assert choose_questions(facts, 0) != choose_questions(facts, 1)
    assert len({fact.name for fact, _ in choose_questions(facts, 0)}) == 16


def test_no_question_holds_its_answer() -> None:
    facts = make_facts(200, seed=0)
    assert not [fact for fact, question in choose_questions(facts, 0) if fact.answer in question]


@pytest.mark.parametrize(
    ("answer", "code"), [("4821. And", "4821"), (" 4821", "4821"), ("48 21", None), ("the 0070!", "0070"), ("", None)]
)
def test_the_first_four_digits_are_the_answer(answer: str, code: str | None) -> None:
    assert first_code(answer) == code


@pytest.mark.parametrize("size", [7, 1000, 120_000])
def test_the_quarters_hold_the_whole_text_and_end_with_the_tail(size: int) -> None:
    text = load_text(size_bytes=size)
    parts = quarters(text)
    assert len(parts) == 4
    assert "".join(piece for part in parts for piece in part) == text
    assert parts[3][-1] == tail_of(text)
    assert len(tail_of(text).encode()) <= 20_000
