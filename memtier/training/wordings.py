"""How a fact is told and asked for: the wordings that training uses, and others that it never sees.

A trained wording is put together from parts, so that a model meets several hundred and cannot learn them by heart. An
unseen one differs in its words and in their order, and is used by measurements alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

__all__ = ["WORDINGS", "Wording", "question", "statement"]

Wording = Literal["plain", "trained", "unseen"]
"""`plain` is one wording for all; `trained` and `unseen` draw from many."""

WORDINGS: tuple[Wording, ...] = ("plain", "trained", "unseen")

_PLAIN_STATEMENT = "The code for {name} is {code}."
_PLAIN_QUESTION = "Q: What is the code for {name}? A: The code for {name} is "

# Each ends where the code comes next. The first stands for a third of all.
_CLAIMS = (
    "the code for {name} is ",
    "the code of {name} is ",
    "{name}'s code is ",
    "{name} has the code ",
    "for {name} the code is ",
    "the secret code of {name} is ",
    "the number for {name} is ",
    "{name} has been given the number ",
    "the code that {name} has is ",
    "the key to {name} is ",
)
_INTRODUCTIONS = (
    "", "", "", "Remember that ", "Please note: ", "Keep in mind that ", "Fact: ", "I was told that ", "He said that ",
    "By the way, ", "Do not forget that ", "It is known that ", "We learned today that ", "Once more: ",
)  # fmt: skip
# Before a claim that is to be completed; the name is in the claim.
_LEADS = (
    "Q: What is the code for {name}? A: ", "Q: What is the code for {name}? A: ", "What is the code for {name}? ",
    "What is the code of {name}? ", "Question: which code belongs to {name}? Answer: ", "Do you remember {name}? Yes, ",
    "As I told you before, ", "Tell me the code for {name}. ", "Which code has {name}? ", "And {name}? ",
    "Do you know {name}'s number? ", "As you know, ", "", "So ",
)  # fmt: skip
# Questions that name the name once only.
_SHORT_QUESTIONS = (
    "Q: What is the code for {name}? A: ",
    "What is {name}'s code? It is ",
    "Which number does {name} have? Answer: ",
)

_UNSEEN_STATEMENTS = (
    "You should write down that {name} was assigned {code}.",
    "Our list says the code belonging to {name} is {code}.",
    "{name} uses the code {code}.",
    "They told {name} to take the code {code}.",
    "Regarding {name}, the code was set to {code}.",
    "Code for {name}: {code}.",
)
_UNSEEN_QUESTIONS = (
    "Could you say which code belongs to {name}? The code belonging to {name} is ",
    "I forgot what code {name} uses. {name} uses the code ",
    "Help me out with {name}, please: the code for {name} was ",
    "Look up {name}. Code for {name}: ",
    "When {name} was asked for the code, {name} said ",
    "The door opens with the code for {name}, which is ",
)

Draw = Callable[[], float]
"""Gives numbers in [0, 1)."""


def statement(name: str, code: str, wording: Wording, draw: Draw) -> str:
    """One sentence that tells a fact."""
    if wording == "plain":
        return _PLAIN_STATEMENT.format(name=name, code=code)
    if wording == "unseen":
        return _choose(_UNSEEN_STATEMENTS, draw).format(name=name, code=code)
    return _sentence(_choose(_INTRODUCTIONS, draw) + _claim(draw)).format(name=name) + code + "."


def question(name: str, wording: Wording, draw: Draw) -> str:
    """A question that ends where the code comes next."""
    if wording == "plain":
        return _PLAIN_QUESTION.format(name=name)
    if wording == "unseen":
        return _choose(_UNSEEN_QUESTIONS, draw).format(name=name)
    if draw() < 0.15:
        return _choose(_SHORT_QUESTIONS, draw).format(name=name)
    lead = _choose(_LEADS, draw)
    claim = _claim(draw)
    return (_sentence(lead) + (_sentence(claim) if not lead or lead.endswith((".", "? ", ": ")) else claim)).format(
        name=name
    )


def _claim(draw: Draw) -> str:
    return _CLAIMS[0] if draw() < 0.33 else _choose(_CLAIMS, draw)


def _sentence(text: str) -> str:
    """Its first letter large; a name keeps its place."""
    return text[:1].upper() + text[1:]


def _choose(options: tuple[str, ...], draw: Draw) -> str:
    return options[int(draw() * len(options))]
