"""One hash over all files of a folder: whether a library's own files are still those that it wrote.

Segments and journals carry our hashes in them. An index is another library's format, in which a flipped bit is mostly
read in silence: a passage is not found any more, or another one is. So what it wrote is hashed as a whole.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

from memtier_backends.files import files_under, storage_errors
from memtier_backends.records import DIGEST_BYTES, fields_digest

__all__ = ["FolderSeal"]

_CHUNK_BYTES = 2**20

# A file that is written once is read once: it counts as the same while none of these changes.
_Known = tuple[int, int, int, int]  # device, inode, bytes, time of the last change in nanoseconds


class FolderSeal:
    """The hash of one folder's files, their names included.

    Args:
        folder: nobody writes to it while it is read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._digests: dict[str, tuple[_Known, bytes]] = {}

    def read(self) -> str:
        """The hash, in hex; "" where there are no files. Only what is new since the last call is read.

        Raises:
            StorageError: a file cannot be read.
        """
        with storage_errors(f"read the files in {self._folder}"):
            files = {str(path.relative_to(self._folder)): path for path in files_under(self._folder)}
            self._digests = {name: self._digest(name, path) for name, path in files.items()}
        fields = [field for name in sorted(self._digests) for field in (name, self._digests[name][1])]
        return fields_digest(*fields).hex() if fields else ""

    def _digest(self, name: str, path: Path) -> tuple[_Known, bytes]:
        about = path.stat()
        now = about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns
        known = self._digests.get(name)
        if known is not None and known[0] == now:
            return known
        digest = blake2b(digest_size=DIGEST_BYTES)
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        return now, digest.digest()
