"""`memtier bench decode`: tokens a second that sessions sample, with retrieval and without, one at a time and at once.

Two sessions that have read the same text answer by turns, one with retrieval and one without. Then n sessions answer at
the same time, in a runtime that reads their tokens in one forward pass and, by turns with it, in one that reads each
alone; both run the same weights. A speed is the median over the turns, and a ratio the median of the ratios of two
turns that follow each other, so a machine that drifts slows both sides.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio

import memtier
from memtier.bench.demo import OnProgress
from memtier.bench.machine import describe_machine, use_threads
from memtier.bench.text import load_text
from memtier.errors import ConfigError
from memtier.runtime import Runtime
from memtier.session import Session
from memtier.tiers.weights import WeightsTier

__all__ = ["DecodeOptions", "run_decode"]

TURNS = 4
"""One session's round is cut into so many turns: the shorter they are, the more alike is the machine for both sides."""


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """How many sessions answer at once, how long, and after how much text; `command` is what the user typed."""

    sessions: tuple[int, ...] = (1, 2, 4, 8)
    tokens: int = 64
    rounds: int = 5
    context_bytes: int = 4096
    file: Path | None = None
    model: str = "nano"
    device: str = "auto"
    threads: int = 1
    command: str = "memtier bench decode --json"


def run_decode(store: Path, options: DecodeOptions, on_progress: OnProgress) -> dict[str, Any]:
    """Measure, and return what was measured, ready for JSON.

    Raises:
        ConfigError: a count below one, or a text shorter than what is to be read.
    """
    for name in ("tokens", "rounds", "context_bytes"):
        if getattr(options, name) < 1:
            raise ConfigError(f"{name} is {getattr(options, name)}; it must be at least 1.")
    if not options.sessions or min(options.sessions) < 1:
        raise ConfigError(f"sessions is {options.sessions}; give counts of 1 or more, such as 1,2,4,8.")
    text = load_text(options.file, options.context_bytes)
    use_threads(options.threads)
    return anyio.run(_Bench(store, options, text, on_progress).run)


class _Bench:
    def __init__(self, store: Path, options: DecodeOptions, text: str, on_progress: OnProgress) -> None:
        self._store = store
        self._options = options
        self._text = text
        self._on_progress = on_progress

    async def run(self) -> dict[str, Any]:
        options = self._options
        weights = WeightsTier.load(options.model, None, options.device)
        most = max(options.sessions)

        def opened(name: str, batch: int) -> Runtime:
            config = memtier.MemoryConfig(max_batch_sessions=batch, max_open_sessions=max(64, most + 2))
            return memtier.open(
                self._store / name, model=weights.model, tokenizer=weights.codec.tokenizer, config=config
            )

        async with opened("batched", most) as batched, opened("alone", 1) as alone:
            one = await self._one_session(batched)
            several = await self._several(batched, alone)
            stats = batched.stats()
        return {
            "one_session": one,
            "sessions": several,
            "device": stats.device,
            "device_pool": {"bytes": stats.pool_bytes, "hit_rate": stats.pool_hit_rate},
            "settings": {**asdict(options), "file": None if options.file is None else str(options.file)},
            "machine": describe_machine(),
        }

    async def _one_session(self, runtime: Runtime) -> dict[str, float]:
        modes = ("on", "off")
        sessions = [await self._reader(runtime, f"retrieval-{mode}") for mode in modes]
        speeds: dict[str, list[float]] = {mode: [] for mode in modes}
        turns = TURNS * self._options.rounds
        for turn in range(turns + 1):
            for mode, session in zip(modes, sessions, strict=True):
                speed = await self._speed([session], -(-self._options.tokens // TURNS), retrieval=mode)
                if turn:  # the first warms up
                    speeds[mode].append(speed)
            self._on_progress("one session", turn, turns)
        return {
            **{f"tokens_per_second_{mode}": statistics.median(speeds[mode]) for mode in modes},
            "on_over_off": _paired(speeds["on"], speeds["off"]),
        }

    async def _several(self, batched: Runtime, alone: Runtime) -> dict[str, dict[str, float]]:
        most = max(self._options.sessions)
        readers: dict[str, list[Session]] = {"batched": [], "alone": []}
        for i in range(most):
            for name, runtime in (("batched", batched), ("alone", alone)):
                readers[name].append(await self._reader(runtime, f"s{i}", skip=i))
            self._on_progress("reading", i + 1, most)
        report: dict[str, dict[str, float]] = {}
        for count in self._options.sessions:
            speeds: dict[str, list[float]] = {name: [] for name in readers}
            before = batched.stats().decode_batches
            for number in range(self._options.rounds):
                for name, sessions in readers.items():
                    speeds[name].append(await self._speed(sessions[:count], self._options.tokens))
                self._on_progress(f"{count} sessions", number + 1, self._options.rounds)
            report[str(count)] = {
                **{f"tokens_per_second_{name}": statistics.median(measured) for name, measured in speeds.items()},
                "batched_over_alone": _paired(speeds["batched"], speeds["alone"]),
                "tokens_a_forward": _tokens_a_forward(before, batched.stats().decode_batches),
            }
        return report

    async def _reader(self, runtime: Runtime, name: str, *, skip: int = 0) -> Session:
        """A session that has read the text, but for its first bytes: so sessions stand at places of their own."""
        session = await runtime.session(name)
        await session.observe(self._text[skip * 3 :])
        await session.flush()
        return session

    async def _speed(self, sessions: Sequence[Session], wanted: int, **choices: Any) -> float:
        """Tokens a second of all sessions, each sampling `wanted`."""

        async def answer(session: Session) -> None:
            done = 0
            while done < wanted:  # an answer may end early
                generation = session.generate(max_new_tokens=wanted - done, temperature=1.0, seed=done, **choices)
                async for _ in generation:
                    pass
                done += len(generation.token_ids)

        began = time.perf_counter()
        async with anyio.create_task_group() as tasks:
            for session in sessions:
                tasks.start_soon(answer, session)
        return wanted * len(sessions) / (time.perf_counter() - began)


def _paired(one: Sequence[float], two: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(one, two, strict=True))


def _tokens_a_forward(before: dict[int, int], after: dict[int, int]) -> float:
    grown = {size: count - before.get(size, 0) for size, count in after.items()}
    passes = sum(grown.values())
    return sum(size * count for size, count in grown.items()) / passes if passes else 0.0
