"""The text that is streamed: CPython's own manual, or any other file, cut to a number of bytes."""

from __future__ import annotations

import bisect
import codecs
import random
import re
from pathlib import Path

from memtier.errors import ConfigError
from memtier.training.facts import Fact
from memtier.training.wordings import Wording

__all__ = ["check_utf8", "load_text", "plant"]


def load_text(file: Path | None = None, size_bytes: int | None = None) -> str:
    """The first `size_bytes` of a text, to a whole character.

    Args:
        file: a UTF-8 file; None takes the manual that every CPython carries (`pydoc_data.topics`), sorted by topic.
        size_bytes: None takes all of it.

    Raises:
        ConfigError: the text is shorter than that, empty, not readable or not UTF-8.
    """
    if file is None:
        from pydoc_data.topics import topics

        text, name = "\n".join(topics[topic] for topic in sorted(topics)), "CPython's manual"
    else:
        check_utf8(file)
        text, name = file.read_bytes().decode(), str(file)
    data = text.encode()
    if size_bytes is None:
        return text
    if not 0 < size_bytes <= len(data):
        raise ConfigError(
            f"{size_bytes:,} bytes were asked for and {name} holds {len(data):,}. "
            f"Ask for 1 to {len(data):,} bytes, or give a longer text with --file."
        )
    return data[:size_bytes].decode(errors="ignore")


def check_utf8(file: Path) -> int:
    """Bytes of a file that is UTF-8 to its end; the file is never in memory whole.

    Raises:
        ConfigError: there is no such file, it cannot be read, is empty, or is not UTF-8.
    """
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with file.open("rb") as opened:
            while data := opened.read(1 << 20):
                decoder.decode(data)
                done += len(data)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file} is not UTF-8 near byte {done + error.start:,} ({error.reason}); nothing of it was taken. "
            f"Convert it first, for example with: iconv -f LATIN1 -t UTF-8 {file}"
        ) from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}. Give a readable text file.") from error
    if done == 0:
        raise ConfigError(f"{file} is empty. Give a file that holds text.")
    return done


def plant(
    text: str,
    facts: list[Fact],
    seed: int,
    *,
    between: tuple[float, float] = (0.02, 0.12),
    wording: Wording = "trained",
) -> str:
    """The text with one sentence a fact put between its lines, evenly over a stretch near its beginning.

    Args:
        between: where the stretch starts and ends, as fractions of the text.
        wording: of the sentences.
    """
    rng = random.Random(f"plant/{seed}")
    line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
    first, last = (int(len(text) * fraction) for fraction in between)
    pieces, done = [], 0
    for i, fact in enumerate(facts):
        wanted = first + (last - first) * i // max(1, len(facts))
        at = bisect.bisect_left(line_starts, wanted)
        # A text of endless lines is cut where it stands.
        place = line_starts[at] if at < len(line_starts) and line_starts[at] <= last else wanted
        place = max(done, place)
        pieces += [text[done:place], fact.statement(rng, wording), "\n"]
        done = place
    return "".join([*pieces, text[done:]])
