"""The pages say what the code does: generated ones are fresh, public names are listed, links lead somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import memtier

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def generator() -> dict:
    return runpy.run_path(str(ROOT / "docs/generate.py"))


def test_the_generated_pages_are_up_to_date(generator: dict) -> None:
    assert generator["stale_pages"]() == [], "run: python -P docs/generate.py"


def test_every_command_is_documented(generator: dict) -> None:
    page = (ROOT / "docs/cli.md").read_text()
    from typer.main import get_command

    from memtier.cli import app

    commands = [path for path, _ in generator["_commands"]("memtier", get_command(app))]
    assert {"memtier demo", "memtier stream", "memtier chat", "memtier recall", "memtier inspect"} < set(commands)
    assert {"memtier sessions", "memtier train nano", "memtier bench stream"} < set(commands)
    for command in commands:
        assert f"# `{command}`\n" in page


def test_the_public_names_are_those_documented(generator: dict) -> None:
    documented = re.findall(r"^## `(\w+)`$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(documented) == sorted(memtier.__all__)


@pytest.mark.parametrize("name", sorted(memtier.__all__))
def test_a_public_name_exists_and_says_what_it_is(name: str) -> None:
    assert getattr(memtier, name).__doc__


def test_nothing_but_the_public_names_is_listed() -> None:
    assert {name for name in dir(memtier) if not name.startswith("_")} >= set(memtier.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_what_comes_in_a_later_version_is_not_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert not re.search(r"\b(checkpoint|restore|fork|forget|doctor)\b", text)
