"""Immutable files by name in a folder: put whole, read by range, listed, deleted.

Files are never memory-mapped: a file truncated under a map is a SIGBUS, not an error.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from memtier.errors import ConfigError, CorruptMemoryError
from memtier_backends.files import TEMPORARY_SUFFIX, flush_folder, storage_errors, write_whole
from memtier_backends.tensors import ADVICE

__all__ = ["FileSegmentStore"]

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


class FileSegmentStore:
    """SegmentStore in a folder of a local disk, which is made if missing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with storage_errors(f"make the folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            # Each time, for whoever made it may have died before this.
            flush_folder(folder.parent)

    @property
    def folder(self) -> Path:
        return self._folder

    def put(self, name: str, data: bytes | memoryview) -> None:
        path = self._path(name)
        with storage_errors(f"write {path}"):
            write_whole(path, data)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        path = self._path(name)
        if offset < 0 or (length is not None and length < 0):
            raise ConfigError(f"the range is offset {offset}, length {length}; neither may be negative.")
        with storage_errors(f"read {path}"):
            descriptor = self._open(path)
            try:
                size = os.fstat(descriptor).st_size
                end = size if length is None else offset + length
                data = _read_range(descriptor, offset, end)
            finally:
                os.close(descriptor)
        if len(data) != end - offset:
            raise CorruptMemoryError(
                f"{path} is truncated: bytes {offset} to {end} were asked for, and it has {size}. {ADVICE}"
            )
        return data

    def list(self) -> list[str]:
        with storage_errors(f"list {self._folder}"):
            return sorted(name for name in os.listdir(self._folder) if _NAME.fullmatch(name))

    def delete(self, name: str) -> None:
        path = self._path(name)
        with storage_errors(f"delete {path}"):
            path.unlink(missing_ok=True)
            flush_folder(self._folder)

    def size(self, name: str) -> int:
        path = self._path(name)
        with storage_errors(f"read {path}"):
            try:
                return path.stat().st_size
            except FileNotFoundError as error:
                raise _missing(path) from error

    def clean(self) -> list[str]:
        with storage_errors(f"clean {self._folder}"):
            left = sorted(
                name for name in os.listdir(self._folder) if name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)
            )
            for name in left:
                (self._folder / name).unlink(missing_ok=True)
            if left:
                flush_folder(self._folder)
        return left

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"the file name is {name!r}; it must be letters, digits, '-', '_' and '.', and not begin with '.'."
            )
        return self._folder / name

    def _open(self, path: Path) -> int:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise _missing(path) from error


def _read_range(descriptor: int, offset: int, end: int) -> bytes:
    """Bytes [offset, end), fewer where the file ends. One pread may return less than was asked for."""
    pieces: list[bytes] = []
    while offset < end:
        piece = os.pread(descriptor, end - offset, offset)
        if not piece:
            break
        pieces.append(piece)
        offset += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _missing(path: Path) -> CorruptMemoryError:
    return CorruptMemoryError(f"{path} is missing, though the session's journal names it. {ADVICE}")
