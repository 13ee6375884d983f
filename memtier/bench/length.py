"""`memtier bench length`: bits per byte by position, far beyond the length that a model was trained at.

One text is read by one session for each retrieval mode; what counts is the end of each stretch of it. `fresh` is the
control: the same ends, read by sessions that know no more than the kilobyte before. A memory that wears out with length
shows as a curve that leaves `fresh`. The text as a whole is counted too.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import memtier
from memtier.bench.demo import OnProgress
from memtier.bench.machine import describe_machine, use_threads
from memtier.bench.rows import Row, holds, read_rows, results_folder, write_rows
from memtier.bench.text import load_text
from memtier.errors import ConfigError

__all__ = ["MODES", "LengthOptions", "run_length", "table"]

MODES = ("on", "off", "random", "recent", "fresh")
COLUMNS = ("model", "text", "mode", "from", "to", "tokens", "bits_per_byte", "commit")
FIRST_BYTES = 1024
"""The first stretch is as long as a training sequence; each stretch ends at twice the position of the one before."""
END_BYTES = 4096
"""What is measured of a stretch: its last so many bytes."""


@dataclass(frozen=True, slots=True)
class LengthOptions:
    """What is read.

    Args:
        size_bytes: of text; None takes all of it.
        modes: any of MODES.
        out: CSV file; None for docs/results/length.csv of the checkout.
        command: what the user typed.
    """

    size_bytes: int | None = 65_536
    modes: tuple[str, ...] = MODES
    file: Path | None = None
    model: str = "nano"
    device: str = "auto"
    threads: int = 1
    out: Path | None = None
    command: str = "memtier bench length --json"


def run_length(options: LengthOptions, on_progress: OnProgress) -> dict[str, Any]:
    """Read the text in every mode that the CSV file does not hold at this length yet, and report it.

    Raises:
        ConfigError: an option that cannot work, or a text that is too short.
    """
    if unknown := [mode for mode in options.modes if mode not in MODES]:
        raise ConfigError(f"--modes holds {unknown!r}; use some of {', '.join(MODES)}.")
    data = load_text(options.file, options.size_bytes).encode()
    if len(data) < 2 * FIRST_BYTES:
        raise ConfigError(f"the text has {len(data):,} bytes; give at least {2 * FIRST_BYTES:,}.")
    path = options.out or results_folder() / "length.csv"
    use_threads(options.threads)
    machine = describe_machine()
    name = "CPython's manual" if options.file is None else options.file.name
    rows = read_rows(path)
    ends = stretches(len(data))
    for mode in options.modes:
        mine = {"model": options.model, "text": name, "mode": mode}
        if any(holds(row, mine) and row["to"] == str(ends[-1][1]) for row in rows):
            continue
        rows = [row for row in rows if not holds(row, mine)]
        measure = _fresh if mode == "fresh" else _stream
        for start, end, tokens, bits in measure(data, ends, mode, options, on_progress):
            values = {"from": start, "to": end, "tokens": tokens, "bits_per_byte": f"{bits:.4f}"}
            rows.append({k: str(v) for k, v in {**mine, **values, "commit": machine["commit"]}.items()})
        write_rows(rows, COLUMNS, path)
    found = [row for row in rows if (row["model"], row["text"]) == (options.model, name)]
    return {"command": options.command, "machine": machine, "written_to": str(path), "curve": table(found)}


def stretches(size: int) -> list[tuple[int, int]]:
    """[0, 1k), [1k, 2k), [2k, 4k) ... up to the end of the text."""
    ends, at = [], 0
    while at < size:
        end = min(max(FIRST_BYTES, 2 * at), size)
        ends.append((at, end))
        at = end
    return ends


def table(rows: list[Row]) -> list[dict[str, Any]]:
    """One entry a stretch, the whole text after its last, with the bits per byte of each mode measured over it."""
    found: dict[tuple[str, str, int, int], dict[str, float]] = {}
    for row in rows:
        key = row["model"], row["text"], int(row["from"]), int(row["to"])
        found.setdefault(key, {})[row["mode"]] = float(row["bits_per_byte"])
    return [
        {"model": model, "text": text, "from": start, "to": end, **values}
        for (model, text, start, end), values in sorted(found.items(), key=_place)
    ]


def _place(item: tuple[tuple[str, str, int, int], Any]) -> tuple[str, str, int, int]:
    model, text, start, end = item[0]
    return model, text, end, -start


def _stream(
    data: bytes, ends: list[tuple[int, int]], mode: str, options: LengthOptions, on_progress: OnProgress
) -> list[tuple[int, int, int, float]]:
    """Start, end, tokens and bits per byte: of the end of each stretch, read one after the other, and of all."""
    results, parts = [], []
    config = memtier.MemoryConfig(retrieval=mode)  # pyright: ignore[reportArgumentType]
    with (
        tempfile.TemporaryDirectory() as folder,
        memtier.open_sync(folder, model=options.model, device=options.device, config=config) as runtime,
    ):
        session = runtime.session("length")
        for start, end in ends:
            cut = max(start, end - END_BYTES)
            if cut > start:
                parts.append(
                    session.observe(
                        data[start:cut].decode(errors="ignore"),
                        on_progress=lambda read, *_, at=start: on_progress(mode, at + read, len(data)),
                    )
                )
            parts.append(session.observe(data[cut:end].decode(errors="ignore")))
            results.append((start, end, parts[-1].tokens, parts[-1].bits_per_byte or 0.0))
            on_progress(mode, end, len(data))
    tokens = sum(part.tokens for part in parts)
    bits = sum(part.tokens * (part.bits_per_byte or 0.0) for part in parts)
    return [*results, (0, len(data), tokens, bits / tokens)]


def _fresh(
    data: bytes, ends: list[tuple[int, int]], mode: str, options: LengthOptions, on_progress: OnProgress
) -> list[tuple[int, int, int, float]]:
    """The same of sessions that read each kilobyte after the kilobyte before it alone; not of all."""
    results = []
    config = memtier.MemoryConfig(retrieval="off")
    with (
        tempfile.TemporaryDirectory() as folder,
        memtier.open_sync(folder, model=options.model, device=options.device, config=config) as runtime,
    ):
        for start, end in ends:
            tokens, bits = 0, 0.0
            for at in range(max(start, end - END_BYTES), end, FIRST_BYTES):
                session = runtime.session("fresh")
                session.observe(data[max(0, at - FIRST_BYTES) : at].decode(errors="ignore") or "\n")
                report = session.observe(data[at : min(at + FIRST_BYTES, end)].decode(errors="ignore"))
                runtime.delete_session("fresh")
                tokens, bits = tokens + report.tokens, bits + report.tokens * (report.bits_per_byte or 0.0)
            results.append((start, end, tokens, bits / tokens))
            on_progress(mode, end, len(data))
    return results
