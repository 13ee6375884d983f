"""A process that does to a session what the runtime does, until the power fails. Run by test_power_cut.py.

    python power_writer.py JOBS

JOBS: a file with a JSON list of jobs: ROOT, SHADOW and AT as power_cut.c takes them, seed, and `said`, a file. How each
ended goes to stdout. Each line of `said` is a JSON list: "maybe" and the tokens that stand if the operation that begins
is done, "done" and the tokens that stand, "kept" and those of the copy that was made.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from pathlib import Path
from typing import Any

from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths, session_folder
from memtier_backends.lock import SessionLock
from memtier_backends.merging import merged, next_merge
from memtier_backends.records import SnapshotRecord
from memtier_backends.segment_store import FileSegmentStore
from memtier_backends.segments import pack_segment
from memtier_backends.tensors import content_hash, pack_tensors
from memtier_backends.testing import BLOCK_TOKENS, begin_turn, make_payloads


def say(kind: str, tokens: list[int]) -> None:
    print(json.dumps([kind, tokens]), flush=True)


def write(store: Path, seed: int) -> None:
    choose = random.Random(seed)
    paths = SessionPaths(session_folder(store, "tenant", "session"))
    with SessionLock.acquire(paths.folder):
        journal = SqliteJournal.open(paths.journal)
        tokens: list[int] = []
        kept: list[int] | None = None
        copy = paths.folder / "copy.sqlite3"

        def delete(names: list[str]) -> None:
            # a copy that was kept names them too, and has no links of its own here
            for name in names if kept is None else ():
                segments.delete(name)
                snapshots.delete(name)

        def commit() -> None:
            nonlocal tokens
            new = [choose.randrange(1000) for _ in range(choose.randrange(1, 3) * BLOCK_TOKENS)]
            say("maybe", tokens + new)
            journal.commit(begin_turn(journal), new)
            tokens = tokens + new
            say("done", tokens)

        if seed % 2:
            # with its first commit SQLite flushes the session's folder, which would hide that the stores do not
            commit()
        snapshots, segments = FileSegmentStore(paths.snapshots), FileSegmentStore(paths.segments)
        for _ in range(40):
            what = choose.choice(
                ["commit"] * 6
                + ["segment"] * 3
                + ["merge", "merge", "drop", "snapshot", "forget", "keep", "restore", "fold"]
            )
            if what == "commit":
                commit()
            elif what == "segment":
                known = journal.segments()
                stored = known[-1].end_block if known else journal.first_block
                if stored < len(tokens) // BLOCK_TOKENS:
                    data, manifest = pack_segment(make_payloads(stored, len(tokens) // BLOCK_TOKENS - stored))
                    segments.put(manifest.name, data)
                    journal.add_segment(manifest)
            elif what == "merge":
                if neighbours := next_merge(journal.segments(), (), most_blocks=16, patience=2):
                    data, manifest = merged(segments, neighbours)
                    segments.put(manifest.name, data)
                    delete(journal.merge_segments(manifest))
            elif what == "drop":
                known = journal.segments()
                if len(known) > 1 and any(s.first_block >= known[0].end_block for s in journal.snapshots()):
                    delete(journal.drop_before(known[0].end_block))
            elif what == "snapshot":
                data = pack_tensors({}, {"position": str(len(tokens))})
                name = f"{len(tokens):012d}-{content_hash(data)[:16]}.safetensors"
                snapshots.put(name, data)
                known = journal.segments()
                needs = known[-1].first_block if known else journal.first_block
                record = SnapshotRecord(len(tokens), name, len(data), content_hash(data), needs, first_block=needs)
                journal.add_snapshot(record)
            elif what == "forget" and tokens:
                start = choose.randrange(len(tokens))
                end = choose.randrange(start + 1, len(tokens) + 1)
                say("maybe", tokens[:start] + tokens[end:])
                journal.forget(start, end, derived_to=0, meta={})
                tokens = tokens[:start] + tokens[end:]
                say("done", tokens)
            elif what == "keep" and not copy.exists():
                journal.copy_to(copy)
                kept = tokens
                say("kept", kept)
            elif what == "restore" and kept is not None:
                say("maybe", kept)
                journal.replace_with(copy)
                tokens = kept
                say("done", tokens)
            elif what == "fold":
                journal.checkpoint()
        journal.close()


def in_child(job: dict[str, Any]) -> int:
    """How a forked process that does one job ended."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for name in ("ROOT", "SHADOW", "AT"):
                os.environ[f"POWER_CUT_{name}"] = str(job[name])
            sys.stdout = open(job["said"], "w")  # noqa: SIM115  the process dies with it
            write(Path(job["ROOT"]), job["seed"])
            status = 0
        except BaseException:  # noqa: BLE001  a forked child must not return into its parent's code
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    # one process imports, and each job is forked from it
    print(json.dumps([in_child(job) for job in json.loads(Path(sys.argv[1]).read_text())]))
