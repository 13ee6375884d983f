"""The command line, run in this process with a tiny model of random weights."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import memtier
from memtier.cli import main
from memtier.errors import StorageFullError
from memtier.testing import tiny_model
from memtier.training.tokenizer import write_byte_tokenizer

TEXT = "The code for Bodiv is 4821. Nobody else knows it.\n" * 12


class Outcome(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on standard output."""
        [line] = self.out.splitlines()
        return json.loads(line)


Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two model folders whose weights differ."""
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp(f"model{seed}")
        tiny_model(seed, window_tokens=64, span_block_tokens=32).save_pretrained(folder)
        write_byte_tokenizer(folder)
        folders.append(folder)
    return folders[0], folders[1]


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: tuple[Path, Path]
) -> Run:
    """Runs a command in an empty folder; `model` commands get the tiny model."""
    monkeypatch.chdir(tmp_path)
    # tables are as wide as these say, and coloured
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str, model: Path | None = models[0]) -> Outcome:
        given = [*arguments, *(["--model", str(model)] if model else [])]
        with pytest.raises(SystemExit) as left:
            main(given)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return Outcome(int(left.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture
def streamed(run: Run, tmp_path: Path) -> Outcome:
    """A store that holds one session, "letter"."""
    (tmp_path / "letter.txt").write_text(TEXT)
    outcome = run("stream", "letter.txt", "--json")
    assert outcome.code == 0, outcome.err
    return outcome


def test_stream_tells_what_it_read(streamed: Outcome) -> None:
    assert streamed.json["session"] == "letter"
    assert streamed.json["bytes"] == len(TEXT)
    assert streamed.json["position"] == len(TEXT) + 1


def test_stream_goes_on_where_the_session_was(streamed: Outcome, run: Run) -> None:
    again = run("stream", "letter.txt", "--json")
    assert again.json["position"] == streamed.json["position"] + len(TEXT)


def test_recall_finds_a_passage_with_its_source(streamed: Outcome, run: Run) -> None:
    hits = run("recall", "letter", "code for Bodiv", "--json").json["hits"]
    assert "4821" in hits[0]["text"]
    assert hits[0]["source"] == "letter.txt"


def test_recall_prints_a_table(streamed: Outcome, run: Run) -> None:
    outcome = run("recall", "letter", "code for Bodiv")
    assert outcome.code == 0
    assert "4821" in outcome.out


@pytest.mark.parametrize("as_json", [["--json"], []], ids=["json", "table"])
def test_inspect_shows_the_four_tiers(streamed: Outcome, run: Run, as_json: list[str]) -> None:
    outcome = run("inspect", "letter", *as_json)
    assert outcome.code == 0
    assert all(tier in outcome.out for tier in ("weights", "state", "context", "storage"))


def test_inspect_changes_nothing_on_disk(streamed: Outcome, run: Run, tmp_path: Path) -> None:
    # A reader of SQLite's write-ahead log leaves the log's empty files behind; they hold nothing.
    def contents() -> dict[str, bytes]:
        files = [path for path in (tmp_path / "memory").rglob("*") if path.is_file() and path.name != "lock"]
        assert all(path.stat().st_size == 0 for path in files if path.name.endswith("-wal"))
        return {str(path): path.read_bytes() for path in files if not path.name.endswith(("-wal", "-shm"))}

    before = contents()
    assert run("inspect", "letter", "--json").code == 0
    assert run("sessions", "--json", model=None).code == 0
    assert contents() == before


def test_inspect_looks_at_a_session_that_is_held_elsewhere(
    streamed: Outcome, run: Run, models: tuple[Path, Path]
) -> None:
    with memtier.open_sync("memory", model=str(models[0])) as runtime:
        position = runtime.session("letter").observe("one line more\n").position
        memory = run("inspect", "letter", "--json").json
        assert memory["position"] == position
        assert memory["context"]["window_text"].endswith("one line more\n")
        assert run("recall", "letter", "code").code == 1


def test_sessions_lists_the_sessions_of_a_store(streamed: Outcome, run: Run) -> None:
    [session] = run("sessions", "--json", model=None).json["sessions"]
    assert session["id"] == "letter"
    assert session["position"] == streamed.json["position"]


def test_sessions_of_another_tenant_are_not_listed(streamed: Outcome, run: Run) -> None:
    assert run("sessions", "--json", "--tenant", "else", model=None).json["sessions"] == []


def test_chat_answers_every_line_of_a_pipe(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nand again\n"))
    outcome = run("chat", "--json", "--max-new-tokens", "3")
    assert outcome.code == 0, outcome.err
    said = [json.loads(line) for line in outcome.out.splitlines()]
    assert [turn["prompt"] for turn in said] == ["hello", "and again"]
    assert all(turn["finish_reason"] in {"stop", "length"} for turn in said)
    assert said[1]["position"] > said[0]["position"]


def test_the_demo_prints_one_object(run: Run) -> None:
    report = run("demo", "--json", "--bytes", "3000", "--facts", "4").json
    assert report["tokens_streamed"] > 3000
    assert report["tokens_per_second"] > 0
    assert len(report["device_bytes"]) == 4
    assert len(set(report["device_bytes"])) == 1
    assert set(report["bits_per_byte"]) == {"late", "fresh"}
    assert set(report["recall"]) == {"on", "off", "random", "recent"}
    assert report["resumed_at"] == report["closed_at"]


def test_the_demo_prints_tables(run: Run) -> None:
    outcome = run("demo", "--bytes", "3000", "--facts", "4")
    assert outcome.code == 0, outcome.err
    assert all(word in outcome.out for word in ("weights", "storage", "retrieval random", "opened again"))


def test_the_demo_keeps_a_store_that_was_named(run: Run) -> None:
    kept = ("--store", "kept", "--bytes", "2000", "--facts", "2")
    assert run("demo", *kept).code == 0
    [session] = run("sessions", "--store", "kept", "--json", model=None).json["sessions"]
    assert session["id"] == "demo"
    again = run("demo", *kept)
    assert again.code == 2
    assert "already holds a session 'demo'" in again.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--bytes", "99000000"], "CPython's manual holds"),
        (["demo", "--bytes", "0"], "Ask for 1 to"),
        (["demo", "--file", "nowhere.txt"], "nowhere.txt cannot be read: No such file"),
        (["demo", "--facts", "0"], "at least one"),
        (["stream", "nowhere.txt"], "nowhere.txt cannot be read: No such file"),
        (["stream", "."], "cannot be read: Is a directory"),
        (["stream", "latin.txt"], "latin.txt is not UTF-8 near byte 3"),
        (["stream", "empty.txt"], "empty.txt is empty"),
        (["stream"], "Missing argument"),
        (["nonsense"], "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_told_in_one_line_and_writes_nothing(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    outcome = run(*arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.out == ""
    assert not (tmp_path / "memory").exists()


@pytest.mark.parametrize("command", [["recall", "nobody", "x"], ["inspect", "nobody"]], ids=["recall", "inspect"])
def test_an_unknown_session_is_refused_and_not_made(streamed: Outcome, run: Run, command: list[str]) -> None:
    outcome = run(*command)
    assert outcome.code == 1
    assert "'nobody'" in outcome.err
    assert [info["id"] for info in run("sessions", "--json", model=None).json["sessions"]] == ["letter"]


def test_a_store_that_is_not_there_holds_no_session(run: Run, tmp_path: Path) -> None:
    assert run("inspect", "letter").code == 1
    assert run("sessions", "--json", model=None).json["sessions"] == []
    assert not (tmp_path / "memory").exists()


def test_a_store_of_another_model_is_refused(streamed: Outcome, run: Run, models: tuple[Path, Path]) -> None:
    outcome = run("stream", "letter.txt", model=models[1])
    assert outcome.code == 1
    assert "written by another model" in outcome.err


def test_a_store_that_is_a_file_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text(TEXT)
    outcome = run("stream", "letter.txt", "--store", "letter.txt")
    assert outcome.code == 2
    assert (tmp_path / "letter.txt").read_text() == TEXT


@pytest.mark.parametrize(
    "error", [StorageFullError("no space left in /memory"), OSError(errno.ENOSPC, "No space left on device")], ids=repr
)
def test_a_full_disk_is_told_in_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    (tmp_path / "letter.txt").write_text(TEXT)
    monkeypatch.setattr(memtier, "open_sync", fail)
    outcome = run("stream", "letter.txt")
    assert outcome.code == 1
    assert "no space left" in outcome.err


def test_help_and_version_load_no_model_library() -> None:
    program = (
        "import sys\nfrom memtier.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    print('torch' in sys.modules, file=sys.stderr)"
    )
    for argument in ("--help", "--version"):
        command = [sys.executable, "-P", "-c", program, argument]
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert result.stdout
        assert result.stderr.strip() == "False"


@pytest.mark.slow
def test_train_nano_writes_a_model_that_opens(run: Run, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "text.txt").write_text("".join(f"Line {i} of a small text to learn from.\n" for i in range(3000)))
    trained = run("train", "nano", "corpus", "--out", "made", "--steps", "2", "--json", model=None)
    assert trained.code == 0, trained.err
    assert trained.json["steps"] == 2
    (tmp_path / "letter.txt").write_text(TEXT)
    assert run("stream", "letter.txt", "--json", model=tmp_path / "made").code == 0
