"""`memtier bench decode`, short, with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memtier.bench.decode import DecodeOptions, run_decode
from memtier.cli import main
from memtier.errors import ConfigError
from memtier.testing import tiny_model
from memtier.training.tokenizer import write_byte_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    write_byte_tokenizer(folder)
    return str(folder)


def test_the_bench_compares_retrieval_and_batches_in_one_run(tmp_path: Path, model: str) -> None:
    seen: list[tuple[str, int, int]] = []
    options = DecodeOptions(sessions=(1, 3), tokens=6, rounds=2, context_bytes=200, model=model)
    report = run_decode(tmp_path / "store", options, lambda *stage: seen.append(stage))
    one = report["one_session"]
    assert all(one[name] > 0 for name in ("tokens_per_second_on", "tokens_per_second_off", "on_over_off"))
    assert set(report["sessions"]) == {"1", "3"}
    assert report["sessions"]["1"]["tokens_a_forward"] == 1
    assert report["sessions"]["3"]["tokens_a_forward"] > 1
    assert {"processor", "cores", "versions", "commit"} <= set(report["machine"])
    assert seen[-1] == ("3 sessions", 2, 2)


def test_the_command_prints_one_json_object(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "decode", "--sessions", "2", "--tokens", "3", "--rounds", "1", "--context-bytes", "60",
              "--model", model, "--json"])  # fmt: skip
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["settings"]["sessions"] == [2]


@pytest.mark.parametrize("change", [{"sessions": (0,)}, {"sessions": ()}, {"tokens": 0}, {"rounds": 0}])
def test_counts_that_cannot_be_measured_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        run_decode(tmp_path, DecodeOptions(**change), lambda *_: None)


def test_sessions_that_are_no_counts_are_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "decode", "--sessions", "many"])
    assert end.value.code == 2
    assert "1,2,4,8" in capsys.readouterr().err
