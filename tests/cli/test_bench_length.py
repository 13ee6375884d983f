"""`memtier bench length`: stretches that double, ends that are the same text in every mode, runs not made twice."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from memtier.bench import length as bench
from memtier.bench.length import LengthOptions, run_length, stretches, table
from memtier.bench.rows import read_rows
from memtier.cli import app
from memtier.errors import ConfigError


def run(options: LengthOptions) -> dict:
    return run_length(options, lambda stage, done, total: None)


def test_stretches_double_and_end_with_the_text():
    assert stretches(5000) == [(0, 1024), (1024, 2048), (2048, 4096), (4096, 5000)]
    assert stretches(2048) == [(0, 1024), (1024, 2048)]


def test_a_curve_holds_every_mode_and_within_the_window_they_agree(tmp_path):
    out = tmp_path / "length.csv"
    curve = run(LengthOptions(3_000, modes=("on", "off", "fresh"), out=out))["curve"]
    assert [(row["from"], row["to"]) for row in curve] == [(0, 1024), (1024, 2048), (2048, 3000), (0, 3000)]
    assert all(1.0 < row[mode] < 8.0 for row in curve[:3] for mode in ("on", "off", "fresh"))
    # the whole, read once; to the byte it is the mean of stretches that are no longer than what is measured of them
    assert "fresh" not in curve[3]
    assert curve[3]["off"] == pytest.approx(sum((r["to"] - r["from"]) * r["off"] for r in curve[:3]) / 3000, rel=1e-3)
    # nothing was sealed long before the end of the first kilobyte that differs
    assert curve[0]["off"] == pytest.approx(curve[0]["fresh"], rel=0.02)
    assert curve[2]["on"] != curve[2]["off"]


def test_a_mode_that_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    asked = []

    def measure(data, ends, mode, options, on_progress):
        asked.append(mode)
        return [(start, end, 1024, 2.0) for start, end in ends]

    monkeypatch.setattr(bench, "_stream", measure)
    out = tmp_path / "length.csv"
    run(LengthOptions(3_000, modes=("on",), out=out))
    run(LengthOptions(3_000, modes=("on", "off"), out=out))
    assert asked == ["on", "off"]
    # a longer text replaces the shorter curve of that mode
    run(LengthOptions(5_000, modes=("on",), out=out))
    assert asked == ["on", "off", "on"]
    assert {row["to"] for row in read_rows(out) if row["mode"] == "on"} == {"1024", "2048", "4096", "5000"}
    assert table([]) == []


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="modes"):
        run(LengthOptions(3_000, modes=("sometimes",), out=tmp_path / "x.csv"))
    with pytest.raises(ConfigError, match="at least"):
        run(LengthOptions(100, out=tmp_path / "x.csv"))


def test_the_command_prints_one_json_document(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_stream", lambda data, ends, *a: [(start, end, 1024, 2.0) for start, end in ends])
    arguments = ["bench", "length", "--bytes", "3000", "--modes", "on", "--out", str(tmp_path / "l.csv"), "--json"]
    monkeypatch.setattr(sys, "argv", ["memtier", *arguments])
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["curve"][0]["on"] == 2.0
