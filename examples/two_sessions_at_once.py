"""Two sessions read at the same time through one model, step by step in turn; neither sees the other."""

import tempfile
from pathlib import Path

import anyio

import memtier

TEXTS = {"north": "Snow, and again snow. " * 80, "south": "Sand, and again sand. " * 80}


async def main(store: Path) -> None:
    async with memtier.open(store) as runtime:

        async def read(name: str) -> None:
            session = await runtime.session(name)
            report = await session.observe(TEXTS[name])
            print(f"{name}: {report.tokens} tokens at {report.bits_per_byte:.2f} bits a byte")

        async with anyio.create_task_group() as tasks:
            for name in TEXTS:
                tasks.start_soon(read, name)

        north = await runtime.session("north")
        assert not [hit for hit in await north.recall("sand", k=5) if "sand" in hit.text.lower()]
        print("the north has never heard of sand")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        anyio.run(main, Path(folder) / "store")
