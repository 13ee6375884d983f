"""`memtier bench facts`: six conditions of one exam, an oracle that is one, and runs that are not made twice."""

from __future__ import annotations

import csv
import sys

import pytest
import torch
from typer.testing import CliRunner

from memtier.bench import facts as bench
from memtier.bench.facts import CONDITIONS, FactsOptions, run_facts, summarise
from memtier.bench.text import load_text, plant
from memtier.cli import app
from memtier.errors import ConfigError
from memtier.training.facts import make_facts
from memtier.training.wordings import WORDINGS


def run(options: FactsOptions) -> dict:
    return run_facts(options, lambda stage, done, total: None)


def test_an_exam_has_every_condition_and_only_chosen_blocks_are_hits(tmp_path):
    out = tmp_path / "facts.csv"
    report = run(FactsOptions(6_000, facts=6, seeds=1, out=out))
    found = {row["condition"]: row for row in report["summary"]}
    assert tuple(found) == CONDITIONS
    assert all(row["asked"] == 6 for row in found.values())
    # the facts lie 5,400 bytes back, and nothing of them is in the window
    assert found["off"]["right"] == 0
    assert found["oracle"]["right"] > 0.5
    assert found["pasted"]["right"] > 0.5
    assert found["recent"]["block_hit"] == 0
    assert found["on"]["block_hit"] > 0.5
    with out.open() as file:
        assert len(list(csv.DictReader(file))) == len(CONDITIONS)


def test_finished_exams_are_not_held_again(tmp_path, monkeypatch):
    held = []

    def exam(text, options, wording, seed, on_progress):
        held.append((wording, seed))
        same = {"asked": 16, "right": 4 * seed, "blocks": 9, "block_hit": "", "late_bits": "2.2", "fresh_bits": "2.0"}
        return [{"condition": condition, **same} for condition in CONDITIONS]

    monkeypatch.setattr(bench, "_exam", exam)
    out = tmp_path / "facts.csv"
    run(FactsOptions(6_000, seeds=1, out=out))
    report = run(FactsOptions(6_000, seeds=3, wordings=("plain", "unseen"), out=out))
    assert held == [("plain", 0), ("plain", 1), ("plain", 2), ("unseen", 0), ("unseen", 1), ("unseen", 2)]
    plain = next(row for row in report["summary"] if row["condition"] == "on")
    assert (plain["seeds"], plain["right"], plain["lowest"], plain["highest"]) == (3, 0.25, 0.0, 0.5)
    assert plain["late_over_fresh_bits"] == pytest.approx(1.1)


def test_the_place_of_a_code_is_found_in_every_wording():
    for wording in WORDINGS:
        facts = make_facts(40, seed=5)
        text = plant(load_text(None, 20_000), facts, 5, between=(0.0, 0.1), wording=wording)
        for fact in facts:
            at = bench._byte_of(text, fact)
            assert text.encode()[at : at + 4] == fact.code.encode()
            assert fact.name in text.encode()[max(0, at - 100) : at].decode()


def test_the_oracle_takes_the_places_of_the_worst():
    ids, scores = torch.tensor([2, 5, 9, -1]), torch.tensor([3.0, 1.0, 2.0, float("-inf")])
    assert bench._with([4], ids, scores)[0].tolist() == [2, 4, 5, 9]
    assert bench._with([4, 6], ids, scores)[0].tolist() == [2, 4, 6, 9]
    assert bench._with([9], ids, scores)[0].tolist() == [2, 5, 9, -1]


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="wordings"):
        run(FactsOptions(6_000, wordings=("polite",), out=tmp_path / "x.csv"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="seeds"):
        run(FactsOptions(6_000, seeds=0, out=tmp_path / "x.csv"))
    assert summarise([]) == []


def test_the_command_prints_one_json_document(tmp_path, monkeypatch):
    rows = [
        {"condition": c, "asked": 1, "right": 1, "blocks": 1, "block_hit": "", "late_bits": "1", "fresh_bits": "1"}
        for c in CONDITIONS
    ]
    monkeypatch.setattr(bench, "_exam", lambda *a: rows)
    arguments = ["bench", "facts", "--bytes", "6000", "--seeds", "1", "--out", str(tmp_path / "f.csv"), "--json"]
    monkeypatch.setattr(sys, "argv", ["memtier", *arguments])
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert '"wording": "plain"' in done.output
