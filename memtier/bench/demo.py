"""`memtier demo`: the whole way of a token on real text, with every claim measured against its control.

A text is streamed through a session. Facts, a name and a 4-digit code each, are planted near its beginning, many times
more of them than a span can hold. At the end some are asked for, with retrieval on and with the three controls, each
answer from a copy of the session. Then the store is closed and opened again, and the session goes on where it was.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import memtier
from memtier.bench.machine import describe_machine, selected_from_disk, use_threads
from memtier.bench.text import load_text, plant
from memtier.blocks import RetrievalMode
from memtier.errors import ConfigError, StorageError
from memtier.reports import MemoryReport, SessionStats
from memtier.training.facts import Fact, make_facts
from memtier.training.wordings import Wording

__all__ = ["DEFAULT_BYTES", "DemoOptions", "OnProgress", "run_demo"]

DEFAULT_BYTES = 200_000
ASKED_FACTS = 16
TAIL_BYTES = 20_000
SESSION = "demo"
MODES: tuple[RetrievalMode, ...] = ("on", "off", "random", "recent")

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What to stream, what to plant in it, and with which model."""

    size_bytes: int = DEFAULT_BYTES
    facts: int = 200
    seed: int = 0
    file: Path | None = None
    model: str = "nano"
    device: str = "auto"
    tenant: str = "default"
    hot_bytes: int = 64 * 2**20
    threads: int = 1


def run_demo(store: Path, options: DemoOptions, on_progress: OnProgress) -> dict[str, Any]:
    """Run the demo in a store and return what was measured, ready for JSON.

    Raises:
        ConfigError: the text is too short, nothing was planted, or the store already holds the demo's session.
        StorageError: after closing and reopening, the session does not stand where it stood.
    """
    text = load_text(options.file, options.size_bytes)
    if options.facts < 1:
        raise ConfigError(f"--facts is {options.facts}; there must be at least one to ask for. The default is 200.")
    facts = make_facts(options.facts, options.seed)
    planted = plant(text, facts, options.seed, wording="plain")
    questions = choose_questions(facts, options.seed, "plain")

    use_threads(options.threads)
    with _open(store, options) as runtime:
        if any(entry.id == SESSION for entry in runtime.sessions()):
            raise ConfigError(f"{store} already holds a session {SESSION!r}. Give the demo a store of its own.")
        session = runtime.session(SESSION)
        streamed = _stream(session, planted, on_progress)
        fresh = _fresh_bits_per_byte(runtime, planted, on_progress)
        recall, answers = _ask(session, questions, on_progress)
        session.flush()
        memory = session.inspect()
        stats = session.stats()
        closed_at = session.position

    with _open(store, options) as runtime:
        began = time.perf_counter()
        session = runtime.session(SESSION)
        resume_seconds = time.perf_counter() - began
        resumed_at = session.position
        if resumed_at != closed_at:
            raise StorageError(
                f"the session was closed at token {closed_at:,} and came back at {resumed_at:,} in {store}. "
                f"Keep that folder and report it."
            )
        session.observe("\nThe session goes on.\n")
        went_on_to = session.position

    return {
        "tokens_streamed": streamed.tokens,
        "tokens_per_second": streamed.tokens / streamed.seconds,
        "device_bytes": streamed.device_bytes,
        "bits_per_byte": {"late": streamed.late_bits_per_byte, "fresh": fresh},
        "recall": recall,
        "resumed_at": resumed_at,
        "closed_at": closed_at,
        "resume_seconds": resume_seconds,
        "went_on_to": went_on_to,
        "facts_planted": len(facts),
        "facts_asked": len(questions),
        "answers": answers,
        "tiers": _tiers(memory, stats),
        "settings": {**asdict(options), "file": None if options.file is None else str(options.file)},
        "machine": describe_machine(),
    }


def choose_questions(facts: list[Fact], seed: int, wording: Wording = "trained") -> list[tuple[Fact, str]]:
    """The facts that are asked for, drawn from the seed, each with the question that is put in every mode."""
    rng = random.Random(f"questions/{seed}")
    chosen = rng.sample(facts, min(ASKED_FACTS, len(facts)))
    return [(fact, "\n" + fact.question(rng, wording)) for fact in chosen]


def first_code(answer: str) -> str | None:
    """The first four digits that stand together in an answer."""
    found = re.search(r"\d{4}", answer)
    return found[0] if found else None


@dataclass(frozen=True, slots=True)
class _Streamed:
    tokens: int
    seconds: float
    device_bytes: list[int]
    late_bits_per_byte: float


def _open(store: Path, options: DemoOptions) -> Any:
    config = memtier.MemoryConfig(hot_bytes=options.hot_bytes)
    return memtier.open_sync(store, model=options.model, config=config, tenant=options.tenant, device=options.device)


def _stream(session: Any, text: str, on_progress: OnProgress) -> _Streamed:
    """Read the text in quarters, the last of which ends with the tail whose bits per byte are compared."""
    device_bytes, seconds, tokens, late = [], 0.0, 0, float("nan")
    total = len(text.encode())
    for pieces in quarters(text):
        for piece in pieces:
            began = time.perf_counter()
            report = session.observe(piece, source="demo", on_progress=_after(tokens, total, "streaming", on_progress))
            seconds += time.perf_counter() - began
            tokens, late = tokens + report.tokens, report.bits_per_byte
        device_bytes.append(session.stats().device_bytes)
    return _Streamed(tokens, seconds, device_bytes, late)


def _after(before: int, total: int, stage: str, on_progress: OnProgress) -> Callable[..., None]:
    """Progress of one call as progress of a whole that had come to `before`."""
    return lambda done, *_: on_progress(stage, before + done, total)


def quarters(text: str) -> list[list[str]]:
    """Four equal parts; the last is cut before its tail, so that the tail is a call of its own."""
    cuts = [len(text) * i // 4 for i in range(4)]
    tail = tail_of(text)
    last = [text[cuts[3] : len(text) - len(tail)], tail]
    return [[text[start:end]] for start, end in pairwise(cuts)] + [[piece for piece in last if piece]]


def tail_of(text: str) -> str:
    """The last 20,000 bytes, or of a short text its last quarter."""
    data = text.encode()
    size = min(TAIL_BYTES, len(text[len(text) * 3 // 4 :].encode()))
    return data[len(data) - size :].decode(errors="ignore")


def _fresh_bits_per_byte(runtime: Any, text: str, on_progress: OnProgress) -> float:
    """Bits per byte of the same tail in a session that has read nothing else."""
    tail = tail_of(text)
    total = len(tail.encode())
    session = runtime.session("demo-fresh")
    report = session.observe(tail, on_progress=_after(0, total, "a fresh session", on_progress))
    runtime.delete_session("demo-fresh")
    return report.bits_per_byte


def _ask(
    session: Any, questions: list[tuple[Fact, str]], on_progress: OnProgress
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Ask every question in every mode, from a copy of the session each time; the share of right codes a mode."""
    right: dict[str, int] = dict.fromkeys(MODES, 0)
    answers: list[dict[str, Any]] = []
    total = len(questions) * len(MODES)
    for fact, question in questions:
        given: dict[str, Any] = {"name": fact.name, "code": fact.answer, "question": question.strip()}
        for mode in MODES:
            answer = "".join(session.generate(question, max_new_tokens=8, remember=False, retrieval=mode))
            given[mode] = answer
            right[mode] += first_code(answer) == fact.answer
            on_progress("asking", len(answers) * len(MODES) + MODES.index(mode) + 1, total)
        answers.append(given)
    return {mode: count / len(questions) for mode, count in right.items()}, answers


def _tiers(memory: MemoryReport, stats: SessionStats) -> dict[str, dict[str, Any]]:
    """The four tiers and their sizes; `bytes` of weights, state and context are on the device."""
    context = memory.context
    return {
        "weights": {
            "bytes": memory.weights.bytes,
            "name": memory.weights.name,
            "parameters": memory.weights.parameters,
            "dtype": memory.weights.dtype,
        },
        "state": {"bytes": memory.state.bytes, "layers": len(memory.state.layers)},
        "context": {
            "bytes": stats.device_bytes - memory.state.bytes,
            "window_tokens": context.window_end - context.window_start,
            "eidetic_tokens": sum(len(tokens) for tokens in context.eidetic.values()),
        },
        "storage": {
            "bytes": memory.storage.bytes_on_disk,
            "blocks": memory.storage.blocks,
            "tokens": memory.storage.tokens,
            "host_bytes": stats.hot_bytes + stats.landmark_bytes,
            "selected_from_disk": selected_from_disk(stats),
        },
    }
