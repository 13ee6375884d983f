"""`memtier bench kernels`: what it times, what it refuses to time, and what it says where there is no device."""

from __future__ import annotations

import csv
import sys

import pytest
import torch
from typer.testing import CliRunner

from memtier.bench.kernels import KernelOptions, run_kernels
from memtier.cli import app
from memtier.errors import ConfigError


def run(options: KernelOptions) -> dict:
    return run_kernels(options, lambda stage, done, total: None)


def test_a_case_is_checked_timed_and_written_down(tmp_path):
    out = tmp_path / "cpu.csv"
    report = run(KernelOptions("cpu", only="innovation, reference", seconds=0.01, out=out))
    checks, timed = report["rows"][:-1], report["rows"][-1]
    assert checks
    assert all(row["status"].startswith("passed") for row in checks)
    assert timed["status"] == "measured"
    assert float(timed["low_ms"]) <= float(timed["median_ms"]) <= float(timed["high_ms"])
    with out.open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == [row["status"] for row in report["rows"]]


def test_an_op_whose_checks_are_red_is_not_timed(tmp_path, monkeypatch):
    options = KernelOptions("cpu", only="innovation, reference", seconds=0.01, out=tmp_path / "cpu.csv")
    run(options)
    # the benchmark is a file of the checkout: loaded anew by each run, so its door is broken where it looks it up
    monkeypatch.setattr("memtier_kernels.testing.compare", lambda *a, **k: {"out.0": 1e-3})
    report = run(options)
    assert report["failed"] == len(report["rows"])
    assert not any(row["median_ms"] for row in report["rows"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_its_cases_are_written_down_as_not_measured(tmp_path):
    report = run(KernelOptions("cuda", out=tmp_path / "cuda.csv"))
    assert {row["status"] for row in report["rows"]} == {"not measured"}
    assert {"span_attention", "ssd", "causal_conv1d", "landmarks", "innovation"} <= {
        row["op"] for row in report["rows"]
    }


def test_a_name_that_no_case_has_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no case"):
        run(KernelOptions("cpu", only="no such thing", out=tmp_path / "x.csv"))


def test_the_command_prints_json_and_fails_for_a_red_op(tmp_path, monkeypatch):
    arguments = ["bench", "kernels", "--device", "cpu", "--only", "innovation, ref", "--seconds", "0.01", "--json"]
    arguments += ["--out", str(tmp_path / "cpu.csv")]
    monkeypatch.setattr(sys, "argv", ["memtier", *arguments])
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert '"status": "measured"' in done.stdout
    monkeypatch.setattr("memtier_kernels.testing.compare", lambda *a, **k: {"out.0": 1e-3})
    assert CliRunner().invoke(app, arguments).exit_code == 1
