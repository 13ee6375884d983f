"""Run by test_crash: processes that die before their n-th write, each followed by one that goes on.

One process imports torch; every other is forked from it before it has threads, so each costs a fraction of a second.
Prints a JSON list of {"kill_at", "killed", "position", "error", "whole"}: exit status, tokens acknowledged, the largest
difference of logits to an unbroken session, and whether all was on disk in the end.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import anyio
import torch

from memtier.config import MemoryConfig
from memtier.folder import Backends
from memtier.runtime import Runtime
from memtier.testing import tiny_model
from memtier_backends.faults import Faults, FaultyIndex, FaultyJournal, FaultySegmentStore
from memtier_backends.index_memory import MemoryIndexAdapter
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.segments import FileSegmentStore

CONFIG = MemoryConfig(snapshot_every_tokens=40)


def runtime(store: Path, faults: Faults) -> Runtime:
    async def index(folder: Path, layers: list[int]) -> FaultyIndex:
        return FaultyIndex(MemoryIndexAdapter(layers), faults)

    backends = Backends(
        journal=lambda path: FaultyJournal(SqliteJournal.open(path), faults),
        segments=lambda path: FaultySegmentStore(FileSegmentStore(path), faults),
        snapshots=lambda path: FaultySegmentStore(FileSegmentStore(path), faults, "snapshots"),
        index=index,
    )
    model = tiny_model(dtype=torch.float64)
    return Runtime(store, model, None, CONFIG, "default", "cpu", "auto", backends=backends)


async def first_half(store: Path, ids: list[int], faults: Faults) -> None:
    async with runtime(store, faults) as opened:
        session = await opened.session("a")
        for at in range(0, 150, 50):
            await session.observe(ids[at : at + 50])
            await session.flush()


async def the_rest(store: Path, ids: list[int], result: Path) -> None:
    async with runtime(store, Faults()) as opened:
        session = await opened.session("a")
        position = session.position
        logits = (await session.observe(ids[position:], logits=True)).logits
        await session.flush()
        whole = session.stats().lag_tokens == 0
        torch.save({"position": position, "logits": logits, "whole": whole}, result)


def in_child(function, *arguments) -> int:
    """Exit status of a forked process that runs an async function; minus the signal's number if one ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            anyio.run(function, *arguments)
            status = 0
        except BaseException:  # noqa: BLE001  a forked child must not return into its parent's code
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder: Path, kills: list[int]) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 256, (200,), generator=generator).tolist()
    assert in_child(the_rest, folder / "whole", ids, folder / "whole.pt") == 0
    whole = torch.load(folder / "whole.pt")["logits"]
    found = []
    for kill_at in kills:
        store, result = folder / f"kill-{kill_at}", folder / f"kill-{kill_at}.pt"
        killed = in_child(first_half, store, ids, Faults(kill_at=kill_at))
        assert in_child(the_rest, store, ids, result) == 0, f"the store killed at write {kill_at} does not open"
        went_on = torch.load(result)
        position = went_on["position"]
        error = float((went_on["logits"] - whole[position:]).abs().max())
        found.append(
            {"kill_at": kill_at, "killed": killed, "position": position, "error": error, "whole": went_on["whole"]}
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(n) for n in sys.argv[2:]])
