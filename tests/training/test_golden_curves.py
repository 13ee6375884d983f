"""Tiny runs of each recipe follow the loss curves that are kept beside this file.

After a change that is meant to move them: python -m memtier.training.golden tests/training/golden
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from memtier.errors import CorruptMemoryError
from memtier.training import golden
from memtier.training.golden import RUNS, Curve, differences, main, read_curve, run_golden

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    return {name: run_golden(name, tmp_path_factory.mktemp(name)) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_trains_as_it_did(name: str, curves: dict[str, Curve]) -> None:
    assert differences(curves[name], read_curve(GOLDEN / f"{name}.csv")) == [], "see the docstring of this file"


def test_curves_cover_dense_and_chosen_spans_and_pieces() -> None:
    rows = [row for name in RUNS for row in read_curve(GOLDEN / f"{name}.csv")]
    assert {row["far_attention"] for row in rows} == {"dense", "span"}
    assert len({row["span_refresh_tokens"] for row in rows}) > 2
    assert any(int(row["piece_tokens"]) < int(row["sequence_tokens"]) for row in rows)


def test_another_learning_rate_moves_the_curve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = golden.FitSettings
    monkeypatch.setattr(golden, "FitSettings", lambda **given: replace(original(**given), weight_decay=1.0))
    moved = differences(run_golden("lm", tmp_path), read_curve(GOLDEN / "lm.csv"))
    assert moved and all("loss" in line or "gradient_norm" in line for line in moved)


def test_another_number_of_rows_or_another_file_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curve = read_curve(GOLDEN / "lm.csv")
    assert "rows" in differences(curve[:-1], curve)[0]
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(CorruptMemoryError, match="gradient_norm"):
        read_curve(tmp_path / "x.csv")
    assert main([]) == 2
    assert "FOLDER" in capsys.readouterr().err
