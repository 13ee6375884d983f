"""An index has no hashes of ours in it, so one that is not as it was written is made again from the segments."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

import memtier
from memtier.folder import Backends
from memtier.runtime import Runtime
from memtier.testing import tiny_model
from memtier_backends.folder_seal import FolderSeal
from memtier_backends.index_lance import LanceIndex
from memtier_backends.layout import SessionPaths, session_folder
from memtier_backends.records import IndexRow
from memtier_backends.testing import damage_file

pytestmark = pytest.mark.anyio

TRIALS = 50
NAMES = [f"{first}{last}" for first in ("bodi", "kalu", "mero", "tisa") for last in ("van", "zed", "nok")]
TEXT = "".join(f"The code of {name} is {1000 + 7 * n}. " for n, name in enumerate(NAMES))


async def compacted(folder: Path, layers: list[int]) -> LanceIndex:
    """So that the text index has files of its own, too."""
    return await LanceIndex.open(folder, layers, compact_every_adds=1)


@pytest.fixture
def runtime(tmp_path: Path, tokenizer) -> Runtime:
    config = memtier.MemoryConfig(reserve_bytes=0)
    backends = Backends(index=compacted)
    return Runtime(tmp_path, tiny_model(), tokenizer, config, "default", "auto", "auto", backends=backends)


async def test_no_damage_of_an_index_changes_what_is_found(runtime, tmp_path, caplog) -> None:
    choose = random.Random("index")
    folder = SessionPaths(session_folder(tmp_path, "default", "a")).index
    async with runtime:
        session = await runtime.session("a")
        await session.observe(TEXT)
        await session.close()
        damaged = 0
        for _ in range(TRIALS):
            before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
            path = choose.choice([path for path, data in before.items() if data])
            how = damage_file(choose, path)
            damaged += path.read_bytes() != before[path]
            session = await runtime.session("a")
            name = choose.choice(NAMES)
            hits = await session.recall(name, k=1)
            assert [name in hit.text for hit in hits] == [True], how
            await session.close()
        assert damaged > TRIALS // 2
        assert sum("not as it was written" in record.message for record in caplog.records) == damaged


@pytest.mark.parametrize("what", ["a file is missing", "a file is new", "what was found is not marked"])
async def test_an_index_that_the_journal_does_not_know_is_made_again(runtime, tmp_path, what) -> None:
    paths = SessionPaths(session_folder(tmp_path, "default", "a"))
    async with runtime:
        session = await runtime.session("a")
        await session.observe(TEXT)
        await session.flush()
        journal = session.folder.journal
        seal, indexed = journal.index_seal, journal.indexed_through
        assert seal and indexed
        if what == "what was found is not marked":
            # as after a crash between the rows and their mark
            journal.set_indexed_through(indexed, seal="")
        await session.close()
        files = [path for path in sorted(paths.index.rglob("*")) if path.is_file()]
        if what == "a file is missing":
            files[0].unlink()
        elif what == "a file is new":
            files[0].with_name("new").write_bytes(b"")
        session = await runtime.session("a")
        (hit,) = await session.recall(NAMES[-1], k=1)
        assert NAMES[-1] in hit.text
        journal = session.folder.journal
        assert journal.indexed_through == indexed
        assert not list(paths.index.rglob("new"))
        await session.close()
        (health,) = await runtime.doctor(full=True)
        assert health.findings == ()


async def test_rows_past_the_mark_are_of_no_block_that_there_is(runtime, tmp_path) -> None:
    paths = SessionPaths(session_folder(tmp_path, "default", "a"))
    async with runtime:
        session = await runtime.session("a")
        await session.observe(TEXT)
        await session.flush()
        storage, journal = session._parts.storage, session.folder.journal
        indexed, sizes = journal.indexed_through, [storage.channels] * len(storage.layers)
        index = await session.updater.index()
        row = (await index.rows(indexed - 1, indexed)).to_pylist()[0]
        stale = IndexRow(
            indexed - 1, row["start"], row["end"], "xylophones", row["created_at"], None,
            tuple(np.array(row[f"landmark_{layer}"], np.float32) for layer in range(len(sizes))),
        )  # fmt: skip
        await index.drop_from(indexed - 1)
        await index.add([stale])
        # the mark of a journal that was cut short, beside the index of the longer one
        journal.set_indexed_through(indexed - 1, seal=FolderSeal(paths.index).read())
        await session.close()
        session = await runtime.session("a")
        assert await session.recall("xylophones") == []
        assert (await session.recall(NAMES[-1], k=1))[0].text
        assert session.folder.journal.indexed_through == indexed
        assert await (await session.updater.index()).count() == indexed


async def test_to_look_and_to_search_change_no_file_of_an_index(runtime, tmp_path) -> None:
    folder = SessionPaths(session_folder(tmp_path, "default", "a")).index
    async with runtime:
        session = await runtime.session("a")
        await session.observe(TEXT)
        await session.close()
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        session = await runtime.session("a")
        await session.recall(NAMES[0])
        await session.close()
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


async def test_doctor_finds_a_flipped_bit_of_an_index(runtime, tmp_path) -> None:
    folder = SessionPaths(session_folder(tmp_path, "default", "a")).index
    async with runtime:
        session = await runtime.session("a")
        await session.observe(TEXT)
        await session.close()
        path = max((path for path in folder.rglob("_indices/**/*") if path.is_file()), key=lambda p: p.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        (health,) = await runtime.doctor(full=True)
        assert not health.healthy and [finding.what for finding in health.findings] == ["index"]
        await runtime.doctor(full=True, rebuild=True)
        (health,) = await runtime.doctor(full=True)
        assert health.healthy
