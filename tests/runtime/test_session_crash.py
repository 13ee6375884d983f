"""A process killed between any two writes leaves a session that opens, catches up and goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_process.py")
WRITES = 49
"""More than the first half makes, so that every gap between two of them is tried."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(3))
def test_a_process_killed_between_any_two_writes_reopens_and_catches_up(tmp_path: Path, part: int) -> None:
    kills = [str(n) for n in range(1 + part, WRITES, 3)]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), *kills], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert all(one["error"] <= 1e-9 and one["whole"] for one in found), found
    # acknowledged tokens only ever grow with the writes that were made
    positions = [one["position"] for one in found]
    assert positions == sorted(positions)
    assert any(one["killed"] == -signal.SIGKILL for one in found)
    if part == 2:
        assert found[-1]["killed"] == 0, "the last kill comes after the last write: else some gap was not tried"
