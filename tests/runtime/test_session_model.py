"""Whatever is done to sessions in whatever order, they hold what lists of tokens would, and answer as those do."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

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
from memtier.runtime import Runtime
from memtier.sync import SyncRuntime, SyncSession
from memtier.testing import tiny_model
from memtier_backends.base import MemoryIndex
from memtier_backends.index_memory import MemoryIndexAdapter
from memtier_backends.journal_sqlite import SqliteJournal

EXACT = {"rtol": 0.0, "atol": 1e-9}
CONFIG = memtier.MemoryConfig(snapshot_every_tokens=32, reserve_bytes=0)
MODEL = tiny_model(dtype=torch.float64)
TOKENIZER = AutoTokenizer.from_pretrained(Path(memtier.__file__).parent / "models" / "nano")
PROBE = [7, 8, 9, 10, 11, 12]

Tokens = st.lists(st.integers(97, 104), min_size=1, max_size=60)
Share = st.floats(0, 1)


async def index_in_memory(folder: Path, layers: list[int]) -> MemoryIndex:
    return MemoryIndexAdapter(layers)


def opened(store: Path) -> SyncRuntime:
    backends = Backends(index=index_in_memory)
    return SyncRuntime(Runtime(store, MODEL, TOKENIZER, CONFIG, "default", "cpu", "auto", backends=backends))


class SessionMachine(RuleBasedStateMachine):
    """One session at a time is worked on, of those that forks have made."""

    @initialize()
    def start(self) -> None:
        self.stack = ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.store = self.folder / "store-0"
        self.crashes = 0
        self.tokens: dict[str, list[int]] = {"s0": []}
        self.kept: dict[str, dict[str, list[int]]] = {"s0": {}}
        self.at = "s0"
        self.open()

    def open(self) -> None:
        self.life = ExitStack()
        self.runtime = self.life.enter_context(opened(self.store))

    def teardown(self) -> None:
        if not hasattr(self, "stack"):
            return
        with self.stack:
            session = self.session
            whole = self.runtime.session("never touched")
            if self.mine:
                whole.observe(self.mine)
            seen, wanted = (one.observe(PROBE, logits=True).logits for one in (session, whole))
            torch.testing.assert_close(seen, wanted, **EXACT)
            assert all(health.healthy for health in self.closed_and_looked_over())

    def closed_and_looked_over(self) -> Any:
        for name in (*self.tokens, "never touched"):
            self.runtime.session(name).close()
        found = self.runtime.doctor(full=True)
        self.life.close()
        return found

    @property
    def session(self) -> SyncSession:
        return self.runtime.session(self.at)

    @property
    def mine(self) -> list[int]:
        return self.tokens[self.at]

    @rule(ids=Tokens)
    def observe(self, ids: list[int]) -> None:
        assert self.session.observe(ids).tokens == len(ids)
        self.mine.extend(ids)

    @precondition(lambda self: self.mine)
    @rule(count=st.integers(1, 6), remember=st.booleans(), stop_early=st.booleans())
    def generate(self, count: int, remember: bool, stop_early: bool) -> None:
        generation = self.session.generate(max_new_tokens=count, remember=remember)
        for _ in generation:
            if stop_early:
                generation.close()
                break
        if remember:
            self.mine.extend(generation.token_ids)

    @precondition(lambda self: self.mine)
    @rule(share=Share)
    def recall(self, share: float) -> None:
        at = round(share * (len(self.mine) - 1))
        words = TOKENIZER.decode(self.mine[at : at + 4]).strip() or "a"
        for hit in self.session.recall(words):
            assert hit.text == TOKENIZER.decode(self.mine[hit.start : hit.end], skip_special_tokens=True)

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
            kept[name] = list(self.mine)

    @rule(name=st.sampled_from("xy"))
    def restore(self, name: str) -> None:
        kept = self.kept[self.at]
        if name in kept:
            self.session.restore(name)
            self.tokens[self.at] = list(kept[name])
        else:
            with pytest.raises(SessionError, match="no checkpoint"):
                self.session.restore(name)

    @precondition(lambda self: len(self.tokens) < 3)
    @rule()
    def fork(self) -> None:
        name = f"s{len(self.tokens)}"
        self.session.fork(name)
        self.tokens[name], self.kept[name] = list(self.mine), {}
        self.at = name

    @rule(share=Share)
    def work_on_another(self, share: float) -> None:
        self.at = sorted(self.tokens)[round(share * (len(self.tokens) - 1))]

    @precondition(lambda self: self.mine)
    @rule(bounds=st.tuples(Share, Share))
    def forget(self, bounds: tuple[float, float]) -> None:
        start = min(round(min(bounds) * len(self.mine)), len(self.mine) - 1)
        end = max(start + 1, round(max(bounds) * len(self.mine)))
        # the copies are told apart by when each token was said, which the lists do not know: only this one is compared
        report = self.session.forget(start=start, end=end, forks=False)
        assert report.tokens == end - start
        del self.mine[start:end]
        self.kept[self.at] = {name: self.runtime_tokens_of(name, tokens) for name, tokens in self.kept[self.at].items()}

    def runtime_tokens_of(self, name: str, before: list[int]) -> list[int]:
        """What a checkpoint holds after a forget: told by itself, and no more than it held."""
        (kept,) = [info for info in self.session.checkpoints() if info.name == name]
        assert kept.position <= len(before)
        paths = require_session(self.store, "default", self.at).checkpoint(name)
        journal = SqliteJournal.open(paths.journal, read_only=True)
        try:
            return journal.tokens(0, journal.position).tolist()
        finally:
            journal.close()

    @rule()
    def close(self) -> None:
        self.session.close()

    @rule()
    def reopen(self) -> None:
        self.life.close()
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
        self.life.close()
        self.store = image
        self.open()

    @invariant()
    def it_holds_what_the_list_holds(self) -> None:
        if hasattr(self, "runtime"):
            assert self.session.position == len(self.mine)


TestSessionModel = SessionMachine.TestCase
TestSessionModel.settings = settings(
    max_examples=50, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSessionModel.pytestmark = [pytest.mark.timeout(600)]


class Longer(SessionMachine):
    """The same, more often."""


TestLonger = Longer.TestCase
TestLonger.settings = settings(
    max_examples=2000, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLonger.pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]
