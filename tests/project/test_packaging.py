"""What the packaging promises: one version, no shadowing folder names, importing does no work."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str) -> str:
    """Run code in a fresh interpreter whose path does not hold the current folder; its standard output."""
    result = subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_version_is_that_of_the_newest_changelog_heading() -> None:
    newest = re.search(r"^## (\S+)", (ROOT / "docs/changelog.md").read_text(), re.MULTILINE)
    assert newest
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == newest[1]
    assert importlib.metadata.version("memtier") == newest[1]


@pytest.mark.parametrize("name", ["kernels", "backends"])
def test_a_folder_of_the_repository_is_not_importable(name: str) -> None:
    assert importlib.util.find_spec(name) is None, (
        "the repository's root is on the path: run pytest, not python -m pytest"
    )
    assert python(f"import importlib.util, memtier; print(importlib.util.find_spec({name!r}))") == "None"


@pytest.mark.parametrize(
    "file", ["conftest.py", "kernels/__init__.py", "backends/__init__.py", "tests/__init__.py", "tests/conftest.py"]
)
def test_a_file_that_would_put_the_root_on_the_path_does_not_exist(file: str) -> None:
    assert not (ROOT / file).exists()


def test_test_files_have_unique_names_and_no_packages() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert "__init__.py" not in names
    assert sorted(names) == sorted(set(names))


def test_importing_memtier_does_no_work() -> None:
    heavy = "torch transformers lancedb pyarrow pydantic anyio numpy"
    assert python(f"import sys, memtier; print([m for m in {heavy!r}.split() if m in sys.modules])") == "[]"


@pytest.mark.parametrize("package", ["memtier", "memtier_kernels", "memtier_backends"])
def test_a_package_ships_its_types(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec
    assert spec.origin
    assert (Path(spec.origin).parent / "py.typed").exists()


def test_the_top_level_holds_what_it_should() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} == {
        *("pyproject.toml", "README.md", "LICENSE"),
        *("memtier", "kernels", "backends", "tests", "examples", "docs"),
    }
