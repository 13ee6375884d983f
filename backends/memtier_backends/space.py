"""Room on the disk of a store: a watermark at which nothing new is taken, and a reserve for what must still work then.

SQLite and LanceDB need room to delete, too. So writing stops while some room is left, and a file of known size can be
given up for the sake of a forget on a disk that others have filled.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from memtier.errors import StorageFullError
from memtier_backends.files import flush_folder, storage_errors

__all__ = ["RESERVE_NAME", "Space"]

RESERVE_NAME = ".reserve"

_CHUNK = b"\0" * 2**20


class Space:
    """The disk that a store lies on.

    Args:
        store: its folder; made if missing.
        min_free_bytes: the watermark.
        reserve_bytes: size of the reserve; 0 for none.
    """

    def __init__(self, store: Path, *, min_free_bytes: int, reserve_bytes: int) -> None:
        self._store = store
        self._min_free_bytes = min_free_bytes
        self._reserve_bytes = reserve_bytes
        self.reserve = store / RESERVE_NAME
        with storage_errors(f"make the folder {store}"):
            _make(store)

    @property
    def free_bytes(self) -> int:
        """What is left for an ordinary user."""
        with storage_errors(f"ask how much room is left on the disk of {self._store}"):
            return shutil.disk_usage(self._store).free

    def check(self) -> None:
        """Raises StorageFullError below the watermark."""
        free = self.free_bytes
        if free < self._min_free_bytes:
            raise StorageFullError(
                f"the disk of {self._store} has {free:,} bytes free, and min_free_bytes is {self._min_free_bytes:,}: "
                "nothing new is taken. What was acknowledged is safe, and reading and forgetting still work; free some "
                "space, or forget or delete something, and call again."
            )

    def fill(self) -> None:
        """Set the reserve aside, if there is room for it above the watermark and it is not there yet."""
        with storage_errors(f"set {self.reserve} aside"):
            there = self.reserve.stat().st_size if self.reserve.exists() else 0
            if there >= self._reserve_bytes or self.free_bytes - self._reserve_bytes < self._min_free_bytes:
                return
            descriptor = os.open(self.reserve, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                left = self._reserve_bytes
                while left:
                    left -= os.write(descriptor, _CHUNK[:left])
            finally:
                os.close(descriptor)

    def release(self) -> bool:
        """Give the reserve up. Returns whether there was one."""
        with storage_errors(f"give up {self.reserve}"):
            there = self.reserve.exists()
            self.reserve.unlink(missing_ok=True)
        return there


def _make(store: Path) -> None:
    """Make a folder with those above it, each name durable: else a power cut could take it with all in it."""
    missing = [folder for folder in (store, *store.parents) if not folder.exists()]
    there = missing[-1].parent if missing else store
    # Each time, for whoever made it may have died before this. A folder that we may not read is not ours, and its
    # names are not either.
    with suppress(PermissionError):
        flush_folder(there.parent)
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        flush_folder(folder.parent)
