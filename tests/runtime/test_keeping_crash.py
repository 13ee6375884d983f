"""A process killed before any write of a forget, a restore, a checkpoint or a fork: all of it happened, or none."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_keeping.py")


def killed(folder: Path, operation: str, step: int) -> tuple[list[int], list[dict]]:
    """The 200 tokens of the session, and what was found after a kill before each `step`-th write; first, after none."""
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), operation, str(step)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    whole, *kills = told["found"]
    assert whole["killed"] == 0 and kills
    assert all(one["killed"] == -signal.SIGKILL for one in kills)
    assert all(one["healthy"] for one in told["found"])
    return told["ids"], told["found"]


SOME_AND_ALL = [pytest.param(5, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("step", SOME_AND_ALL)
def test_a_forget_happens_everywhere_or_nowhere(tmp_path: Path, step: int) -> None:
    ids, found = killed(tmp_path, "forget", step)
    before = {"a": ids, "b": ids[:120], "kept": ids[:120]}
    after = {name: tokens[:50] + tokens[90:] for name, tokens in before.items()}
    for one in found:
        assert {name: one[name] for name in before} in (before, after), one["kill_at"]
    # only before the intent is written may it not have happened
    assert [one["a"] == ids for one in found].count(True) <= 1


@pytest.mark.timeout(600)
@pytest.mark.parametrize("step", SOME_AND_ALL)
def test_a_restore_happens_or_not(tmp_path: Path, step: int) -> None:
    ids, found = killed(tmp_path, "restore", step)
    for one in found:
        assert one["a"] in (ids, ids[:120])
        assert (one["b"], one["kept"]) == (ids[:120], ids[:120])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("step", SOME_AND_ALL)
@pytest.mark.parametrize(("operation", "where", "new"), [("checkpoint", "names", "new"), ("fork", "sessions", "c")])
def test_a_copy_is_there_whole_or_not_at_all(tmp_path: Path, operation: str, where: str, new: str, step: int) -> None:
    ids, found = killed(tmp_path, operation, step)
    assert new in found[0][where]
    for one in found:
        assert (one["a"], one["b"], one["kept"]) == (ids, ids[:120], ids[:120])
