"""One owner a session: an flock on its lock file, which the kernel frees when the owner dies, however it dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from memtier.errors import SessionBusyError
from memtier_backends.files import flush_folder, storage_errors

__all__ = ["SessionLock"]


class SessionLock:
    """The right to write to a session. No lease and no clock: held until released or until the process is gone.

    The lock belongs to an open file, so a second `acquire` is refused in the same process too.
    """

    @classmethod
    def acquire(cls, folder: Path) -> SessionLock:
        """Take the lock of a session's folder, which is made if missing.

        Raises:
            SessionBusyError: someone holds it; the message names the process and the host.
        """
        path = folder / "lock"
        with storage_errors(f"lock the session in {folder}"):
            while True:
                try:
                    folder.mkdir(parents=True, exist_ok=True)
                    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                except FileNotFoundError:
                    # the owner before us is just removing it
                    continue
                try:
                    _take(descriptor, path)
                    # Between open and flock the owner before us may have removed the folder, and the lock with it.
                    if _is_still_at(descriptor, path):
                        _name_owner(descriptor)
                        # Else a power cut could take the folder with all that is acknowledged in it: its name is in
                        # the tenant's folder, whose name is in the store's. Each time, for the maker may have died.
                        flush_folder(folder.parent)
                        flush_folder(folder.parent.parent)
                        return cls(path, descriptor)
                except BaseException:
                    os.close(descriptor)
                    raise
                os.close(descriptor)

    def __init__(self, path: Path, descriptor: int) -> None:
        """Use `acquire`."""
        self.path = path
        self._descriptor: int | None = descriptor

    @property
    def held(self) -> bool:
        return self._descriptor is not None

    def release(self) -> None:
        """Give the session free; harmless when released already."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        try:
            os.ftruncate(descriptor, 0)
        finally:
            # Unlocked by name: a forked child may hold the same open file, so closing alone would not free it.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def __enter__(self) -> SessionLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _take(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise SessionBusyError(
            f"the session in {path.parent} is held by {_owner(descriptor)}; it has one owner at a time. "
            "Close it there, or wait until that process ends: the lock is free at once."
        ) from error


def _is_still_at(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def _name_owner(descriptor: int) -> None:
    """For messages alone: a full disk must not keep a session from being read or deleted."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)


def _owner(descriptor: int) -> str:
    """Who holds it, as far as the file says: its owner writes its name just after taking it."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        pid, host = owner["pid"], owner["host"]
    except (ValueError, KeyError, TypeError):
        return "another process"
    here = " (this one)" if pid == os.getpid() and host == socket.gethostname() else ""
    return f"process {pid}{here} on host {host}"
