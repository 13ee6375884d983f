"""A folder of plain text as bytes: what is trained on, what is held out, and the hash of every file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memtier.errors import ConfigError

__all__ = ["Corpus", "CorpusFile", "load_corpus"]

# Files that are about the data, not data.
_ABOUT = ("readme", "sources", "license", "licence", "notice")
_LEAST_BYTES = 20_000


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """One file as it was read."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Bytes of text.

    Args:
        train: (n,) uint8, every file but its tail, one after the other.
        held_out: (m,) uint8, the tails.
        line_starts: (l,) int64, positions in `train` where a line of text starts.
        held_out_line_starts: the same for `held_out`.
        files: every file read, sorted by name.
    """

    train: np.ndarray
    held_out: np.ndarray
    line_starts: np.ndarray
    held_out_line_starts: np.ndarray
    files: tuple[CorpusFile, ...]

    @classmethod
    def from_bytes(cls, train: bytes, held_out: bytes, files: tuple[CorpusFile, ...] = ()) -> Corpus:
        """A corpus of text already in memory."""
        train_bytes, held_out_bytes = np.frombuffer(train, np.uint8), np.frombuffer(held_out, np.uint8)
        return cls(train_bytes, held_out_bytes, _line_starts(train_bytes), _line_starts(held_out_bytes), files)


def load_corpus(folder: Path | str, *, held_out_fraction: float = 0.02) -> Corpus:
    """Read every *.md and *.txt under a folder, except READMEs, licences and lists of sources.

    Args:
        folder: searched with its subfolders.
        held_out_fraction: the tail of each file that training never reads.

    Raises:
        ConfigError: no such folder, too little text in it, or a fraction out of range.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give a folder that holds *.md or *.txt files.")
    if not 0.0 < held_out_fraction < 0.5:
        raise ConfigError(f"held_out_fraction is {held_out_fraction}; it must lie between 0 and 0.5, for example 0.02.")
    paths = sorted(p for p in folder.rglob("*") if p.suffix in (".md", ".txt") and p.is_file() and not _is_about(p))
    train, held_out, files = [], [], []
    for path in paths:
        data = path.read_bytes()
        cut = int(len(data) * (1.0 - held_out_fraction))
        # No character is cut in half: a UTF-8 continuation byte is 0b10xxxxxx.
        while 0 < cut < len(data) and data[cut] & 0xC0 == 0x80:
            cut -= 1
        train.append(data[:cut] + b"\n")
        held_out.append(data[cut:] + b"\n")
        name = path.relative_to(folder).as_posix()
        files.append(CorpusFile(name, len(data), hashlib.sha256(data).hexdigest()))
    total = sum(f.size_bytes for f in files)
    if total < _LEAST_BYTES:
        raise ConfigError(
            f"{folder} holds {total} bytes of *.md and *.txt in {len(files)} files; "
            f"training needs at least {_LEAST_BYTES}. Add plain text."
        )
    return Corpus.from_bytes(b"".join(train), b"".join(held_out), tuple(files))


def _is_about(path: Path) -> bool:
    return path.stem.lower().startswith(_ABOUT)


def _line_starts(data: np.ndarray) -> np.ndarray:
    """Starts of lines that are not empty; [0] for a text without line ends."""
    breaks = np.flatnonzero(data[:-1] == 10) + 1
    breaks = breaks[(data[breaks] != 10) & (data[breaks] != 13)]
    return np.concatenate((np.zeros(1, np.int64), breaks.astype(np.int64)))
