"""`memtier bench durability`: what it costs that memory survives, goes back and forgets.

    acknowledgements   commits a second of one sampled token each (durability "token"), and of 16 at once ("turn"), by
                       the journal alone, each flushed to the disk
    open               seconds to open a session, by its length: closed cleanly, and left without a word
    fork, checkpoint, restore, export, import     seconds, at the longest length
    forget             seconds, and tokens read again, by how far back the span lies
    disk               bytes a token, and how many of them a fork added

Beside the acknowledgements stands a flush of 4 KiB to a plain file, timed by turns with them: what the disk costs.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import memtier
from memtier.bench.demo import OnProgress
from memtier.bench.machine import describe_machine, use_threads
from memtier.bench.text import load_text
from memtier.errors import ConfigError
from memtier_backends.files import flush
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.space import RESERVE_NAME

__all__ = ["DurabilityOptions", "run_durability"]


@dataclass(frozen=True, slots=True)
class DurabilityOptions:
    """Lengths of the session at which it is opened, ascending; `command` is what the user typed."""

    lengths: tuple[int, ...] = (8_192, 32_768, 131_072)
    distances: tuple[int, ...] = (1_000, 16_000, 100_000)
    snapshot_every_tokens: int = 32_768
    commits: int = 200
    repeat: int = 5
    file: Path | None = None
    model: str = "nano"
    device: str = "auto"
    threads: int = 1
    command: str = "memtier bench durability --json"


def run_durability(store: Path, options: DurabilityOptions, on_progress: OnProgress) -> dict[str, Any]:
    """Measure, and return what it cost, ready for JSON; times are medians of `repeat`, in seconds.

    Raises:
        ConfigError: lengths that do not grow, or a text that is too short.
    """
    lengths = options.lengths
    data = load_text(options.file).encode()[: lengths[-1] - 1]
    if list(lengths) != sorted(set(lengths)) or lengths[0] < 1_000 or len(data) < lengths[-1] - 1:
        raise ConfigError(
            f"lengths are {lengths}; they must grow from 1,000 at least to {len(data):,}, the text's size."
        )
    use_threads(options.threads)
    acknowledgements = _acknowledgements(store / "journal", options)
    opened: dict[int, float] = {}
    crashed: dict[int, dict[str, float]] = {}
    with _open(store, options) as runtime:
        at = 0
        for length in lengths:
            piece = data[at : length - 1].decode(errors="ignore")
            runtime.session("a").observe(piece, on_progress=_bar(on_progress, at, lengths[-1]))
            at = length - 1
            crashed[length] = _opened_after_a_crash(runtime)
            opened[length] = _opened(runtime, options)
        copies = _copies(runtime, store, options)
        forgets = _forgets(runtime, options, on_progress)
    return {
        "acknowledgements_per_second": acknowledgements,
        "open_seconds": opened,
        "open_after_a_crash": crashed,
        **copies,
        "forget": forgets,
        "settings": asdict(options),
        "machine": describe_machine(),
    }


def _bar(on_progress: OnProgress, at: int, total: int) -> Callable[[int, int | None], None]:
    return lambda done, _: on_progress("reading", at + done, total)


def _open(store: Path, options: DurabilityOptions) -> Any:
    config = memtier.MemoryConfig(snapshot_every_tokens=options.snapshot_every_tokens)
    return memtier.open_sync(store / "store", model=options.model, device=options.device, config=config)


def _acknowledgements(folder: Path, options: DurabilityOptions) -> dict[str, float]:
    """Commits a second, and flushes of a plain file, by turns."""
    folder.mkdir(parents=True)
    journal = SqliteJournal.open(folder / "journal.sqlite3")
    turn = journal.begin_turn(
        role="assistant", source=None, metadata=None, created_at=0.0, retrieval="on", span_blocks=8
    )
    seconds: dict[str, list[float]] = {"token": [], "turn of 16 tokens": [], "flush of 4 KiB": []}
    page, sixteen = os.urandom(4096), list(range(16))
    with (folder / "plain").open("wb", buffering=0) as plain:

        def write_plain() -> None:
            plain.write(page)
            flush(plain.fileno())

        calls: dict[str, Callable[[], object]] = {
            "token": lambda: journal.commit(turn, [7]),
            "turn of 16 tokens": lambda: journal.commit(turn, sixteen),
            "flush of 4 KiB": write_plain,
        }
        for _ in range(options.commits):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - began)
    journal.close()
    shutil.rmtree(folder)
    return {name: 1 / statistics.median(times) for name, times in seconds.items()}


def _copies(runtime: Any, store: Path, options: DurabilityOptions) -> dict[str, Any]:
    session = runtime.session("a")
    session.flush()
    position = session.position
    before = _bytes_once(store)
    names = iter(range(10**6))
    forks: list[str] = []

    def fork() -> None:
        forks.append(f"fork {next(names)}")
        session.fork(forks[-1])

    began = time.perf_counter()
    fork()
    first = time.perf_counter() - began
    added = _bytes_once(store) - before
    exported = store / "a.memtier"
    times = {
        "fork_seconds": _median(options.repeat, fork, lambda: runtime.delete_session(forks[-1])),
        "checkpoint_seconds": _median(
            options.repeat, lambda: session.checkpoint("x"), lambda: session.drop_checkpoint("x")
        ),
        "export_seconds": _median(options.repeat, lambda: session.export(exported), exported.unlink),
    }
    session.checkpoint("y")
    times["restore_seconds"] = _median(options.repeat, lambda: session.restore("y"), lambda: None)
    session.drop_checkpoint("y")
    session.export(exported)
    times["import_seconds"] = _median(
        options.repeat, lambda: runtime.import_session(exported, "moved"), lambda: runtime.delete_session("moved")
    )
    runtime.delete_session(forks[0])
    return {
        **times,
        "first_fork_seconds": first,
        "fork_bytes_per_token": added / position,
        "disk_bytes_per_token": before / position,
        "exported_bytes_per_token": exported.stat().st_size / position,
    }


def _forgets(runtime: Any, options: DurabilityOptions, on_progress: OnProgress) -> dict[int, dict[str, float]]:
    """Forget 100 tokens each time, the nearest first, of a fork."""
    found = {}
    session = runtime.session("a").fork("forgets")
    distances = [distance for distance in options.distances if distance + 100 < session.position]
    for done, distance in enumerate(distances):
        start = session.position - distance
        report = session.forget(start=start, end=start + 100, forks=False)
        found[distance] = {"seconds": report.seconds, "tokens_read_again": report.replayed_tokens}
        on_progress("forgetting", done + 1, len(distances))
    return found


def _median(repeat: int, call: Callable[[], object], undo: Callable[[], object]) -> float:
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
        undo()
    return statistics.median(times)


def _opened(runtime: Any, options: DurabilityOptions) -> float:
    runtime.session("a").close()
    return _median(options.repeat, lambda: runtime.session("a"), lambda: runtime.session("a").close())


def _opened_after_a_crash(runtime: Any) -> dict[str, float]:
    """A session that was left without a word is read again from its last snapshot."""
    session = runtime.session("a")
    session._portal.call(partial(session._inner.close_within, write=False))
    began = time.perf_counter()
    timeline = runtime.session("a")._inner.timeline
    return {"seconds": time.perf_counter() - began, "tokens_read_again": timeline.position - timeline.restored_from}


def _bytes_once(folder: Path) -> int:
    """Bytes of all files under a folder; those that have two names count once."""
    files = [path.stat() for path in folder.rglob("*") if path.is_file() and path.name != RESERVE_NAME]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in files}.values())
