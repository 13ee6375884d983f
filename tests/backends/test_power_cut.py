"""After a power cut at any flush, what was acknowledged is there, and what is there is what was written.

The process that writes runs under a shim that keeps what had been flushed by then (power_cut.c). Killing a process
alone does not test this: the page cache outlives it.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths, session_folder
from memtier_backends.segment_store import FileSegmentStore
from memtier_backends.segments import verify_segment
from memtier_backends.tensors import content_hash

HERE = Path(__file__).parent
POINTS = 50


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("the shim is built with gcc, on Linux")
    built = tmp_path_factory.mktemp("shim") / "power_cut.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", built, HERE / "power_cut.c", "-ldl"], check=True)
    return built


def run(folder: Path, shim: Path, cuts: list[tuple[int, int]]) -> list[int]:
    """Run one writer for each (seed, flush at which it dies); how each ended."""
    jobs = []
    for number, (seed, at) in enumerate(cuts):
        own = folder / str(number)
        (own / "store").mkdir(parents=True)
        (own / "shadow").mkdir()
        paths = {"ROOT": str(own / "store"), "SHADOW": str(own / "shadow"), "said": str(own / "said")}
        jobs.append({**paths, "AT": at, "seed": seed})
    (folder / "jobs").write_text(json.dumps(jobs))
    command = [sys.executable, str(HERE / "power_writer.py"), str(folder / "jobs")]
    environment = {**os.environ, "LD_PRELOAD": str(shim)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def rebuild(shadow: Path, inode: int, target: Path) -> None:
    """The folder of that inode as the disk has it."""
    target.mkdir()
    names = shadow / f"{inode}.names"
    for line in names.read_text().splitlines() if names.exists() else []:
        number, is_folder, name = line.split(" ", 2)
        if is_folder == "1":
            rebuild(shadow, int(number), target / name)
        else:
            data = shadow / f"{number}.data"
            # a name whose bytes were never flushed: the worst that can be
            (target / name).write_bytes(data.read_bytes() if data.exists() else b"")


def check(store: Path, said: list) -> None:
    """Everything acknowledged is there; at most one operation more; and all of it is true."""
    done = [tokens for kind, tokens in said if kind == "done"]
    allowed = [done[-1] if done else []] + ([said[-1][1]] if said and said[-1][0] == "maybe" else [])
    paths = SessionPaths(session_folder(store, "tenant", "session"))
    if not paths.journal.exists():
        assert not done, "acknowledged tokens are gone with their journal"
        return
    journal = SqliteJournal.open(paths.journal)
    try:
        journal.verify()
        assert journal.tokens(0, journal.position).tolist() in allowed
        segments, snapshots = FileSegmentStore(paths.segments), FileSegmentStore(paths.snapshots)
        for manifest in journal.segments():
            verify_segment(segments, manifest)
        for record in journal.snapshots():
            assert content_hash(snapshots.get(record.name)) == record.hash
    finally:
        journal.close()
    kept = [tokens for kind, tokens in said if kind == "kept"]
    copy = paths.folder / "copy.sqlite3"
    if not copy.exists():
        assert not kept, "a copy that was made is gone"
        return
    # it appears whole, also where the power failed before it was acknowledged
    journal = SqliteJournal.open(copy, read_only=True)
    try:
        journal.verify()
        assert not kept or journal.tokens(0, journal.position).tolist() == kept[-1]
    finally:
        journal.close()


def check_points(tmp_path: Path, shim: Path, points: int, seed: int) -> None:
    choose = random.Random(seed)
    statuses = run(tmp_path, shim, [(number % 5, choose.randrange(1, 110)) for number in range(points)])
    assert set(statuses) <= {0, -signal.SIGKILL}
    assert statuses.count(-signal.SIGKILL) > points // 2
    for number in range(points):
        folder = tmp_path / str(number)
        said = [json.loads(line) for line in (folder / "said").read_text().splitlines()]
        rebuild(folder / "shadow", (folder / "store").stat().st_ino, folder / "disk")
        check(folder / "disk", said)
        # the same death without a power cut
        check(folder / "store", said)


@pytest.mark.timeout(300)
def test_what_was_acknowledged_survives_a_power_cut_at_any_flush(tmp_path: Path, shim: Path) -> None:
    check_points(tmp_path, shim, POINTS, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_more_power_cuts(tmp_path: Path, shim: Path) -> None:
    check_points(tmp_path, shim, 400, seed=1)


def test_the_shim_sees_what_was_never_flushed(tmp_path: Path, shim: Path) -> None:
    """A writer that does not flush loses its file: else the other tests would prove nothing."""
    store, shadow = tmp_path / "store", tmp_path / "shadow"
    for folder in (store, shadow):
        folder.mkdir()
    code = (
        "import os, sys; s = sys.argv[1]; open(s + '/lost', 'w').write('x');"
        "f = open(s + '/kept', 'w'); f.write('y'); f.flush(); os.fsync(f.fileno());"
        "d = os.open(s, os.O_RDONLY); os.fsync(d); open(s + '/later', 'w').write('z')"
    )
    environment = {
        **os.environ, "LD_PRELOAD": str(shim), "POWER_CUT_ROOT": str(store), "POWER_CUT_SHADOW": str(shadow),
        "POWER_CUT_AT": "0",
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", code, str(store)], env=environment, check=True)
    rebuild(shadow, store.stat().st_ino, tmp_path / "disk")
    assert {path.name: path.read_text() for path in (tmp_path / "disk").iterdir()} == {"kept": "y", "lost": ""}
