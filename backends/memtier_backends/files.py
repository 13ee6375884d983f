"""Files that survive a crash (write whole, flush, rename, flush the folder), and errno told as our errors."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from memtier.errors import StorageError, StorageFullError

__all__ = [
    "NO_LINKS",
    "TEMPORARY_SUFFIX",
    "bytes_under",
    "files_under",
    "flush",
    "flush_folder",
    "link_or_copy",
    "storage_errors",
    "write_whole",
]

TEMPORARY_SUFFIX = ".tmp"

_FULL = {errno.ENOSPC, errno.EDQUOT}
# Why a file may have no second name: another disk, a disk without links, too many of them.
NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EMLINK}


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


def link_or_copy(source: Path, target: Path) -> None:
    """Give an immutable file a second name, or copy it where links fail; a target that is there stays.

    The folder is the caller's to flush.

    Raises:
        OSError: as the system gave it.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        write_whole(target, source.read_bytes())


def bytes_under(folder: Path, *, but: str | None = None) -> int:
    """Bytes of all files in a folder and below, but for those of one name. A file with several names there counts once,
    one that another thread deletes meanwhile not at all.

    Raises:
        OSError: as the system gave it.
    """

    found: dict[tuple[int, int], int] = {}
    for path in files_under(folder):
        if path.name != but:
            with suppress(FileNotFoundError):
                stat = path.lstat()
                found[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(found.values())


def files_under(folder: Path) -> Iterator[Path]:
    """Every file in a folder and below; a folder that another thread deletes meanwhile, or that is not there, has none.

    Raises:
        OSError: as the system gave it.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for here, _, names in os.walk(folder, onerror=refuse):
        for name in names:
            yield Path(here, name)


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
