"""`memtier bench stream`, short, with a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from memtier.bench.machine import resident_bytes
from memtier.bench.stream import StreamOptions, run_stream
from memtier.errors import ConfigError
from memtier.testing import tiny_model
from memtier.training.tokenizer import write_byte_tokenizer

SHORT = {"early_tokens": 2_600, "baseline_tokens": 4_000, "late_tokens": 6_000, "stretch_steps": 4}


def test_the_bench_reports_cost_memory_disk_and_where_it_ran(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    write_byte_tokenizer(model)
    seen: list[tuple[str, int, int]] = []
    options = StreamOptions(**SHORT, model=str(model), hot_bytes=0)
    report = run_stream(tmp_path / "store", options, lambda *stage: seen.append(stage))
    assert report["seconds_per_token"]["late_over_early"] > 0
    assert report["resident_bytes"]["growth"] == report["resident_bytes"]["late"] - report["resident_bytes"]["baseline"]
    assert report["disk_bytes_per_text_byte"] > 1
    assert report["selected_from_disk"] > 0.5
    assert {"processor", "cores", "versions", "commit"} <= set(report["machine"])
    assert seen[-1][1] == seen[-1][2]


@pytest.mark.parametrize("change", [{"early_tokens": 1}, {"baseline_tokens": 7_000}, {"late_tokens": 99_000_000}])
def test_positions_that_cannot_be_measured_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        run_stream(tmp_path, StreamOptions(**{**SHORT, **change}), lambda *_: None)


def test_resident_memory_grows_with_what_is_held() -> None:
    before = resident_bytes()
    held = bytearray(b"x" * (64 << 20))
    assert resident_bytes() - before > 32 << 20
    assert len(held) == 64 << 20
