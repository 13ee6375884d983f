"""`memtier bench durability`: every number is there and makes sense; a wrong length is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memtier.bench.durability import DurabilityOptions, run_durability
from memtier.errors import ConfigError
from memtier.testing import tiny_model
from memtier.training.tokenizer import write_byte_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model(window_tokens=64, span_block_tokens=32).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return str(folder)


def test_it_measures_what_it_says(tmp_path: Path, model: str) -> None:
    stages = []
    options = DurabilityOptions(
        lengths=(1000, 2500), distances=(200, 2000), snapshot_every_tokens=512, commits=5, repeat=2, model=model
    )
    report = run_durability(tmp_path, options, lambda stage, done, total: stages.append(stage))
    json.dumps(report)
    assert set(report["acknowledgements_per_second"]) == {"token", "turn of 16 tokens", "flush of 4 KiB"}
    assert set(report["open_seconds"]) == {1000, 2500}
    assert all(0 <= crash["tokens_read_again"] <= 512 for crash in report["open_after_a_crash"].values())
    near, far = report["forget"][200], report["forget"][2000]
    assert near["tokens_read_again"] < far["tokens_read_again"]
    for name in ("fork", "checkpoint", "restore", "export", "import"):
        assert report[f"{name}_seconds"] > 0
    assert report["disk_bytes_per_token"] > report["fork_bytes_per_token"] > 0
    assert set(stages) == {"reading", "forgetting"}


@pytest.mark.parametrize("lengths", [(2000, 1000), (10,), (10**9,)], ids=str)
def test_lengths_that_cannot_be_are_refused(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="lengths"):
        run_durability(tmp_path, DurabilityOptions(lengths=lengths), lambda *_: None)
