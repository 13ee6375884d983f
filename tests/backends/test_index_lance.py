"""What is LanceDB's alone: no damaged row is returned, the disk stays small, searches and writes get along.

Damage of the text index is not told: a search may miss a row then. A session's index is sealed as a whole, and made
again where it is not as it was written: tests/runtime/test_index_damage.py.
"""

import os
import random
import re
import shutil
from pathlib import Path

import anyio
import lancedb
import pyarrow as pa
import pytest

from memtier.errors import CorruptMemoryError, IncompatibleMemoryError, StorageError, StorageFullError
from memtier_backends.index_lance import LanceIndex
from memtier_backends.testing import make_rows

pytestmark = pytest.mark.anyio

LAYERS = (4,)
SENTENCE = "The code for Bodiv is four eight two one."


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "index.lance"


async def filled(folder: Path, texts: list[str]) -> LanceIndex:
    index = await LanceIndex.open(folder, LAYERS)
    await index.add(make_rows(texts))
    await index.compact()
    return index


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def without_drawn_names(path: Path) -> str:
    return re.sub(r"[0-9a-f]{8}[0-9a-f-]{16,}", "", str(path))


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


async def test_a_relative_path_is_a_folder_and_not_a_cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    index = await LanceIndex.open(Path("index.lance"), LAYERS)
    assert index.folder == tmp_path / "index.lance"
    await index.close()


async def test_an_empty_head_is_told_with_the_way_out(folder: Path) -> None:
    await (await filled(folder, ["red plum"])).close()
    manifests = list((folder / "blocks.lance" / "_versions").glob("*.manifest"))
    for manifest in manifests:
        manifest.write_bytes(b"")
    with pytest.raises(CorruptMemoryError, match=r"derived.*remove the folder.*index.lance"):
        await LanceIndex.open(folder, LAYERS)
    shutil.rmtree(folder)
    index = await filled(folder, ["red plum"])
    assert await index.count() == 1
    await index.close()


async def test_a_table_without_a_head_is_told(folder: Path) -> None:
    await (await filled(folder, ["red plum"])).close()
    shutil.rmtree(folder / "blocks.lance" / "_versions")
    with pytest.raises(CorruptMemoryError, match="remove the folder"):
        await LanceIndex.open(folder, LAYERS)


async def test_a_flipped_bit_in_a_text_is_never_returned(folder: Path) -> None:
    await (await filled(folder, [SENTENCE, "green pear"])).close()
    (data,) = [path for path in files(folder / "blocks.lance" / "data") if SENTENCE.encode() in path.read_bytes()]
    whole = data.read_bytes()
    at = whole.index(b"four eight")
    data.write_bytes(whole[:at] + b"F" + whole[at + 1 :])
    index = await LanceIndex.open(folder, LAYERS)
    with pytest.raises(CorruptMemoryError, match=r"row 0 .*damaged"):
        await index.search_text("Bodiv", 1)
    with pytest.raises(CorruptMemoryError, match=r"row 0 .*damaged"):
        await index.rows(0, 2)
    await index.close()


async def test_a_flipped_bit_anywhere_gives_an_error_or_true_rows(folder: Path, tmp_path: Path) -> None:
    texts = [f"{SENTENCE} {n}" for n in range(20)]
    await (await filled(folder, texts)).close()
    # the same bits in each run, though names of files are drawn: there are some for which Lance would allocate 32 GB,
    # and its process dies
    names = [path.relative_to(folder) for path in sorted(files(folder), key=without_drawn_names) if path.stat().st_size]
    generator = random.Random(0)
    told = 0
    for n in range(40):
        copy = tmp_path / f"copy{n}"
        shutil.copytree(folder, copy)
        path = copy / generator.choice(names)
        data = bytearray(path.read_bytes())
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        try:
            index = await LanceIndex.open(copy, LAYERS)
            for hit in await index.search_text("Bodiv", 30):
                assert (hit.text, hit.start) == (texts[hit.block], 4 * hit.block)
            assert (await index.rows(0, 30))["text"].to_pylist() == texts
            await index.close()
        except (CorruptMemoryError, IncompatibleMemoryError):
            told += 1
    assert told > 5


async def test_an_index_of_other_landmarks_is_refused(folder: Path) -> None:
    await (await filled(folder, ["red plum"])).close()
    for layers in ((5,), (4, 4), ()):
        with pytest.raises(IncompatibleMemoryError, match="another model"):
            await LanceIndex.open(folder, layers)


async def test_a_scan_of_the_files_finds_a_text_that_is_there(folder: Path, tmp_path: Path) -> None:
    # Enough of it that LanceDB would compress.
    texts = [f"{SENTENCE} {n:04d}" for n in range(2000)]
    index = await filled(folder, texts)
    await index.close()
    raw = b"".join(path.read_bytes() for path in files(folder))
    assert all(text.encode() in raw for text in texts)
    # The control: with default settings the text is compressed, and a scan would prove nothing.
    other = await lancedb.connect_async(str(tmp_path / "default"))
    await other.create_table("blocks", pa.table({"text": texts}))
    raw = b"".join(path.read_bytes() for path in files(tmp_path / "default"))
    assert not any(text.encode() in raw for text in texts)


async def test_the_disk_stays_small_however_often_rows_are_added(folder: Path) -> None:
    layers = (96,)
    index = await LanceIndex.open(folder, layers)
    words = [f"w{n * n % 997}" for n in range(4000)]
    text_bytes = 0
    for block in range(0, 400, 2):
        texts = [" ".join(words[b : b + 20]) for b in (block, block + 1)]
        await index.add(make_rows(texts, first_block=block, layers=layers))
        # A row holds the text of three blocks: its own, and those beside it.
        text_bytes += sum(len(text) for text in texts) / 3
        assert await index.fragments() <= 65
    await index.compact()
    assert await index.fragments() == 1
    assert bytes_of(folder) < 40 * text_bytes
    assert len(files(folder)) < 20
    await index.close()


async def test_searches_beside_adds_and_compactions_always_answer(folder: Path) -> None:
    index = await LanceIndex.open(folder, LAYERS, compact_every_adds=3)
    await index.add(make_rows(["red plum"]))
    done = anyio.Event()

    async def search() -> None:
        while not done.is_set():
            assert [hit.block for hit in await index.search_text("red", 1)] == [0]

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(search)
            tasks.start_soon(search)
            for block in range(1, 20):
                await index.add(make_rows(["green pear"], first_block=block))
                await index.compact()
            done.set()
    assert await index.count() == 20
    await index.close()


async def test_a_cancelled_add_is_finished_and_may_be_sent_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = await LanceIndex.open(folder, LAYERS)
    begun = anyio.Event()
    add = index._table.add

    async def slow_add(rows: pa.Table) -> None:
        begun.set()
        await anyio.lowlevel.checkpoint()
        await add(rows)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            monkeypatch.setattr(index._table, "add", slow_add)
            tasks.start_soon(index.add, make_rows(["red plum"]))
            await begun.wait()
            tasks.cancel_scope.cancel()
    assert await index.count() == 1
    await index.add(make_rows(["red plum"]))
    assert await index.count() == 1
    await index.close()


async def test_an_add_that_failed_after_it_was_written_adds_no_row_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = await LanceIndex.open(folder, LAYERS)
    add = index._table.add

    async def add_then_fail(rows: pa.Table) -> None:
        await add(rows)
        raise RuntimeError("lance error: IO: connection to the disk was lost")

    with monkeypatch.context() as patched:
        patched.setattr(index._table, "add", add_then_fail)
        with pytest.raises(StorageError, match="disk was lost"):
            await index.add(make_rows(["red plum"]))
    await index.add(make_rows(["red plum", "green pear"]))
    assert (await index.rows(0, 9))["text"].to_pylist() == ["red plum", "green pear"]
    await index.close()


@pytest.mark.parametrize(
    ("told", "kind"),
    [
        ("LanceError(IO): No space left on device (os error 28)", StorageFullError),
        ("Disk quota exceeded (os error 122)", StorageFullError),
        ("Permission denied (os error 13)", StorageError),
        ("Encountered corrupt file", CorruptMemoryError),
    ],
)
async def test_what_lance_says_is_told_as_our_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, told: str, kind: type[StorageError]
) -> None:
    index = await LanceIndex.open(folder, LAYERS)

    async def fail(_: pa.Table) -> None:
        raise RuntimeError(told)

    with monkeypatch.context() as patched:
        patched.setattr(index._table, "add", fail)
        with pytest.raises(StorageError) as raised:
            await index.add(make_rows(["red plum"]))
    assert type(raised.value) is kind
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert os.fspath(folder) in str(raised.value)
    await index.close()
