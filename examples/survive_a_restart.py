"""A session goes on where it was: read half a text, close everything, open the store again, read the rest."""

import tempfile
from pathlib import Path

import memtier

STORY = "The lighthouse keeper wrote down every ship that passed. " * 20


def main(store: Path) -> None:
    half = len(STORY) // 2
    with memtier.open_sync(store) as runtime:
        position = runtime.session("story").observe(STORY[:half]).position
        print(f"read the first half; the session stands at token {position}")

    with memtier.open_sync(store) as runtime:
        session = runtime.session("story")
        assert session.position == position
        print(f"opened again at token {session.position}")
        report = session.observe(STORY[half:])
        print(f"read the rest at {report.bits_per_byte:.2f} bits a byte; the session stands at token {report.position}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder) / "store")
