"""What the documentation and examples show works: each is run as it stands."""

from __future__ import annotations

import re
import runpy
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def python_blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


def test_the_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    [example] = python_blocks("README.md")
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    assert "letter.txt The code for Bodiv is 4821." in capsys.readouterr().out


def test_the_pieces_of_the_tasks_page_run_as_one_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    opening, *pieces = python_blocks("docs/tasks.md")
    whole = [piece for piece in pieces if piece.startswith("import ")]
    inside = [textwrap.indent(piece, "    ") for piece in pieces if piece not in whole]
    assert len(inside) >= 5
    for program in (opening + "".join(inside), *whole):
        exec(compile(program, "docs/tasks.md", "exec"), {"__name__": "tasks"})
    assert "letter.txt {'page': 3} The code for Bodiv" in capsys.readouterr().out
