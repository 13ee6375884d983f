"""Twenty minutes of everything: files, versions of the index and memory stay bounded by what the session holds."""

from __future__ import annotations

import gc
import random
import time
from pathlib import Path

import pytest

import memtier
from memtier.bench.machine import resident_bytes
from memtier.testing import tiny_model
from memtier_backends.layout import SessionPaths, session_folder

SECONDS = 20 * 60
TOKENS = 40_000


def soak(store: Path, tokenizer, seconds: float, tokens: int, rounds_a_life: int = 20) -> int:
    """Rounds done."""
    choose = random.Random(0)
    model = tiny_model(window_tokens=32, span_block_tokens=16, span_refresh_tokens=8)
    config = memtier.MemoryConfig(snapshot_every_tokens=1024, hot_bytes=2**20, landmark_bytes=2**20)
    baseline = rounds = 0
    began = time.monotonic()
    while not rounds or time.monotonic() - began < seconds:
        with memtier.open_sync(store, model=model, tokenizer=tokenizer, config=config) as runtime:
            session = runtime.session("a")
            for _ in range(rounds_a_life):
                rounds += 1
                words = " ".join(choose.choice(["river", "hills", "barley", "code", "rain"]) for _ in range(60))
                session.observe(f"{rounds} {words}. ")
                _ = list(session.generate(max_new_tokens=3))
                session.recall("river hills")
                if session.position > tokens:
                    session.forget(start=session.position // 2, end=session.position - 1)
                if rounds % 7 == 0:
                    session.checkpoint("one")
                    session.restore("one")
                    session.drop_checkpoint("one")
                if rounds % 11 == 0:
                    session.fork("copy").close()
                    runtime.delete_session("copy")
            session.flush()
            position = session.position
        # what is merged in the background is merged by now
        paths = SessionPaths(session_folder(store, "default", "a"))
        files = [path for path in paths.folder.rglob("*") if path.is_file()]
        assert len(list(paths.snapshots.iterdir())) <= 16
        assert len(list(paths.index.rglob("_versions/*"))) <= 70
        # a segment is written at the latest at a flush, and recall flushes
        assert len(files) < 2 * rounds + 400
        assert sum(path.stat().st_size for path in files) < 4_000 * position + 5_000_000
        assert not list(paths.folder.glob(".partial*"))
        gc.collect()
        if rounds == 200:
            baseline = resident_bytes()
        if rounds > 200:
            assert resident_bytes() < baseline + 200_000_000
    return rounds


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
def test_files_versions_and_memory_stay_bounded(tmp_path: Path, tokenizer) -> None:
    assert soak(tmp_path / "store", tokenizer, SECONDS, TOKENS) > 200


def test_the_soak_itself_runs(tmp_path: Path, tokenizer) -> None:
    assert soak(tmp_path / "store", tokenizer, 0, 500, 7) == 7
