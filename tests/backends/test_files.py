"""What is told of files that other threads write."""

import os
import threading
from pathlib import Path

from memtier_backends.files import bytes_under


def test_a_file_counts_once_whatever_its_names(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "below").mkdir()
    os.link(tmp_path / "a", tmp_path / "below" / "b")
    (tmp_path / "below" / "c").write_bytes(b"123")
    (tmp_path / "reserve").write_bytes(b"1234567")
    assert bytes_under(tmp_path) == 15
    assert bytes_under(tmp_path, but="reserve") == 8


def test_files_and_folders_that_go_meanwhile_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "stays").write_bytes(b"12345")
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            folder = tmp_path / "goes"
            folder.mkdir()
            for n in range(20):
                (folder / str(n)).write_bytes(b"1")
            for n in range(20):
                (folder / str(n)).unlink()
            folder.rmdir()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        sizes = [bytes_under(tmp_path) for _ in range(500)]
    finally:
        ended.set()
        thread.join()
    assert set(sizes) <= set(range(5, 26))
    assert max(sizes) > 5, "nothing came while they were counted"
