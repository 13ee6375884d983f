"""Telling a damaged write-ahead log from one whose last transaction was cut off.

SQLite takes the first frame of a log that does not have its checksum for the log's end, and says nothing: one flipped
bit in the middle takes back all that was acknowledged after it. A power cut leaves such a frame too, in the transaction
that was being written, and that one must open. But commits are flushed (synchronous=FULL): a transaction is begun only
once the one before it is on the disk. So where another transaction follows the one that holds the first bad frame, this
one was acknowledged, and its frame was damaged later.

A frame's checksum goes on from the one that is written in the frame before, so frames after a damaged one still prove
that they were written in this order. What is left of older rounds of the log, or of a transaction that was taken back,
follows no commit of this round, and proves nothing.

Format: https://www.sqlite.org/fileformat2.html#walformat, sections "The Write-Ahead Log" and "Checksum Algorithm".
Shape letters: F frames, W words of a frame.
"""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memtier.errors import CorruptMemoryError
from memtier_backends.files import storage_errors

__all__ = ["check_log"]

_HEADER = struct.Struct(">8I")  # magic, version, page size, round, two salts, two checksums
_FRAME = struct.Struct(">6I")  # page, pages after a commit or 0, two salts, two checksums
_MAGIC = 0x377F0682
_CHUNK_FRAMES = 512

_Sums = tuple[int, int]


def check_log(path: Path) -> None:
    """Look at the log of a database before SQLite does. Another process may be writing to it.

    Args:
        path: the database; its log lies beside it.

    Raises:
        CorruptMemoryError: an acknowledged transaction in the log is damaged.
        StorageError: the log cannot be read.
    """
    log = Path(f"{path}-wal")
    before = None
    while True:
        data = _read(log)
        problem = _problem(data)
        if problem is None:
            return
        what, end = problem
        # a writer that begins the log anew while it is read leaves half of each round: then it has changed
        if before == data[:end]:
            raise CorruptMemoryError(
                f"the write-ahead log {log} is damaged: {what}. SQLite would leave out all that was acknowledged from "
                "there on. Keep the file, restore the session's folder from a backup, or run: memtier doctor --rebuild"
            )
        before = data[:end]


def _read(log: Path) -> bytes:
    with storage_errors(f"read the write-ahead log {log}"):
        try:
            return log.read_bytes()
        except FileNotFoundError:
            return b""


def _problem(data: bytes) -> tuple[str, int] | None:
    """What is damaged, and how much of the log was read to know it; None if nothing is."""
    if len(data) <= _HEADER.size:
        return None
    magic, _, page_bytes, _, *salts, one, two = _HEADER.unpack_from(data)
    order = ">" if magic & 1 else "<"
    head = np.frombuffer(data, f"{order}u4", count=6).astype(np.uint32)[None]
    if magic & ~1 != _MAGIC or _after(_added(head)[0], (0, 0), 3) != (one, two):
        # the header is on the disk before the first frame is written; a file that grew and was not written is zeros
        return ("its header does not have its checksum", len(data)) if any(data) else None
    frame_bytes = _FRAME.size + page_bytes
    count = (len(data) - _HEADER.size) // frame_bytes
    heads = [_FRAME.unpack_from(data, _HEADER.size + n * frame_bytes) for n in range(count)]
    words = (8 + page_bytes) // 4
    added = _frames_added(data, count, page_bytes, order)

    def follows(n: int, sums: _Sums) -> bool:
        """Whether frame n, of this round of the log, was written after a frame of these checksums."""
        return list(heads[n][2:4]) == salts and _after(added[n], sums, words // 2) == heads[n][4:]

    sums: _Sums = (one, two)
    bad = 0
    while bad < count and follows(bad, sums):
        sums = heads[bad][4:]
        bad += 1
    for n in range(bad, count - 1):
        if not heads[n][1]:
            continue
        # of the bad frame itself, its checksum may be what is damaged
        written = [heads[n][4:]] + ([_after(added[n], sums, words // 2)] if n == bad else [])
        if any(follows(n + 1, after) for after in written):
            told = f"frame {bad + 1} of {count} does not have its checksum, and transactions follow it"
            return told, _HEADER.size + (n + 2) * frame_bytes
    return None


def _frames_added(data: bytes, count: int, page_bytes: int, order: str) -> NDArray[np.uint32]:
    """(F, 2): what each frame's page number, commit mark and page add to the checksums."""
    frame_bytes = _FRAME.size + page_bytes
    added = np.zeros((count, 2), np.uint32)
    for first in range(0, count, _CHUNK_FRAMES):
        last = min(first + _CHUNK_FRAMES, count)
        offset = _HEADER.size + first * frame_bytes
        raw_FW = np.frombuffer(data, f"{order}u4", (last - first) * frame_bytes // 4, offset).reshape(last - first, -1)
        added[first:last] = _added(np.concatenate([raw_FW[:, :2], raw_FW[:, 6:]], axis=1).astype(np.uint32))
    return added


# For each pair of words (a, b) SQLite does s0 += a + s1, s1 += b + s0 (mod 2**32): linear in the sums and the words. So
# n pairs make of sums s: M**n s + the words by weights that depend on their place alone, M = [[1, 1], [1, 2]].


def _added(words_FW: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """(F, 2): what words add to the checksums, begun at 0."""
    weights, _ = _weights(words_FW.shape[1] // 2)
    return words_FW @ weights


def _after(added: NDArray[np.uint32], sums: _Sums, pairs: int) -> _Sums:
    """The checksums after words that add this, of so many pairs, begun at `sums`."""
    _, power = _weights(pairs)
    mask = 2**32 - 1
    one, two = (
        (int(a) + int(row[0]) * sums[0] + int(row[1]) * sums[1]) & mask for a, row in zip(added, power, strict=True)
    )
    return one, two


@cache
def _weights(pairs: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """(2 * pairs, 2) weights of the words, and M**pairs."""
    step, power = np.array([[1, 1], [1, 2]], np.uint32), np.eye(2, dtype=np.uint32)
    weights = np.empty((pairs, 2, 2), np.uint32)
    for n in reversed(range(pairs)):
        # a adds to both sums, b to the second
        weights[n] = (power @ np.array([[1, 0], [1, 1]], np.uint32)).T
        power = power @ step
    return weights.reshape(-1, 2), power
