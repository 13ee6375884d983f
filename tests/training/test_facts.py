"""Facts are reproducible, pronounceable, and the held-out ones stay out of training."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from memtier.errors import ConfigError
from memtier.training.facts import Fact, draw_name, is_held_out, make_facts


def test_one_seed_gives_one_list_of_facts_with_different_names() -> None:
    facts = make_facts(200, seed=3)
    assert facts == make_facts(200, seed=3)
    assert facts != make_facts(200, seed=4)
    assert len({fact.name for fact in facts}) == 200


def test_names_have_five_letters_and_codes_four_digits() -> None:
    for fact in make_facts(300, seed=0, split="any"):
        assert re.fullmatch(r"[A-Z][a-z]{4}", fact.name)
        assert re.fullmatch(r"\d{4}", fact.answer)


def test_facts_are_held_out_unless_asked_otherwise() -> None:
    assert all(is_held_out(fact.name) for fact in make_facts(100, seed=1))
    assert not any(is_held_out(fact.name) for fact in make_facts(100, seed=1, split="train"))


@pytest.mark.parametrize("rng", [random.Random(0), np.random.default_rng(0)], ids=["random", "numpy"])
def test_a_statement_tells_the_code_and_a_question_does_not(rng: random.Random | np.random.Generator) -> None:
    fact = Fact("Bodiv", "4821")
    statements = {fact.statement(rng) for _ in range(300)}
    questions = {fact.question(rng) for _ in range(300)}
    assert len(statements) >= 10
    assert len(questions) >= 10
    assert all("Bodiv" in text and "4821" in text for text in statements)
    assert all("Bodiv" in text and "4821" not in text and text.endswith(" ") for text in questions)


def test_short_names_are_shorter_beginnings_of_the_same_patterns() -> None:
    rng = random.Random(0)
    assert {len(draw_name(rng, letters=n)) for n in (1, 2, 3) for _ in range(20)} == {1, 2, 3}


def test_too_many_facts_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 to 4000"):
        make_facts(5000, seed=0)
