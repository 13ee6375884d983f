"""Invented facts, "the code for Bodiv is 4821", in many wordings: what nano is trained and tested to recall.

A name is five pronounceable letters, a code four digits. One name in eight is held out, chosen by a hash of the name:
training never sees those, and `make_facts` gives only those unless asked otherwise.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from memtier.errors import ConfigError
from memtier.training.wordings import Wording, question, statement

__all__ = ["Fact", "FactSplit", "RandomSource", "draw_code", "draw_name", "is_held_out", "make_facts"]

FactSplit = Literal["train", "held_out", "any"]

_CONSONANTS = "bdfghjklmnprstvwz"
_VOWELS = "aeiou"
_PATTERNS = ("cvcvc", "cvcvc", "cvcvc", "vcvcv", "cvccv")


class RandomSource(Protocol):
    """What `random.Random` and `numpy.random.Generator` share."""

    def random(self) -> float:
        """A number in [0, 1)."""
        ...


@dataclass(frozen=True, slots=True)
class Fact:
    """A name and its code, and the sentences that tell it or ask for it."""

    name: str
    code: str

    @property
    def answer(self) -> str:
        """What is expected to follow `question`."""
        return self.code

    def statement(self, rng: RandomSource, wording: Wording = "trained") -> str:
        """One sentence that tells the fact, in a wording that `rng` chooses."""
        return statement(self.name, self.code, wording, rng.random)

    def question(self, rng: RandomSource, wording: Wording = "trained") -> str:
        """A question that ends where the code comes next, in a wording that `rng` chooses."""
        return question(self.name, wording, rng.random)


def make_facts(n: int, seed: int, *, split: FactSplit = "held_out") -> list[Fact]:
    """Facts with `n` different names; the same seed gives the same facts.

    Args:
        n: how many, at most 4,000.
        seed: any integer.
        split: "held_out" names were never in a training sequence; "train" names may have been; "any" is both.

    Returns:
        n facts in a random order.

    Raises:
        ConfigError: n is out of range.
    """
    if not 0 <= n <= 4000:
        raise ConfigError(f"n is {n}; make_facts makes 0 to 4000 facts. Use several seeds for more.")
    rng = random.Random(f"facts/{seed}")
    names: dict[str, None] = {}
    while len(names) < n:
        names[draw_name(rng, split=split)] = None
    return [Fact(name, draw_code(rng)) for name in names]


def draw_name(rng: RandomSource, *, letters: int = 5, split: FactSplit = "any") -> str:
    """A pronounceable name; names shorter than five letters are lower case and belong to every split."""
    while True:
        name = "".join(_choose(_CONSONANTS if c == "c" else _VOWELS, rng) for c in _choose(_PATTERNS, rng)[:letters])
        if letters < 5:
            return name
        name = name.capitalize()
        if split == "any" or is_held_out(name) == (split == "held_out"):
            return name


def draw_code(rng: RandomSource, *, digits: int = 4) -> str:
    """A code of decimal digits, leading zeros included."""
    return f"{int(rng.random() * 10**digits):0{digits}d}"


def is_held_out(name: str) -> bool:
    """True for the one name in eight that training never uses."""
    return hashlib.blake2b(name.encode(), digest_size=1).digest()[0] < 32


def _choose(options: Sequence[str], rng: RandomSource) -> str:
    return options[int(rng.random() * len(options))]
