"""What is told of files that other threads write."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memtier_backends.files import bytes_under


def test_a_file_counts_once_whatever_its_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "below").mkdir()
    os.link(tmp_path / "a", tmp_path / "below" / "b")
    (tmp_path / "below" / "c").write_bytes(b"123")
    (tmp_path / "reserve").write_bytes(b"1234567")
    assert bytes_under(tmp_path) == 15
    assert bytes_under(tmp_path, but="reserve") == 8


def test_files_and_folders_that_go_meanwhile_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stays").write_bytes(b"12345")
    (tmp_path / "goes").write_bytes(b"123")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "goes").write_bytes(b"1")
    assert bytes_under(tmp_path) == 9
    walk = os.walk

    def walk_while_they_go(folder: Path, **options: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        for listed in walk(folder, **options):
            if listed[0] == str(folder):
                # both were listed, neither was looked at
                (tmp_path / "goes").unlink()
                shutil.rmtree(tmp_path / "below")
            yield listed

    monkeypatch.setattr(os, "walk", walk_while_they_go)
    assert bytes_under(tmp_path) == 5
    assert not (tmp_path / "goes").exists()
    assert not (tmp_path / "below").exists()


def test_any_other_error_of_the_system_is_raised(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    with pytest.raises(NotADirectoryError):
        bytes_under(tmp_path / "file")
