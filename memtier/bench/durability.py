"""`memtier bench durability`: what it costs that memory survives, goes back and forgets.

    acknowledgements   commits a second of one sampled token each (durability "token"), and of 16 at once ("turn"), by
                       the journal alone, each flushed to the disk
    open               seconds to open a session, by its length: closed cleanly, and left without a word
    fork, checkpoint, restore, export, import     seconds, at the longest length
    forget             seconds, and tokens read again, by how far back the span lies
    disk               bytes a token, and how many of them a fork added
    random tokens      open, fork and open of the fork, of a session whose blocks are random numbers (stretch.py)

Beside the acknowledgements stands a flush of 4 KiB to a plain file, timed by turns with them: what the disk costs.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import memtier
from memtier.bench.demo import OnProgress
from memtier.bench.machine import describe_machine, use_threads
from memtier.bench.rows import Row, holds, read_rows, results_folder, write_rows
from memtier.bench.stretch import FIRST_TOKENS, stretch
from memtier.bench.text import load_text
from memtier.errors import ConfigError
from memtier.reader import STEP_TOKENS
from memtier_backends.files import bytes_under, flush
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.space import RESERVE_NAME

__all__ = ["DurabilityOptions", "run_durability"]

COLUMNS = ("model", "of", "tokens", "what", "seconds", "least", "most", "commit")

Times = dict[str, float]


@dataclass(frozen=True, slots=True)
class DurabilityOptions:
    """What is measured.

    Args:
        lengths: of the session at which it is opened, ascending.
        distances: how far back what is forgotten lies.
        random_tokens: length of the session of random numbers; None for none.
        out: CSV file; None for docs/results/durability.csv of the checkout.
        command: what the user typed.
    """

    lengths: tuple[int, ...] = (8_192, 32_768, 131_072)
    distances: tuple[int, ...] = (1_000, 16_000, 100_000)
    snapshot_every_tokens: int = 32_768
    random_tokens: int | None = None
    commits: int = 200
    repeat: int = 5
    file: Path | None = None
    model: str = "nano"
    device: str = "auto"
    threads: int = 1
    out: Path | None = None
    command: str = "memtier bench durability --json"


def run_durability(store: Path, options: DurabilityOptions, on_progress: OnProgress) -> dict[str, Any]:
    """Measure, and return what it cost, ready for JSON: medians of `repeat` times in seconds, the least and the most.

    Raises:
        ConfigError: lengths that do not grow, or a text that is too short.
    """
    lengths = options.lengths
    data = load_text(options.file).encode()[: lengths[-1] - 1]
    if list(lengths) != sorted(set(lengths)) or lengths[0] < 1_000 or len(data) < lengths[-1] - 1:
        raise ConfigError(
            f"lengths are {lengths}; they must grow from 1,000 at least to {len(data):,}, the text's size."
        )
    path = options.out or results_folder() / "durability.csv"
    use_threads(options.threads)
    acknowledgements = _acknowledgements(store / "journal", options)
    opened: dict[int, Times] = {}
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
        made = None if options.random_tokens is None else _stretched(runtime, data, options, on_progress)
    report = {
        "acknowledgements_per_second": acknowledgements,
        "open_seconds": opened,
        "open_after_a_crash": crashed,
        **copies,
        "forget": forgets,
        "random_tokens": made,
        "settings": asdict(options) | {"out": str(path)},
        "machine": describe_machine(),
    }
    mine = {"model": options.model}
    rows = [{**mine, **row, "commit": str(report["machine"]["commit"])} for row in _rows(report, options)]
    again = [{name: row[name] for name in ("model", "of", "tokens", "what")} for row in rows]
    kept = [row for row in read_rows(path) if not any(holds(row, one) for one in again)]
    write_rows([*kept, *rows], COLUMNS, path)
    return report


def _rows(report: dict[str, Any], options: DurabilityOptions) -> Iterator[Row]:
    """The times of a report, as rows of the CSV file."""

    def row(of: str, tokens: int, what: str, times: dict[str, Any]) -> Row:
        told = {"of": of, "tokens": str(tokens), "what": what}
        return told | {name: f"{times[name]:.4f}" for name in ("seconds", "least", "most") if name in times}

    for length, times in report["open_seconds"].items():
        yield row("text", length, "open", times)
    for length, crash in report["open_after_a_crash"].items():
        yield row("text", length, f"open after a crash, {crash['tokens_read_again']:,} tokens read again", crash)
    for what in ("fork", "checkpoint", "restore", "export", "import"):
        yield row("text", options.lengths[-1], what, report[f"{what}_seconds"])
    for distance, forget in report["forget"].items():
        what = f"forget 100 tokens {distance:,} back, {forget['tokens_read_again']:,} tokens read again"
        yield row("text", options.lengths[-1], what, forget)
    made = report["random_tokens"]
    for what in ("open", "fork", "open a fork") if made else ():
        yield row("random numbers", made["tokens"], what, made[f"{what.replace(' ', '_')}_seconds"])


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
    before = bytes_under(store, but=RESERVE_NAME)
    names = iter(range(10**6))
    forks: list[str] = []

    def fork() -> None:
        forks.append(f"fork {next(names)}")
        session.fork(forks[-1])

    began = time.perf_counter()
    fork()
    first = time.perf_counter() - began
    added = bytes_under(store, but=RESERVE_NAME) - before
    exported = store / "a.memtier"
    times = {
        "fork_seconds": _times(options.repeat, fork, lambda: runtime.delete_session(forks[-1])),
        "checkpoint_seconds": _times(
            options.repeat, lambda: session.checkpoint("x"), lambda: session.drop_checkpoint("x")
        ),
        "export_seconds": _times(options.repeat, lambda: session.export(exported), exported.unlink),
    }
    session.checkpoint("y")
    times["restore_seconds"] = _times(options.repeat, lambda: session.restore("y"), lambda: None)
    session.drop_checkpoint("y")
    session.export(exported)
    times["import_seconds"] = _times(
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


def _stretched(runtime: Any, data: bytes, options: DurabilityOptions, on_progress: OnProgress) -> dict[str, Any]:
    """Open and fork a session of `random_tokens` tokens."""
    tokens = options.random_tokens or 0
    session = runtime.session("long")
    # one token begins every text
    session.observe(data[: FIRST_TOKENS + tokens % STEP_TOKENS - 1].decode())
    session._loop.call(partial(stretch, session._inner, tokens, on_progress))
    session.flush()
    opened = _opened(runtime, options, "long")
    session = runtime.session("long")
    names = iter(range(10**6))
    forks: list[str] = []

    def fork() -> None:
        forks.append(f"fork {next(names)} of long")
        session.fork(forks[-1])

    forked = _times(options.repeat, fork, lambda: runtime.delete_session(forks[-1]))
    fork()
    fork_opened = _opened(runtime, options, forks[-1])
    stats = session.stats()
    return {
        "tokens": session.position,
        "segments": stats.segments,
        "segment_bytes": stats.segment_bytes,
        "open_seconds": opened,
        "fork_seconds": forked,
        "open_a_fork_seconds": fork_opened,
    }


def _times(repeat: int, call: Callable[[], object], undo: Callable[[], object]) -> Times:
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
        undo()
    return {"seconds": statistics.median(times), "least": min(times), "most": max(times)}


def _opened(runtime: Any, options: DurabilityOptions, name: str = "a") -> Times:
    runtime.session(name).close()
    return _times(options.repeat, lambda: runtime.session(name), lambda: runtime.session(name).close())


def _opened_after_a_crash(runtime: Any) -> dict[str, float]:
    """A session that was left without a word is read again from its last snapshot."""
    session = runtime.session("a")
    session._loop.call(partial(session._inner.close_within, write=False))
    began = time.perf_counter()
    timeline = runtime.session("a")._inner.timeline
    return {"seconds": time.perf_counter() - began, "tokens_read_again": timeline.position - timeline.restored_from}
