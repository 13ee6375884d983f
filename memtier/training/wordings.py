"""How a fact is told and asked for: the wordings that training uses, and others that it never sees.

A trained wording is put together from parts, with asides that mean nothing, so that a model meets hundreds of
thousands and can rely on the name alone. An unseen one differs in its words and in their order, and is used by
measurements alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

__all__ = ["WORDINGS", "Wording", "question", "statement"]

Wording = Literal["plain", "trained", "unseen"]
"""`plain` is one wording for all; `trained` and `unseen` draw from many."""

WORDINGS: tuple[Wording, ...] = ("plain", "trained", "unseen")

_PLAIN_STATEMENT = "The code for {name} is {code}."
_PLAIN_QUESTION = "Q: What is the code for {name}? A: The code for {name} is "
# Of what training is told and asked.
_PLAIN_SHARE = 0.25

# A trained claim, in one of these orders: each ends where the code comes next, and where nothing else could:
# no order is the beginning of another.
_ORDERS = (
    "{what} {of} {name} {is_}", "{what} {of} {name} {is_}", "{what} {of} {name} {is_}", "{name}'s {noun} {is_}",
    "{name} {has} {what}", "{name} {has} {what}", "for {name} {what} {is_}", "with {name} it {is_}",
    "{what}, {name}'s, {is_}", "{name} and {what}", "{name} with", "{name} -", "{name}:", "{what} {is_}, {of} {name},",
)  # fmt: skip
_NOUNS = ("code",) * 6 + ("number", "key", "password", "sign", "figure", "entry", "pin", "cipher", "mark")
_DETERMINERS = ("the",) * 6 + ("this", "that", "his", "her", "their", "our", "my", "a", "one")
_ADJECTIVES = ("",) * 10 + (
    "secret", "new", "old", "right", "usual", "true", "private", "last", "only", "current", "exact", "famous", "good",
)  # fmt: skip
_OF = ("for",) * 4 + ("of",) * 3 + (
    "from", "to", "given to", "kept for", "known to", "made for", "meant for", "held by", "that goes with", "about",
    "that opens for", "chosen by", "written by", "beside",
)  # fmt: skip
_IS = ("is",) * 8 + (
    "will be", "must be", "should be", "reads", "remains", "is still", "is now", "became", "equals", "would be",
    "seems to be", "had been", "can only be", "has become", "may be", "=", "stays", "turned out as",
)  # fmt: skip
_HAS = ("has",) * 4 + (
    "holds", "got", "keeps", "owns", "carries", "received", "remembers", "took", "chose", "knows", "needs", "goes by",
    "was given", "signs with", "answers to", "came with", "works with", "found", "has been given", "lost", "brought",
    "wrote", "reads", "wants", "likes", "sold", "heard of", "hides",
)  # fmt: skip
_INTRODUCTIONS = (
    "Remember that ", "Please note: ", "Keep in mind that ", "Fact: ", "I was told that ", "He thinks that ",
    "By the way, ", "Do not forget that ", "It is known that ", "We learned today that ", "Once more: ",
    "In the morning, ", "Note: ", "Everybody knows that ", "She wrote that ", "It seems that ", "From now on, ",
    "As agreed, ", "Well, ", "Now, ",
)  # fmt: skip
_LEADS = (
    "What is the code for {name}? ", "What is the code of {name}? ", "Do you remember {name}? Yes, ", "And {name}? ",
    "As I told you before, ", "Tell me the code for {name}. ", "Which code has {name}? ",
    "Do you know {name}'s number? ", "As you know, ", "So ", "Here is {name} again. ", "Let us think of {name}. ",
    "Somebody wants to see {name}. ", "{name} came back. ", "Who is {name}? ", "How about {name}? ",
    "What did I tell you about {name}? ", "Next, {name}. ", "I have to know this: ", "Think again: ",
    "Say it once more: ", "I want to write to {name}. ",
)  # fmt: skip
_ANSWERS = ("", "", "", "A: ", "Answer: ", "Yes: ", "Of course: ", "Then: ", "I say: ")
# Questions that name the name once only; their answers begin with the code.
_SHORT = ("It is ", "That is ", "Sure: ", "I know it, it is ", "They say ", "Read: ")
# Stand anywhere between the parts of a claim, so that what lies between name and code tells nothing.
_ASIDES = (
    "I think", "of course", "it seems", "today", "again", "as ever", "they say", "at last", "in the end", "for now",
    "if I remember", "by all means", "after all", "so to speak", "you see", "since Monday", "in this house", "perhaps",
    "as before", "without doubt", "my friend", "sir", "to be sure", "no more and no less", "on paper", "at home",
)  # fmt: skip
_COMMON = (
    "river garden stone little quiet window began upon letter horse morning green people never under street child "
    "water against table music winter captain brother thought often between silver reason paper country stood "
    "evening carried white answer father looked mountain several gentle market open light story village always "
    "dinner summer voice simple heavy corner early road king money island second ship bread forest half red name "
    "book door hand long time small man"
)
_WORDS = tuple(_COMMON.split())

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
    if draw() < _PLAIN_SHARE:
        return _PLAIN_STATEMENT.format(name=name, code=code)
    introduction = _choose(_INTRODUCTIONS, draw) if draw() < 0.4 else ""
    return _sentence(introduction + _claim(name, draw)) + f"{code}."


def question(name: str, wording: Wording, draw: Draw) -> str:
    """A question that ends where the code comes next."""
    if wording == "plain":
        return _PLAIN_QUESTION.format(name=name)
    if wording == "unseen":
        return _choose(_UNSEEN_QUESTIONS, draw).format(name=name)
    if draw() < _PLAIN_SHARE:
        return _PLAIN_QUESTION.format(name=name)
    lead = _choose(_LEADS, draw).format(name=name) if draw() < 0.7 else ""
    mark = "Q: " if lead.endswith("? ") and draw() < 0.4 else ""
    if name in lead and draw() < 0.15:
        return mark + lead + _choose(_SHORT, draw)
    answer = _choose(_ANSWERS, draw)
    claim = _claim(name, draw)
    return mark + lead + answer + (claim if lead.endswith((", ", "So ")) and not answer else _sentence(claim))


def _claim(name: str, draw: Draw) -> str:
    """The name, and words that lead to its code, in an order and with asides that `draw` chooses."""
    noun = _choose(_NOUNS, draw)
    what = " ".join(part for part in (_choose(_DETERMINERS, draw), _choose(_ADJECTIVES, draw), noun) if part)
    order = _choose(_ORDERS, draw)
    claim = order.format(
        name=name, noun=noun, what=what, of=_choose(_OF, draw), is_=_choose(_IS, draw), has=_choose(_HAS, draw)
    )
    if draw() < 0.25:
        # never at the end: that a code comes next must be told by the words before it
        before, after = claim.split(name, 1)
        words = (
            _choose(_ASIDES, draw)
            if draw() < 0.5
            else " ".join(_choose(_WORDS, draw) for _ in range(1 + int(draw() * 3)))
        )
        claim = f"{before}{name}, {words},{after}" if draw() < 0.6 and after[:1] == " " else f"{words}, {claim}"
    return claim + " "


def _sentence(text: str) -> str:
    """Its first letter large; a name keeps its place."""
    return text[:1].upper() + text[1:]


def _choose(options: Sequence[str], draw: Draw) -> str:
    return options[int(draw() * len(options))]
