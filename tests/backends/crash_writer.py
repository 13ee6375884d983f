"""Processes that write a session in the order that the runtime does, until they are killed. Run by test_crash.py.

For each line of stdin, {"folder", "kill_at", "index"} in JSON, one is forked: kill_at: die just before that write (0:
never); index: whether there is one. To stdout go its id, the positions that it acknowledged, and "ended STATUS".
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import anyio

from memtier_backends.base import MemoryIndex
from memtier_backends.faults import Faults, FaultyIndex, FaultyJournal, FaultySegmentStore
from memtier_backends.index_memory import MemoryIndexAdapter
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths
from memtier_backends.lock import SessionLock
from memtier_backends.merging import merged, next_merge
from memtier_backends.segment_store import FileSegmentStore
from memtier_backends.segments import pack_segment
from memtier_backends.testing import BLOCK_TOKENS, begin_turn, make_payloads, make_rows

LAYERS = (6, 6)
MAX_TOKENS = 100_000
MERGE_EVERY = 4


def token_at(position: int) -> int:
    return position * 7919 % 100_003


async def open_index(paths: SessionPaths, with_index: bool) -> MemoryIndex:
    if not with_index:
        return MemoryIndexAdapter(LAYERS)
    # Imported only here: it takes a second, which the runs without an index need not wait for.
    from memtier_backends.index_lance import LanceIndex

    return await LanceIndex.open(paths.index, LAYERS, compact_every_adds=5)


async def write(folder: Path, kill_at: int, with_index: bool) -> None:
    paths = SessionPaths(folder)
    lock = SessionLock.acquire(folder)
    faults = Faults(kill_at=kill_at or None)
    journal = FaultyJournal(SqliteJournal.open(paths.journal), faults)
    store = FaultySegmentStore(FileSegmentStore(paths.segments), faults)
    index = FaultyIndex(await open_index(paths, with_index), faults)
    store.clean()
    turn = begin_turn(journal)
    while journal.position < MAX_TOKENS:
        start = journal.position
        journal.commit(turn, [token_at(start + n) for n in range(BLOCK_TOKENS)])
        print(journal.position, flush=True)
        segments = journal.segments()
        sealed = journal.position // BLOCK_TOKENS
        stored = segments[-1].end_block if segments else 0
        data, manifest = pack_segment(make_payloads(stored, sealed - stored))
        store.put(manifest.name, data)
        journal.add_segment(manifest)
        if neighbours := next_merge(journal.segments(), (), most_blocks=16, patience=MERGE_EVERY):
            data, manifest = merged(store, neighbours)
            store.put(manifest.name, data)
            for name in journal.merge_segments(manifest):
                store.delete(name)
        first = journal.indexed_through
        texts = [f"text of block {block}" for block in range(first, sealed)]
        await index.add(make_rows(texts, first_block=first, layers=LAYERS))
        journal.set_indexed_through(sealed, seal="")
        if sealed % 16 == 0:
            journal.checkpoint()
    await index.close()
    journal.close()
    lock.release()


def main() -> None:
    # imports the event loop, which else each of the forked processes would do
    anyio.run(anyio.sleep, 0)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            print(os.getpid(), flush=True)
            try:
                anyio.run(write, Path(job["folder"]), job["kill_at"], job["index"])
            except BaseException:  # noqa: BLE001  a forked child must not return into its parent's code
                traceback.print_exc()
            os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print("ended", status, flush=True)


if __name__ == "__main__":
    main()
