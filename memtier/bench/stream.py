"""`memtier bench stream`: what a token costs early and late in a long session, in time, memory and disk.

The text is read one step (512 bytes) a call, so that the time of a call is the time of a step: commit, forward, and the
hand-over of sealed blocks. Costs are compared in pairs: once the session stands at the late position, a second one is
read up to the early position, and the two go on by turns, a step each. So a machine whose speed drifts slows both. Each
cost is the median over a stretch of steps.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import memtier
from memtier.bench.demo import OnProgress
from memtier.bench.machine import describe_machine, resident_bytes, selected_from_disk, use_threads
from memtier.bench.text import load_text
from memtier.errors import ConfigError
from memtier_backends.files import bytes_under
from memtier_backends.space import RESERVE_NAME

__all__ = ["StreamOptions", "run_stream"]

STEP_BYTES = 512


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """Positions that are compared, and the memory that the session may use; `command` is what the user typed."""

    early_tokens: int = 10_000
    baseline_tokens: int = 20_000
    late_tokens: int = 200_000
    stretch_steps: int = 32
    hot_bytes: int | None = 64 * 2**20
    file: Path | None = None
    model: str = "nano"
    device: str = "auto"
    threads: int = 1
    command: str = "memtier bench stream --json"


def run_stream(store: Path, options: StreamOptions, on_progress: OnProgress) -> dict[str, Any]:
    """Stream a text and return what it cost, ready for JSON.

    Raises:
        ConfigError: the positions do not follow each other, or the text does not reach past the last one.
    """
    half = options.stretch_steps // 2 * STEP_BYTES
    if not half < options.early_tokens < options.baseline_tokens < options.late_tokens:
        raise ConfigError(
            f"early, baseline and late tokens are {options.early_tokens}, {options.baseline_tokens} and "
            f"{options.late_tokens}; they must grow, and early must be over {half}."
        )
    data = load_text(options.file).encode()
    end = options.late_tokens + 2 * half
    if end > len(data):
        raise ConfigError(f"the text has {len(data):,} bytes and {end:,} are needed. Give a longer --file.")
    use_threads(options.threads)
    config = memtier.MemoryConfig(hot_bytes=options.hot_bytes)
    with memtier.open_sync(store, model=options.model, device=options.device, config=config) as runtime:
        session = runtime.session("stream")
        resident = _read(session, data[: _character_start(data, options.late_tokens)], options, on_progress)
        early, late = _paired(runtime, session, data, options, on_progress)
        session.flush()
        stats = session.stats()
    disk_bytes = bytes_under(store, but=RESERVE_NAME)
    return {
        "seconds_per_token": {"early": early, "late": late, "late_over_early": late / early},
        "resident_bytes": {**resident, "growth": resident["late"] - resident["baseline"]},
        "device_bytes": stats.device_bytes,
        "disk_bytes_per_text_byte": disk_bytes / end,
        "selected_from_disk": selected_from_disk(stats),
        "landmark_bytes": stats.landmark_bytes,
        "hot_bytes": stats.hot_bytes,
        "settings": {**asdict(options), "step_bytes": STEP_BYTES, "landmark_bytes": config.landmark_bytes},
        "machine": describe_machine(),
    }


def _read(session: Any, data: bytes, options: StreamOptions, on_progress: OnProgress) -> dict[str, int]:
    """Read up to the late position; the resident memory at the baseline and there."""
    resident: dict[str, int] = {}
    for start, end in _steps(data, 0, len(data)):
        session.observe(data[start:end].decode())
        if start < options.baseline_tokens <= end:
            gc.collect()
            resident["baseline"] = resident_bytes()
        on_progress("streaming", end, len(data))
    gc.collect()
    resident["late"] = resident_bytes()
    return resident


def _paired(
    runtime: Any, session: Any, data: bytes, options: StreamOptions, on_progress: OnProgress
) -> tuple[float, float]:
    """Seconds a token of a second session around the early position and of `session` at the late one, step by step."""
    stretch = options.stretch_steps * STEP_BYTES
    first = options.early_tokens - stretch // 2
    young = runtime.session("stream-early")
    for start, end in _steps(data, 0, first):
        young.observe(data[start:end].decode())
    pairs = zip(_steps(data, first, first + stretch), _steps(data, options.late_tokens, len(data)), strict=False)
    seconds: tuple[list[float], list[float]] = ([], [])
    for number, spans in enumerate(pairs):
        for one, (start, end), times in zip((young, session), spans, seconds, strict=True):
            began = time.perf_counter()
            one.observe(data[start:end].decode())
            times.append((time.perf_counter() - began) / (end - start))
        on_progress("comparing", number + 1, options.stretch_steps)
    runtime.delete_session("stream-early")
    early, late = map(statistics.median, seconds)
    return early, late


def _steps(data: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Steps of 512 bytes; a character cut by a step's end moves whole into the next."""
    start = _character_start(data, start)
    while start < end:
        stop = _character_start(data, min(start + STEP_BYTES, end))
        if stop <= start:
            return
        yield start, stop
        start = stop


def _character_start(data: bytes, position: int) -> int:
    """The largest start of a character at or before a position (0b10xxxxxx continues one)."""
    while position < len(data) and data[position] & 0xC0 == 0x80:
        position -= 1
    return min(position, len(data))
