"""Run by test_keeping_crash: processes that die before a write of a forget, a restore, a checkpoint or a fork.

Processes are forked as in killed_process.py. Arguments: a folder, and in JSON {operation: every how many of its writes
it is killed}. Prints a JSON object of lists of {"kill_at", "killed", "a", "b", "kept", "names", "sessions", "healthy"}:
exit status, and what the session, its fork and its checkpoint hold in the process that opens the store next.
"""

# ruff: noqa: ASYNC240  nothing else runs in these processes
from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from killed_process import get_ready, in_child, runtime

from memtier_backends.faults import Faults

START, END = 50, 90


async def prepare(store: Path, ids: list[int]) -> None:
    async with runtime(store, Faults()) as opened:
        session = await opened.session("a")
        await session.observe(ids[:120])
        await session.checkpoint("kept")
        await session.fork("b")
        await session.observe(ids[120:])


async def operate(store: Path, operation: str, faults: Faults, result: Path) -> None:
    """The operation; the number of writes before it and after it goes to `result`."""
    async with runtime(store, faults) as opened:
        session = await opened.session("a")
        before = faults.writes
        result.write_text(json.dumps([before, None]))
        if operation == "forget":
            await session.forget(start=START, end=END)
        elif operation == "restore":
            await session.restore("kept")
        elif operation == "checkpoint":
            await session.checkpoint("new")
        else:
            await session.fork("c")
        result.write_text(json.dumps([before, faults.writes]))


async def look(store: Path, result: Path) -> None:
    async with runtime(store, Faults()) as opened:
        found = {}
        for name in ("a", "b"):
            session = await opened.session(name)
            found[name] = (await session.timeline.tokens(0, session.position)).tolist()
            # it goes on, whatever happened
            await session.observe([1, 2, 3])
            await session.flush()
        session = await opened.session("a")
        await session.restore("kept")
        found["kept"] = (await session.timeline.tokens(0, session.position)).tolist()
        found["names"] = sorted(info.name for info in await session.checkpoints())
        found["sessions"] = sorted(info.id for info in await opened.sessions())
        for name in ("a", "b"):
            await (await opened.session(name)).close()
        found["healthy"] = all(health.healthy for health in await opened.doctor(full=True))
    result.write_text(json.dumps(found))


def main(folder: Path, steps: dict[str, int]) -> None:
    ids = get_ready(folder)
    base = folder / "base"
    assert in_child(prepare, base, ids) == 0
    found = {operation: killed(folder, base, operation, step) for operation, step in steps.items()}
    print(json.dumps({"ids": ids, **found}))


def killed(folder: Path, base: Path, operation: str, step: int) -> list[dict]:
    result = folder / "result.json"
    found = []
    kill_at, last = 0, 0
    while kill_at <= last:
        store = folder / f"{operation}-{kill_at}"
        shutil.copytree(base, store)
        # the first run is not killed, and says which writes there are
        killed = in_child(operate, store, operation, Faults(kill_at=kill_at or None), result)
        if not kill_at:
            first, last = json.loads(result.read_text())
            # before a write that the operation makes, and at the end before one that it does not
            kill_at = first + 1 - step
        assert in_child(look, store, result) == 0, f"the store killed at write {kill_at} does not open"
        found.append({"kill_at": kill_at, "killed": killed, **json.loads(result.read_text())})
        kill_at += step
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
