"""Ask the same question with retrieval on and with its controls, each time from a copy of the session."""

import tempfile
from pathlib import Path

import memtier
from memtier.training.facts import make_facts

FILLER = "Rain fell on the harbour, and nobody who mattered was awake to see it. " * 60


def main(store: Path) -> None:
    [fact] = make_facts(1, seed=7)
    with memtier.open_sync(store) as runtime:
        session = runtime.session("controls")
        session.observe(f"The code for {fact.name} is {fact.code}.\n")
        session.observe(FILLER)
        question = f"\nWhat is the code for {fact.name}? The code for {fact.name} is "
        position = session.position
        for retrieval in ("on", "off", "random", "recent"):
            answer = session.generate(question, max_new_tokens=4, remember=False, retrieval=retrieval)
            print(f"retrieval {retrieval:>6}: {''.join(answer)}   (right: {fact.code})")
        assert session.position == position
        memory = session.inspect()
        print(f"{memory.storage.blocks} blocks in storage, window from token {memory.context.window_start}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder) / "store")
