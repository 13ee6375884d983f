"""The curriculum of the recall task: from one-letter names and one-digit codes to whole facts scattered in a book.

Copying a four-byte answer by a five-byte name is learned late, if at all, when it is asked for at once. Each level is
a small step from the one before; a level is left when its answers come right, and at the latest when the run is so
far along that the last level must be seen at all.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

__all__ = ["LEVELS", "Curriculum", "Level"]


@dataclass(frozen=True, slots=True)
class Level:
    """One difficulty of the recall task.

    Args:
        letters, digits: of a name and of a code.
        style: "bare" (bo7), "short" (bo is 7.) or "full" (the sentences of facts.py).
        facts: most facts in a sequence, for "full" most facts in 1,024 tokens.
        filler: share of book text in what is told and asked.
        gap: share of the sequence that is one stretch of book text between the last telling and the next question.
    """

    letters: int
    digits: int
    style: Literal["bare", "short", "full"]
    facts: int
    filler: float
    gap: float = 0.0


LEVELS = (
    Level(1, 1, "bare", 12, 0.0),
    Level(2, 1, "bare", 16, 0.0),
    Level(2, 2, "short", 12, 0.0),
    Level(3, 3, "short", 10, 0.1),
    Level(5, 4, "short", 8, 0.2, gap=0.3),
    Level(5, 4, "full", 5, 0.2),
    Level(5, 4, "full", 6, 0.4),
    Level(5, 4, "full", 8, 0.2, gap=0.35),
    Level(5, 4, "full", 8, 0.2, gap=0.6),
    # many facts at once: a name must be told from all others
    Level(5, 4, "full", 16, 0.1, gap=0.25),
)


@dataclass(slots=True)
class Curriculum:
    """Where the recall task stands; two numbers, so that a checkpoint holds it whole."""

    level: int = 0
    accuracy: float = 0.0

    # The share of digits that must come right, on a moving average, before the next level.
    PASS_ACCURACY = 0.8
    # Progress of the run at which a level that was not passed is left all the same: level i at START + i * STEP.
    FORCED_START = 0.35
    FORCED_STEP = 0.05

    def update(self, accuracy: float | None, progress: float) -> bool:
        """Take the accuracy at this level since the last call (None: not measured); True if the level changed."""
        if accuracy is not None:
            self.accuracy = 0.5 * self.accuracy + 0.5 * accuracy
        passed = self.accuracy >= self.PASS_ACCURACY
        forced = progress >= self.FORCED_START + self.level * self.FORCED_STEP
        if self.level + 1 >= len(LEVELS) or not (passed or forced):
            return False
        self.level += 1
        self.accuracy = 0.0
        return True

    @staticmethod
    def draw(level: int, rng: random.Random) -> int:
        """The level of one sequence: mostly `level`, some easier (to unlearn nothing), a few harder (a look ahead)."""
        u = rng.random()
        if u < 0.7:
            return level
        if u < 0.85:
            return rng.randint(max(0, level - 2), level)
        return rng.randint(level, len(LEVELS) - 1)
