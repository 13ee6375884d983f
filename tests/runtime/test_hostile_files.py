"""A file that was made to do harm is refused whole, with an error of ours, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from memtier.console import _when
from memtier.errors import (
    ConfigError,
    CorruptMemoryError,
    IncompatibleMemoryError,
    MemtierError,
    SessionError,
    StorageError,
)
from memtier.recovery.portable import MOST_HEADER_BYTES, PREFIX
from memtier_backends.layout import session_folder
from memtier_backends.tensors import content_hash

pytestmark = pytest.mark.anyio

Inner = Callable[[dict, bytearray], bytearray]
Kind = type[MemtierError] | tuple[type[MemtierError], ...]


@pytest.fixture
async def exported(open_store, ids, tmp_path) -> Path:
    path = tmp_path / "a.memtier"
    async with open_store("origin", snapshot_every_tokens=64) as runtime:
        session = await runtime.session("a")
        await session.observe("A text with an umlaut: ü. ", source="book", metadata={"page": 1})
        await session.observe(ids[:150])
        await session.export(path)
    return path


def parts_of(data: bytes) -> tuple[dict, list[bytes]]:
    """The header and each part."""
    at = PREFIX + int.from_bytes(data[12:20], "little")
    header, parts = json.loads(data[PREFIX:at]), []
    for part in header["parts"]:
        parts.append(data[at : at + part["size"]])
        at += part["size"]
    return header, parts


def joined(header: dict, parts: list[bytes]) -> bytes:
    """A file whose sizes and hashes are right, as one who means harm would make it."""
    for about, part in zip(header["parts"], parts, strict=True):
        about |= {"size": len(part), "hash": content_hash(part)}
    encoded = json.dumps(header).encode()
    digest = blake2b(encoded, digest_size=16).digest()
    start = b"memtier\0" + (1).to_bytes(4, "little") + len(encoded).to_bytes(8, "little") + digest
    return start + encoded + b"".join(parts)


def without_snapshots(header: dict, parts: list[bytes]) -> tuple[dict, list[bytes]]:
    kept = [i for i, part in enumerate(header["parts"]) if part["kind"] != "snapshot"]
    return header | {"parts": [header["parts"][i] for i in kept]}, [parts[i] for i in kept]


def inside(data: bytes, change: Inner) -> bytes:
    """A safetensors file with a header and a body that were changed."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    body = change(header, body)
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + bytes(body)


async def refused(
    open_store, tmp_path: Path, data: bytes, kind: Kind = CorruptMemoryError, match: str | None = None
) -> None:
    hostile = tmp_path / "hostile.memtier"
    hostile.write_bytes(data)
    async with open_store() as runtime:
        with pytest.raises(kind, match=match):
            await runtime.import_session(hostile, "b")
        assert await runtime.sessions() == []
    assert not session_folder(tmp_path / "store", "default", "b").exists()


# -- the header

HEADERS = {
    "a model without a name": lambda h: h["model"].pop("name"),
    "a name that is no text": lambda h: h["model"].update(name=[1]),
    "a fingerprint that is no text": lambda h: h["model"].update(tensors=1),
    "values that are no numbers": lambda h: h["model"].update(values="AAA"),
    "a dtype of none": lambda h: h["model"].update(dtype="float3"),
    "a session of no time": lambda h: h.update(created_at=1e300),
    "a session before time": lambda h: h.update(created_at=-1.0),
    "a turn of no time": lambda h: h["turns"][0].update(created_at=1e300),
    "a turn at NaN": lambda h: h["turns"][0].update(created_at=float("nan")),
    "a span that no memory holds": lambda h: h["turns"][0].update(span_blocks=2**40),
    "nobody's turn": lambda h: h["turns"][0].update(role=""),
    "turns out of order": lambda h: h["turns"][1].update(number=0),
    "forgotten backwards": lambda h: h["turns"][0].update(forgotten=[[5, 2]]),
    "an empty id": lambda h: h.update(id=""),
}


@pytest.mark.parametrize("attack", HEADERS)
async def test_a_header_that_says_what_no_session_says_is_refused(open_store, exported, tmp_path, attack) -> None:
    header, parts = without_snapshots(*parts_of(exported.read_bytes()))
    HEADERS[attack](header)
    await refused(open_store, tmp_path, joined(header, parts))


@pytest.mark.parametrize("token", [260, 2**30, -1])
async def test_token_ids_that_the_model_does_not_know_are_refused(open_store, exported, tmp_path, token) -> None:
    header, parts = without_snapshots(*parts_of(exported.read_bytes()))
    parts[0] = parts[0][:-4] + token.to_bytes(4, "little", signed=True)
    await refused(open_store, tmp_path, joined(header, parts), match="token id")


# -- snapshots


def _numbers(tensor: str, value: float | int) -> Inner:
    def change(header: dict, body: bytearray) -> bytearray:
        for name, about in header.items():
            if name != "__metadata__" and name.endswith(tensor):
                kind = {"F64": "<f8", "F32": "<f4", "I64": "<i8"}[about["dtype"]]
                begin, end = about["data_offsets"]
                body[begin:end] = np.full(about["shape"], value, kind).tobytes()
        return body

    return change


def _shape(tensor: str, shape: Callable[[list[int]], list[int]]) -> Inner:
    """Of one tensor, whose bytes stay."""

    def change(header: dict, body: bytearray) -> bytearray:
        name = next(name for name in header if name.endswith(tensor))
        header[name]["shape"] = shape(header[name]["shape"])
        return body

    return change


def _metadata(header: dict, body: bytearray) -> bytearray:
    header["__metadata__"] = [1]
    return body


def _no_dtype(header: dict, body: bytearray) -> bytearray:
    header["position"]["dtype"] = []
    return body


def _shared_bytes(header: dict, body: bytearray) -> bytearray:
    one, two = (name for name in header if name.endswith(("span_keys", "span_values")) and ".1." in name)
    header[two]["data_offsets"] = header[one]["data_offsets"]
    return body


def _bytes_of_nobody(header: dict, body: bytearray) -> bytearray:
    return body + bytes(8)


SNAPSHOTS = {
    "of another position": _numbers("position", 10),
    "of a position far ahead": _numbers("position", 10**9),
    "of a position before the first": _numbers("position", -5),
    "whose position is a list": _shape("position", lambda shape: [1]),
    "of a boundary ahead": _numbers("boundary", 10**9),
    "of a state that is NaN": _numbers(".ssm", float("nan")),
    "of a state that is infinite": _numbers(".ssm", float("-inf")),
    "of keys that are NaN": _numbers(".span_keys", float("nan")),
    "of scores that are NaN": _numbers(".span_scores", float("nan")),
    "of blocks that are not there": _numbers(".span_ids", 10**9),
    "of a block before the first": _numbers(".span_ids", -2),
    "of tokens that are not there": _numbers(".eidetic_positions", 10**9),
    "of steps before the first": _numbers(".log_decay_tokens", -7),
    "of a span of another rank": _shape(".span_keys", lambda shape: [1, *shape]),
    "of a span of other heads": _shape(".span_keys", lambda shape: [*shape[:3], shape[4], shape[3]]),
    "with metadata that is none": _metadata,
    "with a dtype that is none": _no_dtype,
    "whose tensors share their bytes": _shared_bytes,
    "with bytes of no tensor": _bytes_of_nobody,
}


@pytest.mark.parametrize("attack", SNAPSHOTS)
async def test_a_snapshot_that_this_session_never_made_is_refused(open_store, exported, tmp_path, attack) -> None:
    header, parts = parts_of(exported.read_bytes())
    assert header["parts"][-1]["kind"] == "snapshot"
    changed = inside(parts[-1], SNAPSHOTS[attack])
    assert changed != parts[-1]
    parts[-1] = changed
    await refused(open_store, tmp_path, joined(header, parts), (CorruptMemoryError, IncompatibleMemoryError))


@pytest.mark.parametrize("attack", SNAPSHOTS)
async def test_a_snapshot_in_the_store_that_cannot_be_used_is_left_out(
    open_store, ids, exported, tmp_path, attack, monkeypatch, caplog
) -> None:
    """One that lies there with its right hash: made by whoever may write to the folder, or by an older version."""
    header, parts = parts_of(exported.read_bytes())
    parts[-1] = inside(parts[-1], SNAPSHOTS[attack])
    hostile = tmp_path / "hostile.memtier"
    hostile.write_bytes(joined(header, parts))
    monkeypatch.setattr("memtier.recovery.portable._check_snapshot", lambda *_: None)
    async with open_store() as runtime:
        session = await runtime.import_session(hostile, "b")
        assert f"the snapshot at {session.position} is left out" in caplog.text
        assert session.timeline.restored_from < session.position
        assert (await session.observe(ids[150:180])).tokens == 30


# -- files and folders


async def test_what_is_no_file_is_refused_at_once(open_store, tmp_path) -> None:
    pipe, loop, under = tmp_path / "pipe", tmp_path / "loop", tmp_path / "file" / "x"
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    under.parent.write_bytes(b"")
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe("Some text. ")
        for path, kind in [
            (pipe, SessionError), (tmp_path, SessionError), (under, SessionError), (loop, StorageError),
            (tmp_path / ("x" * 300), StorageError), (tmp_path / "a\0b", ConfigError),
        ]:  # fmt: skip
            with pytest.raises(kind):
                await runtime.import_session(path, "b")
            with pytest.raises((SessionError, StorageError, ConfigError)):
                await session.export(path)


async def test_a_file_full_of_holes_is_not_read_into_memory(open_store, exported, tmp_path) -> None:
    hole = MOST_HEADER_BYTES + 1
    sparse = tmp_path / "sparse"
    sparse.write_bytes(b"memtier\0" + (1).to_bytes(4, "little") + hole.to_bytes(8, "little") + bytes(16))
    os.truncate(sparse, PREFIX + hole)
    async with open_store() as runtime:
        with pytest.raises(CorruptMemoryError, match="header"):
            await runtime.import_session(sparse, "b")


@pytest.mark.parametrize("kind", ["tokens", "segment", "snapshot"])
async def test_a_part_that_memory_does_not_hold_is_told(open_store, exported, tmp_path, monkeypatch, kind) -> None:
    def too_large(file, part, where):
        if part.kind == kind:
            raise MemoryError
        return real(file, part, where)

    from memtier.recovery import portable

    real = portable._read_part
    monkeypatch.setattr(portable, "_read_part", too_large)
    await refused(open_store, tmp_path, exported.read_bytes())


async def test_an_import_that_cannot_be_opened_leaves_no_session(open_store, exported, tmp_path, monkeypatch) -> None:
    from memtier.open_sessions import OpenSessions

    async def fail(*_, **__):
        raise StorageError("it cannot be opened")

    monkeypatch.setattr(OpenSessions, "_opened", fail)
    await refused(open_store, tmp_path, exported.read_bytes(), StorageError, "cannot be opened")
    monkeypatch.undo()
    async with open_store() as runtime:
        assert (await runtime.import_session(exported, "b")).position > 150


async def test_two_exports_to_one_file_do_not_overwrite_each_other(open_store, tmp_path, monkeypatch) -> None:
    target = tmp_path / "one.memtier"
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe("Some text. ")
        # the other one is done between the look and the end
        monkeypatch.setattr(Path, "exists", lambda path, **_: False)
        target.write_bytes(b"another's")
        with pytest.raises(SessionError, match="never overwrites"):
            await session.export(target)
    assert target.read_bytes() == b"another's"
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


async def test_metadata_that_no_file_could_hold_is_refused_at_the_turn(open_store, tmp_path) -> None:
    deep: list = []
    for _ in range(40):
        deep = [deep]
    deepest: list = []
    for _ in range(200):
        deepest = [deepest]
    async with open_store() as runtime:
        session = await runtime.session("a")
        for bad in ({"a": deepest}, {"a": ["\ud800"]}, {"\ud800": 1}):
            with pytest.raises(ConfigError, match="metadata"):
                await session.observe("Some text. ", metadata=bad)
        await session.observe("Some text. ", metadata={"a": deep})
        await session.export(tmp_path / "deep.memtier")
        moved = await runtime.import_session(tmp_path / "deep.memtier", "b")
        assert (await moved.history())[0].metadata == {"a": deep}


async def test_turns_keep_their_numbers_and_what_was_forgotten_of_them(open_store, ids, tmp_path) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        for first in (0, 40, 80):
            await session.observe(ids[first : first + 40])
        await session.forget(turn=1)
        await session.forget(start=45, end=50)
        await session.export(tmp_path / "a.memtier")
        moved = await runtime.import_session(tmp_path / "a.memtier", "b")
        assert [turn.turn for turn in await moved.history()] == [0, 2]
        kept = [await runtime_session.timeline.history.turns(0, 75) for runtime_session in (session, moved)]
        assert kept[0] == kept[1]
        assert kept[1][1].forgotten


async def test_where_files_have_no_second_name_an_export_overwrites_nothing_either(
    open_store, tmp_path, monkeypatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    target = tmp_path / "one.memtier"
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe("Some text. ")
        await session.export(target)
        assert (await runtime.import_session(target, "b")).position == session.position
        data = target.read_bytes()
        monkeypatch.setattr(Path, "exists", lambda path, **_: False)
        with pytest.raises(SessionError, match="never overwrites"):
            await session.export(target)
    assert target.read_bytes() == data


async def test_what_no_import_would_take_is_refused_when_it_is_exported(open_store, ids, tmp_path, monkeypatch) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:100])
        for limit in ("MOST_HEADER_BYTES", "MOST_PART_BYTES"):
            with monkeypatch.context() as patched:
                patched.setattr(f"memtier.recovery.portable.{limit}", 99)
                with pytest.raises(StorageError, match="exported file holds"):
                    await session.export(tmp_path / "a.memtier")
    assert not (tmp_path / "a.memtier").exists()


@pytest.mark.parametrize("seconds", [None, 0, 1e300, -1e300, float("nan"), float("inf"), 2.0**40])
def test_a_time_of_no_calendar_can_be_shown(seconds: float | None) -> None:
    shown = _when(seconds)
    assert isinstance(shown, str) and bool(shown) == (seconds is not None)
