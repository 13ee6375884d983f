"""`memtier bench durability`: every number is there and makes sense; a wrong length is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import memtier
from memtier.bench.durability import DurabilityOptions, run_durability
from memtier.bench.rows import read_rows
from memtier.bench.stretch import stretch
from memtier.errors import ConfigError
from memtier.testing import tiny_model
from memtier.training.tokenizer import write_byte_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(window_tokens=64, span_block_tokens=32, span_refresh_tokens=16).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return str(folder)


def test_it_measures_what_it_says(tmp_path: Path, model: str) -> None:
    stages = []
    options = DurabilityOptions(
        lengths=(1000, 2500), distances=(200, 2000), snapshot_every_tokens=512, commits=5, repeat=2, model=model,
        random_tokens=6_000, out=tmp_path / "durability.csv",
    )  # fmt: skip
    report = run_durability(tmp_path, options, lambda stage, done, total: stages.append(stage))
    json.dumps(report)
    assert set(report["acknowledgements_per_second"]) == {"token", "turn of 16 tokens", "flush of 4 KiB"}
    assert set(report["open_seconds"]) == {1000, 2500}
    assert all(0 <= crash["tokens_read_again"] <= 512 for crash in report["open_after_a_crash"].values())
    near, far = report["forget"][200], report["forget"][2000]
    assert near["tokens_read_again"] < far["tokens_read_again"]
    for name in ("fork", "checkpoint", "restore", "export", "import"):
        assert report[f"{name}_seconds"]["seconds"] > 0
    assert report["disk_bytes_per_token"] > report["fork_bytes_per_token"] > 0
    assert set(stages) == {"reading", "forgetting", "making"}
    made = report["random_tokens"]
    assert made["tokens"] == 6_000 and made["segments"] > 0
    rows = read_rows(tmp_path / "durability.csv")
    assert {row["what"] for row in rows if row["of"] == "random numbers"} == {"open", "fork", "open a fork"}
    assert {row["tokens"] for row in rows if row["what"] == "open"} == {"1000", "2500", "6000"}


def test_a_session_that_was_stretched_can_be_read_on(tmp_path: Path, model: str) -> None:
    with memtier.open_sync(tmp_path, model=model, config=memtier.MemoryConfig(snapshot_every_tokens=1024)) as runtime:
        session = runtime.session("a")
        session.observe("ab" * 1023 + "c")  # one token begins every text
        session._loop.call(stretch, session._inner, 6 * 1024, lambda *_: None)
        session.close()
        again = runtime.session("a")
        assert again.position == 6 * 1024 and again._inner.timeline.restored_from == 6 * 1024
        again.observe("and so on")
        again.close()
        (health,) = runtime.doctor(full=True)
        assert health.healthy, health
        with pytest.raises(ConfigError, match="whole steps"):
            runtime.session("a")._loop.call(stretch, runtime.session("a")._inner, 10_000, lambda *_: None)


@pytest.mark.parametrize("lengths", [(2000, 1000), (10,), (10**9,)], ids=str)
def test_lengths_that_cannot_be_are_refused(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="lengths"):
        run_durability(tmp_path, DurabilityOptions(lengths=lengths), lambda *_: None)
