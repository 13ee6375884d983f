"""A process killed at any moment loses no token that it acknowledged, and leaves a session that opens and goes on."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from memtier_backends.index_lance import LanceIndex
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths
from memtier_backends.lock import SessionLock
from memtier_backends.segment_store import FileSegmentStore
from memtier_backends.segments import read_kv, verify_segment
from memtier_backends.testing import BLOCK_TOKENS, make_payloads

WRITER = Path(__file__).with_name("crash_writer.py")
LAYERS = (6, 6)


@pytest.fixture(scope="module")
def writer() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, str(WRITER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0


def run_until_killed(
    writer: subprocess.Popen[str], folder: Path, *, kill_at: int = 0, kill_after_lines: int = 0, index: bool = False
) -> int:
    """The last position that the process acknowledged before it died (0: none)."""
    assert writer.stdin is not None and writer.stdout is not None
    writer.stdin.write(json.dumps({"folder": str(folder), "kill_at": kill_at, "index": index}) + "\n")
    writer.stdin.flush()
    pid = int(writer.stdout.readline())
    acknowledged = lines = 0
    for line in writer.stdout:
        # a line that the kill cut is followed by what the parent says of it
        said, ended, status = line.partition("ended ")
        if ended:
            assert int(status) == -signal.SIGKILL
            break
        acknowledged, lines = int(said), lines + 1
        if lines == kill_after_lines:
            os.kill(pid, signal.SIGKILL)
    else:
        pytest.fail("the parent of the processes ended")
    return acknowledged


def check_session(folder: Path, acknowledged: int) -> int:
    """Everything the journal says is true; returns its position."""
    paths = SessionPaths(folder)
    with SessionLock.acquire(folder):
        journal = SqliteJournal.open(paths.journal)
        journal.verify()
        position = journal.position
        assert acknowledged <= position <= acknowledged + BLOCK_TOKENS
        assert journal.tokens(0, position).tolist() == [n * 7919 % 100_003 for n in range(position)]
        store = FileSegmentStore(paths.segments)
        store.clean()
        manifests = journal.segments()
        for manifest in manifests:
            verify_segment(store, manifest)
            (payload, *_) = make_payloads(manifest.first_block, manifest.blocks)
            assert read_kv(store, manifest, 1, manifest.first_block) == payload.kv[1]
        assert journal.indexed_through <= (manifests[-1].end_block if manifests else 0)
        journal.close()
    return position


def test_a_kill_before_any_write_loses_nothing_acknowledged(writer: subprocess.Popen[str], tmp_path: Path) -> None:
    position = 0
    # The first writes are clean, begin_turn, commit, put, add_segment, where there is a merge put, merge_segments and
    # deletes, then add, set_indexed_through; and again.
    for kill_at in range(1, 14):
        acknowledged = run_until_killed(writer, tmp_path, kill_at=kill_at)
        position = check_session(tmp_path, max(position, acknowledged))
    assert position >= 5 * BLOCK_TOKENS


def test_a_kill_at_any_time_loses_nothing_acknowledged(writer: subprocess.Popen[str], tmp_path: Path) -> None:
    position = 0
    for kill_after_lines in (1, 40, 7):
        acknowledged = run_until_killed(writer, tmp_path, kill_after_lines=kill_after_lines)
        # It may have gone on for a while before the signal reached it; what it printed then was read too.
        assert acknowledged >= position + kill_after_lines * BLOCK_TOKENS
        position = check_session(tmp_path, acknowledged)


def kill_at_random(writer: subprocess.Popen[str], folder: Path, rounds: int, seed: int) -> None:
    choose = random.Random(seed)
    position = 0
    for _ in range(rounds):
        acknowledged = run_until_killed(writer, folder, kill_after_lines=choose.randrange(1, 40))
        position = check_session(folder, max(position, acknowledged))


@pytest.mark.timeout(300)
def test_25_kills_at_random_moments_lose_nothing_acknowledged(writer: subprocess.Popen[str], tmp_path: Path) -> None:
    kill_at_random(writer, tmp_path, 25, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_200_kills_at_random_moments_lose_nothing_acknowledged(writer: subprocess.Popen[str], tmp_path: Path) -> None:
    kill_at_random(writer, tmp_path, 200, seed=1)


@pytest.mark.anyio
async def test_a_kill_loses_no_row_that_the_journal_says_is_indexed(
    writer: subprocess.Popen[str], tmp_path: Path
) -> None:
    position = 0
    for kill in ({"kill_at": 20}, {"kill_after_lines": 12}):
        acknowledged = run_until_killed(writer, tmp_path, **kill, index=True)
        position = check_session(tmp_path, max(position, acknowledged))
        journal = SqliteJournal.open(SessionPaths(tmp_path).journal)
        indexed = journal.indexed_through
        journal.close()
        index = await LanceIndex.open(SessionPaths(tmp_path).index, LAYERS)
        blocks = (await index.rows(0, 10**6))["block"].to_pylist()
        assert indexed > 0
        assert blocks[:indexed] == list(range(indexed))
        assert len(blocks) == len(set(blocks)) <= position // BLOCK_TOKENS
        await index.close()


def test_storage_needs_no_torch() -> None:
    code = "import sys, memtier_backends.index_lance, memtier_backends.faults; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
