"""Run by test_session_crash: processes that die before their n-th write, each followed by one that goes on.

One process imports torch and makes the model; every other is forked from it while it has one thread, so each costs a
fraction of a second.

    killed_process.py FOLDER

prints a JSON list of {"kill_at", "killed", "position", "error", "whole"}: exit status, tokens acknowledged, the largest
difference of logits to an unbroken session of the same turns, and whether all was on disk in the end.

    killed_process.py FOLDER at-random ROUNDS SEED

kills at random moments instead, and prints {"told", "position", "right", "healthy"} for each round: the last position
that the process had said was acknowledged, the one that was found, whether its tokens are those that were sent, and
what the doctor says.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import threading
import traceback
from functools import cache
from pathlib import Path
from typing import NoReturn

import anyio
import lance_namespace  # noqa: F401  more than half of the time to import lancedb, which itself starts threads
import torch

from memtier.config import MemoryConfig
from memtier.folder import Backends
from memtier.runtime import Runtime
from memtier.testing import tiny_model
from memtier_backends.faults import Faults, FaultyIndex, FaultyJournal, FaultySegmentStore
from memtier_backends.index_memory import MemoryIndexAdapter
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.segment_store import FileSegmentStore

CONFIG = MemoryConfig(snapshot_every_tokens=40)
DROPPING = MemoryConfig(snapshot_every_tokens=40, retain_tokens=60)


model = cache(tiny_model)


def runtime(store: Path, faults: Faults, config: MemoryConfig = CONFIG) -> Runtime:
    async def index(folder: Path, layers: list[int]) -> FaultyIndex:
        return FaultyIndex(MemoryIndexAdapter(layers), faults)

    backends = Backends(
        journal=lambda path: FaultyJournal(SqliteJournal.open(path), faults),
        segments=lambda path: FaultySegmentStore(FileSegmentStore(path), faults),
        snapshots=lambda path: FaultySegmentStore(FileSegmentStore(path), faults, "snapshots"),
        index=index,
    )
    return Runtime(store, model(dtype=torch.float64), None, config, "default", "cpu", "auto", backends=backends)


async def first_half(store: Path, ids: list[int], faults: Faults, upto: int = 150) -> None:
    """Segments, rows and snapshots, segments that are merged, and old ones that are dropped."""
    async with runtime(store, faults, DROPPING) as opened:
        session = await opened.session("a")
        for at in range(0, upto, 50):
            await session.observe(ids[at : min(at + 50, upto)])
            # as `flush`, and until small segments are merged: so that the writes have one order
            await session.updater.rest()


async def the_rest(store: Path, ids: list[int], result: Path) -> None:
    async with runtime(store, Faults(), DROPPING) as opened:
        session = await opened.session("a")
        position = session.position
        logits = (await session.observe(ids[position:], logits=True)).logits
        await session.flush()
        whole = session.stats().lag_tokens == 0
        torch.save({"position": position, "logits": logits, "whole": whole}, result)


def run_and_exit(function, *arguments) -> NoReturn:
    status = 1
    try:
        anyio.run(function, *arguments)
        status = 0
    except BaseException:  # noqa: BLE001  a forked child must not return into its parent's code
        traceback.print_exc()
    finally:
        os._exit(status)


def in_child(function, *arguments) -> int:
    """Exit status of a forked process that runs an async function; minus the signal's number if one ended it."""
    pid = os.fork()
    if pid == 0:
        run_and_exit(function, *arguments)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def get_ready(folder: Path) -> list[int]:
    """Before the first fork: what is imported and kept now, no child has to. Returns the 200 tokens of the sessions."""
    torch.set_num_threads(1)
    ids = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(3)).tolist()
    anyio.run(first_half, folder / "unbroken", ids, Faults())
    anyio.run(the_rest, folder / "unbroken", ids, folder / "unbroken.pt")
    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()  # no child touches these pages
    return ids


def main(folder: Path) -> None:
    """Kill before the first write, then before the second, until a process ends by itself."""
    ids = get_ready(folder)
    unbroken = torch.load(folder / "unbroken.pt")
    whole: dict[int, torch.Tensor] = {unbroken["position"]: unbroken["logits"]}
    found: list[dict] = []
    while not found or found[-1]["killed"]:
        kill_at = 1 + len(found)
        store, result = folder / f"kill-{kill_at}", folder / f"kill-{kill_at}.pt"
        killed = in_child(first_half, store, ids, Faults(kill_at=kill_at))
        assert in_child(the_rest, store, ids, result) == 0, f"the store killed at write {kill_at} does not open"
        went_on = torch.load(result)
        position = went_on["position"]
        if position not in whole:
            never = folder / f"whole-{position}"
            assert in_child(first_half, never, ids, Faults(), position) == 0
            assert in_child(the_rest, never, ids, result) == 0
            whole[position] = torch.load(result)["logits"]
        error = float((went_on["logits"] - whole[position]).abs().max())
        found.append(
            {"kill_at": kill_at, "killed": killed, "position": position, "error": error, "whole": went_on["whole"]}
        )
    print(json.dumps(found))


def token_at(position: int) -> int:
    return position * 7919 % 251


async def talk(store: Path, pipe: int, seed: int) -> None:
    """Read without end, and say what was acknowledged."""
    choose = random.Random(seed)
    async with Runtime(store, model(), None, CONFIG, "default", "cpu", "auto") as opened:
        session = await opened.session("a")
        while True:
            start = session.position
            await session.observe([token_at(n) for n in range(start, start + choose.randrange(1, 40))])
            os.write(pipe, f"{session.position}\n".encode())
            if choose.random() < 0.3:
                await session.flush()
            if choose.random() < 0.1:
                await session.checkpoint(f"at {session.position}")


async def look(store: Path, result: Path) -> None:
    async with Runtime(store, model(), None, CONFIG, "default", "cpu", "auto") as opened:
        session = await opened.session("a")
        position = session.position
        tokens = (await session.timeline.tokens(0, position)).tolist()
        await session.close()
        healthy = all(health.healthy for health in await opened.doctor(full=True))
    right = tokens == [token_at(n) for n in range(position)]
    result.write_text(json.dumps({"position": position, "right": right, "healthy": healthy}))  # noqa: ASYNC240


def at_random(folder: Path, rounds: int, seed: int) -> None:
    """One session, killed from outside again and again."""
    get_ready(folder)
    choose = random.Random(seed)
    found, told = [], 0
    for number in range(rounds):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            run_and_exit(talk, folder / "store", writer, seed + number)
        os.close(writer)
        with os.fdopen(reader) as said:
            for _ in range(choose.randrange(1, 12)):
                told = int(said.readline())
            os.kill(pid, signal.SIGKILL)
            # what it said before the signal reached it counts too; a line that was cut does not
            told = max([told, *(int(line) for line in said if line.endswith("\n"))])
        os.waitpid(pid, 0)
        assert in_child(look, folder / "store", folder / "found.json") == 0, "the store does not open"
        found.append({"told": told, **json.loads((folder / "found.json").read_text())})
    print(json.dumps(found))


if __name__ == "__main__":
    if "at-random" in sys.argv:
        at_random(Path(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(Path(sys.argv[1]))
