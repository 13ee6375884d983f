"""A process killed before any write of a forget, a restore, a checkpoint or a fork: all of it happened, or none."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# whichever of them runs first waits for the processes
pytestmark = pytest.mark.timeout(1200)
SCRIPT = Path(__file__).with_name("killed_keeping.py")


# every how many writes each is killed; a checkpoint and a fork make few
SOME = {"forget": 6, "restore": 6, "checkpoint": 1, "fork": 1}


@pytest.fixture(
    scope="module",
    params=[pytest.param(SOME, id="some"), pytest.param(dict.fromkeys(SOME, 1), id="all", marks=pytest.mark.slow)],
)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The 200 tokens of the session, and for each operation what was found after a kill before each n-th of its writes;
    first, after none."""
    command = [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("stores")), json.dumps(request.param)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    for operation in SOME:
        whole, *kills = found[operation]
        assert whole["killed"] == 0 and kills
        assert all(one["killed"] == -signal.SIGKILL for one in kills)
        assert all(one["healthy"] for one in found[operation])
    return found


def test_a_forget_happens_everywhere_or_nowhere(told: dict) -> None:
    ids = told["ids"]
    before = {"a": ids, "b": ids[:120], "kept": ids[:120]}
    after = {name: tokens[:50] + tokens[90:] for name, tokens in before.items()}
    for one in told["forget"]:
        assert {name: one[name] for name in before} in (before, after), one["kill_at"]
    # only before the intent is written may it not have happened
    assert [one["a"] == ids for one in told["forget"]].count(True) <= 1


def test_a_restore_happens_or_not(told: dict) -> None:
    ids = told["ids"]
    for one in told["restore"]:
        assert one["a"] in (ids, ids[:120])
        assert (one["b"], one["kept"]) == (ids[:120], ids[:120])


@pytest.mark.parametrize(("operation", "where", "new"), [("checkpoint", "names", "new"), ("fork", "sessions", "c")])
def test_a_copy_is_there_whole_or_not_at_all(told: dict, operation: str, where: str, new: str) -> None:
    ids = told["ids"]
    assert new in told[operation][0][where]
    for one in told[operation]:
        assert (one["a"], one["b"], one["kept"]) == (ids, ids[:120], ids[:120])
