"""Wordings: a fact can be read from every one, and what measurements call unseen is never drawn for training."""

import random

import pytest

from memtier.training.wordings import WORDINGS, Wording, question, statement

NAME, CODE = "Bodiv", "4821"
DRAWS = 4000


def sentences(wording: Wording, seed: int = 0) -> tuple[list[str], list[str]]:
    draw = random.Random(seed).random
    told = [statement(NAME, CODE, wording, draw) for _ in range(DRAWS)]
    return told, [question(NAME, wording, draw) for _ in range(DRAWS)]


@pytest.mark.parametrize("wording", WORDINGS)
def test_a_statement_names_the_name_before_the_code_and_a_question_ends_where_the_code_comes_next(wording):
    told, asked = sentences(wording)
    for text in told:
        assert text.count(CODE) == 1
        assert NAME in text[: text.index(CODE)], text
        assert text.endswith(f" {CODE}.")
    for text in asked:
        assert NAME in text
        assert CODE not in text
        assert text.endswith(" ")
    assert all("{" not in text and "  " not in text for text in told + asked)


def test_training_draws_thousands_of_wordings_and_the_plain_one_often():
    told, asked = sentences("trained")
    plain = statement(NAME, CODE, "plain", random.random), question(NAME, "plain", random.random)
    assert 0.2 < told.count(plain[0]) / DRAWS < 0.3
    assert 0.2 < asked.count(plain[1]) / DRAWS < 0.3
    assert len(set(told)) > DRAWS / 2
    assert len(set(asked)) > DRAWS / 2


def test_no_unseen_wording_is_drawn_for_training():
    unseen = [set(texts) for texts in sentences("unseen")]
    assert [len(texts) for texts in unseen] == [6, 6]
    for seen, never in zip(sentences("trained", seed=1), unseen, strict=True):
        assert never.isdisjoint(seen)
        # nor the words by which an unseen one leads from the name to the code
        ends = {text[text.rindex(NAME) :] for text in never} - {
            f"{NAME} is ",
            f"{NAME} is {CODE}.",
            f"{NAME}: ",
            f"{NAME}: {CODE}.",
        }
        assert ends
        assert not [text for text in seen if text[text.rindex(NAME) :] in ends]
