"""`memtier bench stream`: what a token costs early and late in a long session, in time, memory and disk.

The text is read one step (512 bytes) a call, so that the time of a call is the time of a step: commit, forward, and the
hand-over of sealed blocks. Each cost is the median over a stretch of steps around a position.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import memtier
from memtier.bench.demo import OnProgress
from memtier.bench.machine import describe_machine, folder_bytes, resident_bytes, selected_from_disk, use_threads
from memtier.bench.text import load_text
from memtier.errors import ConfigError

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
    end = options.late_tokens + half
    if end > len(data):
        raise ConfigError(f"the text has {len(data):,} bytes and {end:,} are needed. Give a longer --file.")
    use_threads(options.threads)
    config = memtier.MemoryConfig(hot_bytes=options.hot_bytes)
    with memtier.open_sync(store, model=options.model, device=options.device, config=config) as runtime:
        session = runtime.session("stream")
        seconds, resident = _read(session, data[:end], options, on_progress)
        session.flush()
        stats = session.stats()
    early, late = (_seconds_per_token(seconds, at, options) for at in (options.early_tokens, options.late_tokens))
    return {
        "seconds_per_token": {"early": early, "late": late, "late_over_early": late / early},
        "resident_bytes": {**resident, "growth": resident["late"] - resident["baseline"]},
        "device_bytes": stats.device_bytes,
        "disk_bytes_per_text_byte": folder_bytes(store) / end,
        "selected_from_disk": selected_from_disk(stats),
        "landmark_bytes": stats.landmark_bytes,
        "hot_bytes": stats.hot_bytes,
        "settings": {**asdict(options), "step_bytes": STEP_BYTES, "landmark_bytes": config.landmark_bytes},
        "machine": describe_machine(),
    }


def _read(
    session: Any, data: bytes, options: StreamOptions, on_progress: OnProgress
) -> tuple[list[float], dict[str, int]]:
    """Seconds of each step, and the resident memory at the baseline and at the late position."""
    seconds: list[float] = []
    resident: dict[str, int] = {}
    # A character cut by a step's end moves whole into the next step.
    start = 0
    while start < len(data):
        end = _character_start(data, start + STEP_BYTES)
        piece = data[start:end].decode()
        began = time.perf_counter()
        session.observe(piece)
        seconds.append(time.perf_counter() - began)
        for name, at in (("baseline", options.baseline_tokens), ("late", options.late_tokens)):
            if start < at <= end:
                gc.collect()
                resident[name] = resident_bytes()
        start = end
        on_progress("streaming", start, len(data))
    return seconds, resident


def _character_start(data: bytes, position: int) -> int:
    """The largest start of a character at or before a position (0b10xxxxxx continues one)."""
    while position < len(data) and data[position] & 0xC0 == 0x80:
        position -= 1
    return min(position, len(data))


def _seconds_per_token(step_seconds: list[float], at_tokens: int, options: StreamOptions) -> float:
    """Median over the stretch of steps around a position."""
    first = at_tokens // STEP_BYTES - options.stretch_steps // 2
    return statistics.median(step_seconds[first : first + options.stretch_steps]) / STEP_BYTES
