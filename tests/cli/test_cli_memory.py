"""Keeping, copying and moving sessions from the command line, with a tiny model of random weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from memtier import console
from memtier.cli import main
from memtier.testing import tiny_model
from memtier.timeline import Timeline
from memtier.training.tokenizer import write_byte_tokenizer

TEXT = "The code for Bodiv is 4821. Nobody else knows it.\n" * 6

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(window_tokens=64, span_block_tokens=32).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path) -> Run:
    """`run(*arguments)` with --json: the object that was printed, or (exit code, message)."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT)
    without_a_model = {"checkpoints", "sessions", "delete"}

    def run(*arguments: str, plain: bool = False) -> Any:
        options = [] if arguments[0] in without_a_model else ["--model", str(model)]
        with pytest.raises(SystemExit) as left:
            main([*arguments, *options, *([] if plain else ["--json"])])
        told = capsys.readouterr()
        if left.value.code:
            return left.value.code, told.err
        return told.out if plain else json.loads(told.out)

    return run


def test_keeping_and_going_back(run: Run) -> None:
    position = run("stream", "a.txt")["position"]
    assert run("checkpoint", "a", "before")["position"] == position
    assert run("stream", "a.txt")["position"] == 2 * position - 1
    (kept,) = run("checkpoints", "a")["checkpoints"]
    assert (kept["name"], kept["position"]) == ("before", position)
    assert run("restore", "a", "before") == {
        "session": "a", "checkpoint": "before", "was_at": 2 * position - 1, "position": position
    }  # fmt: skip
    assert "before" in run("checkpoints", "a", plain=True)
    code, message = run("restore", "a", "after")
    assert code == 1 and "no checkpoint 'after'" in message


def test_forking_and_moving(run: Run) -> None:
    position = run("stream", "a.txt")["position"]
    assert run("fork", "a", "b") == {"session": "b", "forked_from": "a", "position": position}
    assert run("export", "b", "b.memtier")["bytes"] == Path("b.memtier").stat().st_size
    assert run("import", "b.memtier", "--session", "c", "--store", "elsewhere")["position"] == position
    assert [s["id"] for s in run("sessions")["sessions"]] == ["a", "b"]
    assert [s["id"] for s in run("sessions", "--store", "elsewhere")["sessions"]] == ["c"]
    assert "4821" in run("recall", "c", "Bodiv", "--store", "elsewhere")["hits"][0]["text"]


def test_reading_again_shows_a_bar_and_leaves_json_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    position = run("stream", "a.txt")["position"]
    run("checkpoint", "a", "kept")
    # as on a terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    told: list[tuple[str, int, int]] = []
    bar = console.progress

    @contextmanager
    def watched() -> Iterator[Callable[[str, int, int], None]]:
        with bar() as update:

            def tell(stage: str, done: int, total: int) -> None:
                told.append((stage, done, total))
                update(stage, done, total)

            yield tell

    monkeypatch.setattr(console, "progress", watched)
    assert run("checkpoints", "a")["checkpoints"] and told == []

    async def damaged(*_: Any) -> bool:
        return False

    monkeypatch.setattr(Timeline, "_load", damaged)
    assert "4821" in run("recall", "a", "Bodiv")["hits"][0]["text"]
    assert told[-1] == ("reading again", position, position)
    told.clear()
    assert run("restore", "a", "kept")["position"] == position
    assert told[-1] == ("reading again", position, position)


def test_history_lists_the_turns(run: Run) -> None:
    position = run("stream", "a.txt")["position"]
    (turn,) = run("history", "a")["turns"]
    assert (turn["role"], turn["source"], turn["start"], turn["end"]) == ("user", "a.txt", 0, position)
    assert turn["text"] == TEXT
    assert "Bodiv" in run("history", "a", plain=True)


@pytest.mark.parametrize(
    "command", [("checkpoint", "x", "n"), ("checkpoints", "x"), ("restore", "x", "n"), ("fork", "x", "y"),
                ("export", "x", "f"), ("history", "x")], ids=lambda command: command[0],
)  # fmt: skip
def test_a_session_that_is_not_there_is_never_made(run: Run, command: tuple[str, ...]) -> None:
    code, message = run(*command)
    assert code == 1 and "no session 'x'" in message
    assert not Path("memory").exists()


def test_forgetting_proves_it(run: Run) -> None:
    Path("b.txt").write_text("It rained on the hills. " * 8 + "The code for Tavik is 3077, says Mira. " + TEXT)
    position = run("stream", "b.txt")["position"]
    told = run("forget", "b", "Tavik Mira")
    assert "Tavik" in told["text"] and told["proof"]["proven"]
    assert told["position"] == position - told["tokens"]
    assert run("recall", "b", "Tavik")["hits"] == []
    code, message = run("forget", "b", "Tavik")
    assert code == 1 and "nothing was forgotten" in message
    assert run("forget", "b", "--start", "3", "--end", "9", "--no-verify")["proof"] is None
    code, message = run("forget", "b", "--start", "3")
    assert code == 2 and "exactly one" in message


def test_deleting_names_the_forks(run: Run) -> None:
    run("stream", "a.txt")
    run("fork", "a", "b")
    assert run("delete", "a") == {"deleted": ["a"], "still_held_by": ["b"]}
    code, message = run("delete", "a")
    assert code == 1 and "no session 'a'" in message
    assert run("delete", "--all")["deleted"] == ["b"]
    assert run("sessions")["sessions"] == []
    code, message = run("delete")
    assert code == 2 and "exactly one" in message


def test_the_doctor_finds_and_mends(run: Run) -> None:
    run("stream", "a.txt")
    assert run("doctor", "--full")["sessions"][0]["findings"] == []
    (stray, *_) = Path("memory").glob("*/*/segments")
    (stray / "stray.bin").write_text("x")
    code, _ = run("doctor", "a")
    assert code == 1
    (health,) = run("doctor", "a", "--rebuild")["sessions"]
    assert health["healthy"] and health["findings"][0]["mended"]
    assert "as it was written" in run("doctor", plain=True)
    code, message = run("doctor", "b")
    assert code == 1 and "no session 'b'" in message


def test_a_session_that_lost_its_journal_is_not_taken_for_one_that_never_was(run: Run) -> None:
    run("stream", "a.txt")
    (journal,) = Path("memory").glob("*/*/journal.sqlite3")
    journal.unlink()
    code, message = run("doctor", "a")
    assert code == 1 and "no session" not in message
    code, message = run("inspect", "a")
    assert code == 1 and "journal.sqlite3 is missing" in message
