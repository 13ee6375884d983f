"""Every hit says where it came from: sources, roles and metadata come back with what is recalled."""

import tempfile
from pathlib import Path

import memtier

LETTERS = {
    "ada.txt": "Dear Charles, the engine weaves algebraic patterns just as the loom weaves flowers and leaves.\n",
    "mary.txt": "Dear Percy, it was on a dreary night of November that I beheld the accomplishment of my toils.\n",
    "emily.txt": "Dear Thomas, the brain is wider than the sky, and deeper than the sea.\n",
}


def main(store: Path) -> None:
    with memtier.open_sync(store) as runtime:
        session = runtime.session("letters")
        for number, (name, text) in enumerate(LETTERS.items(), start=1):
            session.observe(text, role="letter", source=name, metadata={"number": number})
        for question in ("loom and flowers", "November", "deeper than the sea"):
            best = session.recall(question, k=1)[0]
            print(f"{question!r}: {best.source}, letter {best.metadata['number']}, tokens {best.start}-{best.end}")
            print(f"    {best.text.strip()}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder) / "store")
