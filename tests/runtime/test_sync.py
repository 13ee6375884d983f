"""The blocking names: a forked child, Ctrl-C, closing, and objects that are the same however they are asked for."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import memtier
from memtier import SessionError, SyncGeneration, SyncRuntime, SyncSession
from memtier.reader import STEP_TOKENS
from memtier.testing import tiny_model

FACT = "The code for Bodiv is 4821. "
CHILD_SECONDS = 20
NOTHING_ELSE, TOLD, ELSE = 0, 7, 8


@pytest.fixture
def open_sync(tmp_path: Path, tokenizer: Any) -> Callable[..., SyncRuntime]:
    def make(**config: Any) -> SyncRuntime:
        return memtier.open_sync(
            tmp_path / "store", model=tiny_model(), tokenizer=tokenizer, config=memtier.MemoryConfig(**config)
        )

    return make


@pytest.fixture
def runtime(open_sync: Callable[..., SyncRuntime]) -> Iterator[SyncRuntime]:
    with open_sync() as runtime:
        yield runtime


# -- a forked child


def in_a_child(call: Callable[[], Any]) -> int:
    """TOLD if the call raises SessionError in a forked child, which names the fork; else another exit status."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(CHILD_SECONDS)
        status = NOTHING_ELSE
        try:
            call()
        except SessionError as error:
            status = TOLD if "do not survive a fork" in str(error) else ELSE
        except BaseException:  # noqa: BLE001  told to the parent
            traceback.print_exc()
            status = ELSE
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def leave(block: Any, error: BaseException | None) -> None:
    block.__exit__(None if error is None else type(error), error, None)


CALLS: dict[str, Callable[[SyncRuntime, SyncSession, SyncGeneration], Any]] = {
    "observe": lambda runtime, session, answer: session.observe("x"),
    "recall": lambda runtime, session, answer: session.recall("x"),
    "generate": lambda runtime, session, answer: session.generate("x"),
    "stats": lambda runtime, session, answer: session.stats(),
    "close": lambda runtime, session, answer: session.close(),
    "next": lambda runtime, session, answer: next(answer),
    "generation.close": lambda runtime, session, answer: answer.close(),
    "with generation": lambda runtime, session, answer: leave(answer, None),
    "session": lambda runtime, session, answer: runtime.session("b"),
    "sessions": lambda runtime, session, answer: runtime.sessions(),
    "runtime.stats": lambda runtime, session, answer: runtime.stats(),
    "enter": lambda runtime, session, answer: runtime.__enter__(),
    "exit": lambda runtime, session, answer: leave(runtime, None),
}

forks = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@forks
def test_a_forked_child_is_told_instead_of_waiting_for_a_thread_it_has_not(runtime: SyncRuntime) -> None:
    session = runtime.session("a")
    session.observe(FACT)
    answer = session.generate("What", max_new_tokens=20)
    next(answer)
    ended = {name: in_a_child(lambda call=call: call(runtime, session, answer)) for name, call in CALLS.items()}
    assert ended == dict.fromkeys(CALLS, TOLD)
    assert next(answer)


@forks
def test_what_goes_wrong_in_a_forked_child_is_not_hidden_by_leaving(runtime: SyncRuntime) -> None:
    answer = runtime.session("a").generate(FACT, max_new_tokens=20)
    next(answer)
    for block in (runtime, answer):
        assert in_a_child(lambda block=block: leave(block, KeyError("the child's own"))) == NOTHING_ELSE


@forks
def test_a_forked_child_ends_as_any_process_does(tmp_path: Path) -> None:
    # with all that an interpreter does when it exits, which os._exit leaves out
    script = f"""
import os, signal, sys, memtier
from memtier.testing import tiny_model
with memtier.open_sync({str(tmp_path / "store")!r}, model=tiny_model()) as runtime:
    session = runtime.session("a")
    session.observe([1, 2, 3])
    pid = os.fork()
    if pid == 0:
        signal.alarm({CHILD_SECONDS})
        sys.exit(5)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), session.observe([4]).position)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "5 4\n"), done.stderr


# -- Ctrl-C


def endless(text: str, begun: threading.Event) -> Iterator[str]:
    for count in itertools.count():
        yield text
        if count * len(text) > 2 * STEP_TOKENS:  # the first step was acknowledged
            begun.set()


@pytest.fixture
def interrupted() -> Iterator[Callable[[threading.Event], None]]:
    """`interrupted(event)`: Ctrl-C for the main thread, once the event is set."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    over = threading.Event()
    threads: list[threading.Thread] = []

    def interrupt(begun: threading.Event) -> None:
        def run() -> None:
            begun.wait(60)
            if not over.is_set():
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        threads.append(threading.Thread(target=run))
        threads[-1].start()

    yield interrupt
    over.set()
    for thread in threads:
        thread.join(60)
    signal.signal(signal.SIGINT, before)


def observe_for_ever(session: SyncSession, begun: threading.Event) -> None:
    session.observe(endless(FACT, begun))


def generate_for_ever(session: SyncSession, begun: threading.Event) -> None:
    for _ in session.generate(FACT, max_new_tokens=10**9):
        begun.set()


@pytest.mark.parametrize("blocks", [observe_for_ever, generate_for_ever], ids=["observe", "generate"])
def test_an_interrupt_ends_a_call_and_what_was_acknowledged_stands(open_sync, interrupted, blocks) -> None:
    begun = threading.Event()
    with open_sync() as runtime:
        session = runtime.session("a")
        interrupted(begun)
        with pytest.raises(KeyboardInterrupt):
            blocks(session, begun)
        position = session.position
        assert position > 0
        # the session is free, and goes on where it stands
        assert session.observe("more").position == position + 4
    with open_sync() as runtime:
        session = runtime.session("a")
        assert session.position == position + 4
        assert session.history()[0].text.startswith(FACT)


def test_an_interrupt_leaves_the_with_block_soon(open_sync, interrupted) -> None:
    begun = threading.Event()

    def remember() -> None:
        with open_sync() as runtime:
            session = runtime.session("a")
            interrupted(begun)
            observe_for_ever(session, begun)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        remember()
    assert begun.is_set()
    assert time.monotonic() - began < 60
    with open_sync() as runtime:
        assert runtime.session("a").history()[0].text.startswith(FACT)


def test_an_interrupted_generation_says_how_it_ended(runtime: SyncRuntime, interrupted) -> None:
    begun = threading.Event()
    answer = runtime.session("a").generate(endless(FACT, begun))
    interrupted(begun)
    with pytest.raises(KeyboardInterrupt):
        next(answer)
    assert answer.finish_reason == "cancelled"
    assert list(answer) == []


# -- closing


def test_what_is_left_of_a_closed_runtime_says_so(open_sync) -> None:
    with open_sync() as runtime:
        session = runtime.session("a")
        session.observe(FACT)
        begun, untouched = session.generate("What", max_new_tokens=9), session.generate("What")
        next(begun)
    for call in (lambda: session.observe("x"), session.stats, lambda: next(untouched), lambda: runtime.session("a")):
        with pytest.raises(SessionError, match="is not open"):
            call()
    # ended with its session, as in async
    assert begun.finish_reason == "closed"
    assert list(begun) == []
    begun.close()
    with pytest.raises(SessionError, match="opened before"):
        runtime.__enter__()


def test_a_runtime_is_used_only_inside_its_with_block(open_sync) -> None:
    with pytest.raises(SessionError, match="is not open"):
        open_sync().session("a")


def test_an_error_of_opening_is_raised_where_it_was_opened(tmp_path: Path) -> None:
    with pytest.raises(memtier.ConfigError, match="no-such"), memtier.open_sync(tmp_path, model="./no-such"):
        pass


# -- objects


def test_a_session_is_the_same_object_however_it_is_asked_for(runtime: SyncRuntime, tmp_path: Path) -> None:
    session = runtime.session("a")
    session.observe(FACT)
    copy = session.fork("b")
    assert runtime.session("b") is copy
    assert runtime.session("a") is session
    session.export(tmp_path / "a.memory")
    imported = runtime.import_session(tmp_path / "a.memory", "c")
    assert runtime.session("c") is imported


def test_threads_that_ask_at_the_same_time_get_the_same_session(runtime: SyncRuntime) -> None:
    got: list[SyncSession] = []
    threads = [threading.Thread(target=lambda: got.append(runtime.session("a"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 8 and len(set(map(id, got))) == 1


def test_a_generation_is_closed_by_either_name(runtime: SyncRuntime) -> None:
    session = runtime.session("a")
    for name in ("close", "aclose"):
        answer = session.generate(FACT, max_new_tokens=9)
        next(answer)
        getattr(answer, name)()
        assert answer.finish_reason == "closed"


def test_one_session_reads_the_answer_of_another_as_it_is_written(runtime: SyncRuntime) -> None:
    first, second = runtime.session("a"), runtime.session("b")
    first.observe(FACT)
    answer = first.generate("What", max_new_tokens=5)
    second.observe(answer)
    assert answer.finish_reason == "length"
    assert second.history()[0].text == answer.text
    other = first.generate("What", max_new_tokens=5)
    assert list(second.generate(other, max_new_tokens=2)) is not None
    assert other.finish_reason == "length"


def test_a_blocking_call_from_within_another_is_refused_by_name(runtime: SyncRuntime) -> None:
    first, second = runtime.session("a"), runtime.session("b")
    with pytest.raises(SessionError, match="from within another one"):
        second.observe(piece.upper() for piece in first.generate(FACT, max_new_tokens=5))
    with pytest.raises(SessionError, match="from within another one"):
        first.observe(FACT, on_progress=lambda tokens, total: second.stats())
    with pytest.raises(SessionError, match="from within a call on it"):
        first.observe(first.generate(FACT))
    assert first.observe("x").tokens == 1
