"""A process killed between any two writes leaves a session that opens, catches up and goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_process.py")


@pytest.mark.timeout(600)
def test_a_process_killed_between_any_two_writes_reopens_and_catches_up(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert all(one["error"] <= 1e-9 and one["whole"] for one in found), found
    # acknowledged tokens only ever grow with the writes that were made
    positions = [one["position"] for one in found]
    assert positions == sorted(positions)
    *killed, last = [one["killed"] for one in found]
    assert len(killed) > 60 and set(killed) == {-signal.SIGKILL}
    assert last == 0, "the last kill comes after the last write: else some gap was not tried"


def kill_at_random(folder: Path, rounds: int, seed: int) -> None:
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), "at-random", str(rounds), str(seed)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == rounds
    for one in found:
        # a call may have been acknowledged that had not been told of: at most 39 tokens
        assert one["told"] <= one["position"] < one["told"] + 40, found
        assert one["right"] and one["healthy"], found


@pytest.mark.timeout(300)
def test_3_kills_at_random_moments_lose_nothing_acknowledged(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 3, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_40_kills_at_random_moments_lose_nothing_acknowledged(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 40, seed=1)
