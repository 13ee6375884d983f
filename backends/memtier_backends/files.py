"""Files that survive a crash (write whole, flush, rename, flush the folder), and errno told as our errors."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memtier.errors import StorageError, StorageFullError

__all__ = ["TEMPORARY_SUFFIX", "flush", "flush_folder", "storage_errors", "write_whole"]

TEMPORARY_SUFFIX = ".tmp"

_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def storage_errors(action: str) -> Iterator[None]:
    """Tell an OSError as StorageFullError or StorageError; `action` completes "cannot ..."."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError(
                f"cannot {action}: no space is left ({error.strerror}). What was acknowledged is safe; "
                "free some space and call again."
            ) from error
        raise StorageError(
            f"cannot {action}: {error.strerror or error}. Check the folder and its permissions, then call again."
        ) from error


def flush(descriptor: int) -> None:
    """Force a file's bytes to the device; fsync on macOS stops at the drive's cache, F_FULLFSYNC does not."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def flush_folder(folder: Path) -> None:
    """Make renames, creations and deletions in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that after a crash all of it is there, or what was there before. Durable on return.

    Raises:
        OSError: as the system gave it; the temporary file is gone and `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            rest = memoryview(data).cast("B")
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            flush(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)
