"""Whatever is done to sessions in whatever order, they hold what lists of tokens would, and answer as those do."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import AutoTokenizer

import memtier
from memtier.errors import SessionError
from memtier.folder import Backends
from memtier.peek import require_session
from memtier.retention import Retention
from memtier.runtime import Runtime
from memtier.sync import SyncRuntime, SyncSession
from memtier.testing import tiny_model
from memtier_backends.base import MemoryIndex
from memtier_backends.index_memory import MemoryIndexAdapter
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths

EXACT = {"rtol": 0.0, "atol": 1e-9}
CONFIG = memtier.MemoryConfig(snapshot_every_tokens=32, reserve_bytes=0)
MODEL = tiny_model(dtype=torch.float64)
BLOCK = MODEL.config.span_block_tokens
BEGIN = MODEL.config.bos_token_id
TOKENIZER = AutoTokenizer.from_pretrained(Path(memtier.__file__).parent / "models" / "nano")
PROBE = [7, 8, 9, 10, 11, 12]
SHARED_MEMORY = Path("/dev/shm")


def some_tokens(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(97, 105), k=length)


# lists of integers would mostly be short ones, and little then happens in a session
Tokens = st.builds(some_tokens, st.integers(1, 50), st.integers(0, 2**16))
Place = st.integers(0, 2**16)  # of as many as there are, by the remainder
Retained = st.none() | st.integers(1, 60)


@dataclass(frozen=True)
class Turn:
    """Tokens that were said in one turn, and the token from which on blocks were retained in it.

    `numbers` tells the copies of a token that was said once from the same id said twice.
    """

    ids: tuple[int, ...]
    numbers: tuple[int, ...]
    bound: int


@dataclass(frozen=True)
class Line:
    """What a session should hold: the whole plain model."""

    turns: tuple[Turn, ...] = ()

    @property
    def ids(self) -> list[int]:
        return [token for turn in self.turns for token in turn.ids]

    @property
    def numbers(self) -> list[int]:
        return [number for turn in self.turns for number in turn.numbers]

    @property
    def bound(self) -> int:
        return self.turns[-1].bound if self.turns else 0

    def with_turn(self, ids: Iterable[int], numbers: Iterator[int], retain_tokens: int | None) -> Line:
        said = tuple(ids)
        bound = max(self.bound, 0 if retain_tokens is None else len(self.ids) - retain_tokens)
        return Line((*self.turns, Turn(said, tuple(next(numbers) for _ in said), bound))) if said else self

    def without(self, gone: set[int]) -> Line:
        """Bounds stay where they are among the tokens that are left; a turn of none is gone."""
        numbers = self.numbers
        left = []
        for turn in self.turns:
            kept = [(token, n) for token, n in zip(turn.ids, turn.numbers, strict=True) if n not in gone]
            if kept:
                ids, own = zip(*kept, strict=True)
                left.append(Turn(ids, own, sum(n not in gone for n in numbers[: turn.bound])))
        return Line(tuple(left))


async def index_in_memory(folder: Path, layers: list[int]) -> MemoryIndex:
    return MemoryIndexAdapter(layers)


def opened(store: Path, retain_tokens: int | None) -> SyncRuntime:
    config = CONFIG.model_copy(update={"retain_tokens": retain_tokens})
    backends = Backends(index=index_in_memory)
    return SyncRuntime(Runtime(store, MODEL, TOKENIZER, config, "default", "cpu", "auto", backends=backends))


def quick_folder() -> tempfile.TemporaryDirectory[str]:
    """In memory where there is room: what a flush to a disk is worth is shown elsewhere."""
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2**28
    return tempfile.TemporaryDirectory(dir=SHARED_MEMORY if roomy else None)


def turns_in(paths: SessionPaths) -> list[tuple[list[int], int]]:
    """Tokens and bound of each turn that a journal holds."""
    journal = SqliteJournal.open(paths.journal, read_only=True)
    try:
        return [(journal.tokens(turn.start, turn.end).tolist(), turn.retained_from) for turn in journal.turns()]
    finally:
        journal.close()


class SessionMachine(RuleBasedStateMachine):
    """One session at a time is worked on, of those that forks have made."""

    @initialize(ids=Tokens, retain_tokens=Retained)
    def start(self, ids: list[int], retain_tokens: int | None) -> None:
        self.stack = ExitStack()
        self.folder = Path(self.stack.enter_context(quick_folder()))
        self.life = ExitStack()
        self.stack.callback(lambda: self.life.close())
        self.store = self.folder / "store-0"
        self.crashes = 0
        self.numbers = count()
        self.lines = {"s0": Line()}
        self.kept: dict[str, dict[str, Line]] = {"s0": {}}
        self.at = "s0"
        self.retain_tokens = retain_tokens
        self.open()
        self.observe(ids)

    def open(self) -> None:
        self.runtime = self.life.enter_context(opened(self.store, self.retain_tokens))

    def teardown(self) -> None:
        if not hasattr(self, "stack"):
            return
        with self.stack:
            session, whole = self.session, self.never_touched()
            seen, wanted = (one.observe(PROBE, logits=True).logits for one in (session, whole))
            torch.testing.assert_close(seen, wanted, **EXACT)
            self.say(PROBE)
            assert all(health.healthy for health in self.closed_and_looked_over())
            for name, line in self.lines.items():
                paths = require_session(self.store, "default", name)
                there = {"": paths, **{kept: paths.checkpoint(kept) for kept in self.kept[name]}}
                for kept, expected in {"": line, **self.kept[name]}.items():
                    assert turns_in(there[kept]) == [(list(turn.ids), turn.bound) for turn in expected.turns]

    def never_touched(self) -> SyncSession:
        """A session that was told the same tokens and nothing else, and in each turn what had been dropped."""
        whole = self.runtime.session("never touched")
        # where turns begin counts only where they drop something
        for bound, turns in groupby(self.mine.turns, lambda turn: turn.bound):
            told = mock.AsyncMock(return_value=bound)
            with mock.patch.object(Retention, "retained_from", told):
                whole.observe([token for turn in turns for token in turn.ids])
        return whole

    def closed_and_looked_over(self) -> Any:
        for name in (*self.lines, "never touched"):
            self.runtime.session(name).close()
        found = self.runtime.doctor(full=True)
        self.life.close()
        return found

    @property
    def session(self) -> SyncSession:
        return self.runtime.session(self.at)

    @property
    def mine(self) -> Line:
        return self.lines[self.at]

    def say(self, ids: Iterable[int]) -> None:
        self.lines[self.at] = self.mine.with_turn(ids, self.numbers, self.retain_tokens)

    @rule(ids=Tokens)
    def observe(self, ids: list[int]) -> None:
        assert self.session.observe(ids).tokens == len(ids)
        self.say(ids)

    @precondition(lambda self: self.mine.turns)
    @rule(count=st.integers(1, 6), remember=st.booleans(), stop_early=st.booleans())
    def generate(self, count: int, remember: bool, stop_early: bool) -> None:
        generation = self.session.generate(max_new_tokens=count, remember=remember)
        for _ in generation:
            if stop_early:
                generation.close()
                break
        if remember:
            self.say(generation.token_ids)

    @precondition(lambda self: self.mine.turns)
    @rule(place=Place)
    def recall(self, place: int) -> None:
        ids, oldest = self.mine.ids, self.mine.bound // BLOCK
        at = place % len(ids)
        words = TOKENIZER.decode(ids[at : at + 4]).strip() or "a"
        for hit in self.session.recall(words):
            assert hit.text == TOKENIZER.decode(ids[hit.start : hit.end], skip_special_tokens=True)
            assert hit.start >= oldest * BLOCK
        assert all(block >= oldest for block in self.session.blocks().read_all()["block"].to_pylist())

    @rule()
    def flush(self) -> None:
        self.session.flush()
        assert self.session.stats().lag_tokens == 0

    @rule(name=st.sampled_from("xy"))
    def checkpoint(self, name: str) -> None:
        kept = self.kept[self.at]
        if name in kept:
            with pytest.raises(SessionError, match="already"):
                self.session.checkpoint(name)
        else:
            self.session.checkpoint(name)
            kept[name] = self.mine

    @rule(name=st.sampled_from("xy"))
    def restore(self, name: str) -> None:
        kept = self.kept[self.at]
        if name in kept:
            self.session.restore(name)
            self.lines[self.at] = kept[name]
        else:
            with pytest.raises(SessionError, match="no checkpoint"):
                self.session.restore(name)

    @precondition(lambda self: len(self.lines) < 3)
    @rule()
    def fork(self) -> None:
        name = f"s{len(self.lines)}"
        self.session.fork(name)
        self.lines[name], self.kept[name] = self.mine, {}
        self.at = name

    @rule(place=Place)
    def work_on_another(self, place: int) -> None:
        self.at = sorted(self.lines)[place % len(self.lines)]

    # a token that begins a text stays
    @precondition(lambda self: self.mine.turns and self.mine.ids[0] != BEGIN)
    @rule(place=Place, length=st.integers(1, 50), forks=st.booleans())
    def forget(self, place: int, length: int, forks: bool) -> None:
        position = len(self.mine.ids)
        start = place % position
        end = min(start + length, position)
        gone = set(self.mine.numbers[start:end])
        holding = {name for name in self.lines if name != self.at and self.holds(name, gone)}
        report = self.session.forget(start=start, end=end, forks=forks)
        assert report.tokens == end - start
        assert set(report.forks if forks else report.still_held_by) == holding
        for name in {self.at, *holding} if forks else {self.at}:
            self.lines[name] = self.lines[name].without(gone)
            self.kept[name] = {kept: line.without(gone) for kept, line in self.kept[name].items()}

    def holds(self, name: str, numbers: set[int]) -> bool:
        return any(numbers.intersection(line.numbers) for line in (self.lines[name], *self.kept[name].values()))

    @rule()
    def close(self) -> None:
        self.session.close()

    @rule(retain_tokens=Retained)
    def reopen(self, retain_tokens: int | None) -> None:
        """With other limits: what was dropped stays so, and what is dropped from here on follows the new ones."""
        self.life.close()
        self.retain_tokens = retain_tokens
        self.open()

    @rule()
    def crash(self) -> None:
        """Go on with the disk as it is at this moment."""
        self.crashes += 1
        image = self.folder / f"store-{self.crashes}"
        for _ in range(20):
            try:
                shutil.copytree(self.store, image)
                break
            except shutil.Error:
                # a file that the updater removed meanwhile
                shutil.rmtree(image, ignore_errors=True)
        else:
            pytest.fail("no copy of the store could be made")
        self.life.close()
        shutil.rmtree(self.store)
        self.store = image
        self.open()

    @invariant()
    def it_holds_what_the_list_holds(self) -> None:
        if hasattr(self, "runtime"):
            session, stats = self.session, self.session.stats()
            assert session.position == len(self.mine.ids)
            assert stats.dropped_blocks == min(stats.blocks, self.mine.bound // BLOCK)
            kept = {info.name: info.position for info in session.checkpoints()}
            assert kept == {name: len(line.ids) for name, line in self.kept[self.at].items()}


# each run looks at something new; a failure prints how to repeat it
TestSessionModel = SessionMachine.TestCase
TestSessionModel.settings = settings(
    max_examples=50,
    stateful_step_count=10,
    derandomize=False,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestSessionModel.pytestmark = [pytest.mark.timeout(600)]


class LongerOne(SessionMachine):
    """The same, more often: half of it."""


class LongerTwo(SessionMachine):
    """The other half, so that two workers can share them."""


TestLongerOne, TestLongerTwo = LongerOne.TestCase, LongerTwo.TestCase
TestLongerOne.settings = TestLongerTwo.settings = settings(
    max_examples=1000,
    stateful_step_count=20,
    derandomize=False,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestLongerOne.pytestmark = TestLongerTwo.pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
