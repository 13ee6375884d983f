"""Segment files: what is packed comes back, in a format others read, and no damaged byte is ever returned."""

import errno
import json
import math
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from memtier.errors import ConfigError, CorruptMemoryError, StorageError, StorageFullError
from memtier_backends.records import BlockPayload, RawArray, SegmentManifest
from memtier_backends.segment_store import FileSegmentStore
from memtier_backends.segments import (
    pack_segment,
    parse_segment,
    read_innovation,
    read_kv,
    read_landmarks,
    verify_segment,
)
from memtier_backends.tensors import content_hash, pack_tensors, unpack_tensors
from memtier_backends.testing import make_payloads


@pytest.fixture
def store(tmp_path: Path) -> FileSegmentStore:
    return FileSegmentStore(tmp_path / "segments")


def put(store: FileSegmentStore, payloads: list[BlockPayload]) -> SegmentManifest:
    data, manifest = pack_segment(payloads)
    store.put(manifest.name, data)
    return manifest


def read_all(store: FileSegmentStore, manifest: SegmentManifest) -> list[bytes]:
    """Everything that a session reads of a segment."""
    parts = [read_innovation(store, manifest).tobytes()]
    for layer in range(len(manifest.layers)):
        parts.append(read_landmarks(store, manifest, layer).tobytes())
        for block in range(manifest.first_block, manifest.end_block):
            parts.append(bytes(read_kv(store, manifest, layer, block).data))
    return parts


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_what_is_packed_comes_back(store: FileSegmentStore, blocks: int, layers: int) -> None:
    payloads = make_payloads(5, blocks, layers=layers)
    manifest = put(store, payloads)
    assert (manifest.first_block, manifest.end_block) == (5, 5 + blocks)
    assert (manifest.start, manifest.end) == (payloads[0].start, payloads[-1].end)
    for at, payload in enumerate(payloads):
        assert np.array_equal(read_innovation(store, manifest)[at], payload.innovation)
        for layer in range(layers):
            assert read_kv(store, manifest, layer, 5 + at) == payload.kv[layer]
            assert np.array_equal(read_landmarks(store, manifest, layer)[at], payload.landmarks[layer])
    verify_segment(store, manifest)


def test_a_manifest_survives_json() -> None:
    _, manifest = pack_segment(make_payloads(2, 3))
    assert SegmentManifest.from_json(manifest.to_json()) == manifest


def test_packing_again_gives_the_same_file() -> None:
    assert pack_segment(make_payloads(2, 3)) == pack_segment(make_payloads(2, 3))


def test_the_safetensors_library_reads_a_segment() -> None:
    payloads = make_payloads(0, 3)
    data, manifest = pack_segment(payloads)
    arrays = safetensors.numpy.load(data)
    assert sorted(arrays) == ["innovation", "kv.0", "kv.1", "landmarks.0", "landmarks.1"]
    assert arrays["kv.1"].shape == (3, 2, 4, 2, 3)
    assert arrays["kv.1"][2].tobytes() == payloads[2].kv[1].data
    assert arrays["landmarks.0"].shape == (3, manifest.layers[0].landmark_size)


def test_a_nan_innovation_comes_back(store: FileSegmentStore) -> None:
    (payload,) = make_payloads(0, 1)
    payload.innovation[:] = np.nan
    assert np.isnan(read_innovation(store, put(store, [payload]))).all()


def test_blocks_that_do_not_belong_together_are_refused() -> None:
    for payloads in ([], [*make_payloads(0, 1), *make_payloads(2, 1)], [*make_payloads(1, 1), *make_payloads(0, 1)]):
        with pytest.raises(ConfigError, match="block"):
            pack_segment(payloads)
    with pytest.raises(ConfigError, match="alike"):
        pack_segment([*make_payloads(0, 1, layers=1), *make_payloads(1, 1, layers=2)])


def test_a_block_or_layer_outside_the_segment_is_refused(store: FileSegmentStore) -> None:
    manifest = put(store, make_payloads(3, 2))
    for block in (2, 5):
        with pytest.raises(ConfigError, match="holds"):
            read_kv(store, manifest, 0, block)
    for layer in (-1, 2):
        with pytest.raises(ConfigError, match="2 memory layers"):
            read_landmarks(store, manifest, layer)


def test_every_flipped_bit_of_the_data_is_found_by_who_reads_it(store: FileSegmentStore) -> None:
    manifest = put(store, make_payloads(0, 2))
    path = store.folder / manifest.name
    whole = path.read_bytes()
    before = read_all(store, manifest)
    header_end = min(manifest.innovation_offset, *(layer.landmark_offset for layer in manifest.layers))
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with pytest.raises(CorruptMemoryError, match=manifest.name):
            verify_segment(store, manifest)
        if at < header_end:
            # The header is for other readers: ours goes by the journal's manifest.
            assert read_all(store, manifest) == before
        else:
            with pytest.raises(
                CorruptMemoryError, match=r"(K/V of block|landmarks of memory layer|innovation).*damaged"
            ):
                read_all(store, manifest)


def test_a_truncated_segment_is_damage_and_not_a_crash(store: FileSegmentStore) -> None:
    manifest = put(store, make_payloads(0, 2))
    path = store.folder / manifest.name
    whole = path.read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptMemoryError, match=manifest.name):
            read_all(store, manifest)
        with pytest.raises(CorruptMemoryError, match=manifest.name):
            verify_segment(store, manifest)
    path.unlink()
    with pytest.raises(CorruptMemoryError, match="missing"):
        read_kv(store, manifest, 0, 0)


def test_tensors_come_back_with_their_metadata() -> None:
    arrays = {
        "ssm.0": RawArray("F64", (2, 3), np.arange(6.0).tobytes()),
        "position": RawArray("I64", (), np.int64(7).tobytes()),
        "flags": RawArray("BOOL", (3,), b"\1\0\1"),
        "keys": RawArray("BF16", (1, 2), b"abcd"),
        "none": RawArray("F32", (0, 4), b""),
    }
    data = pack_tensors(arrays, {"position": "7"})
    got, metadata = unpack_tensors(data, "a snapshot", content_hash(data))
    assert got == arrays
    assert metadata == {"position": "7"}
    assert pack_tensors(dict(reversed(arrays.items())), {"position": "7"}) == data


def test_no_metadata_is_no_metadata() -> None:
    assert unpack_tensors(pack_tensors({}, {}), "empty") == ({}, {})


def test_a_damaged_snapshot_is_named() -> None:
    data = pack_tensors({"a": RawArray("I32", (2,), bytes(8))}, {})
    expected = content_hash(data)
    with pytest.raises(CorruptMemoryError, match=r"file p7\.safetensors is damaged"):
        unpack_tensors(data[:-1] + b"\1", "p7.safetensors", expected)
    with pytest.raises(CorruptMemoryError, match="p7"):
        unpack_tensors(data[:-1], "p7.safetensors")


@given(st.binary(max_size=200))
def test_bytes_that_are_no_safetensors_file_are_damage(data: bytes) -> None:
    framed = len(data).to_bytes(8, "little") + data
    for candidate in (data, framed):
        # Anything else than our error fails the test; a few inputs are files without arrays.
        with suppress(CorruptMemoryError):
            unpack_tensors(candidate, "noise")


def _framed(header: dict[str, object], body: bytes) -> bytes:
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + body


@pytest.mark.parametrize(
    ("tensors", "body"),
    [
        ({"a": ("U8", [8], (0, 8)), "b": ("U8", [8], (0, 8))}, 8),
        ({"a": ("U8", [8], (0, 8)), "b": ("U8", [8], (4, 12))}, 12),
        ({"a": ("U8", [4], (0, 4)), "b": ("U8", [4], (8, 12))}, 12),
        ({"a": ("U8", [4], (0, 4))}, 8),
        ({"a": ("U8", [0, 2**40, 2**40], (0, 0))}, 0),
        ({"a": ("U8", [1] * 1000, (0, 1))}, 1),
    ],
    ids=["shared", "overlapping", "a gap", "a rest", "too large to count", "a thousand dimensions"],
)
def test_tensors_that_do_not_lie_one_after_another_are_damage(
    tensors: dict[str, tuple[str, list[int], tuple[int, int]]], body: int
) -> None:
    header = {name: {"dtype": d, "shape": s, "data_offsets": o} for name, (d, s, o) in tensors.items()}
    with pytest.raises(CorruptMemoryError, match="noise"):
        unpack_tensors(_framed(header, bytes(body)), "noise")


@pytest.mark.parametrize("metadata", [[1], {"format": 1}, "text", None])
def test_metadata_that_is_not_of_strings_is_damage(metadata: object) -> None:
    with pytest.raises(CorruptMemoryError, match="noise"):
        unpack_tensors(_framed({"__metadata__": metadata}, b""), "noise")


@pytest.mark.parametrize(("kv", "blocks"), [([10**9, 2, 4, 0, 8], 1), ([2, 2, 4, 1, 1], 1), ([5000, 2, 1, 1, 1], 5000)])
def test_a_count_of_blocks_that_nothing_holds_is_refused_before_they_are_made(kv: list[int], blocks: int) -> None:
    arrays = {
        "kv.0": RawArray("F16", tuple(kv), bytes(2 * math.prod(kv))),
        "landmarks.0": RawArray("F32", (blocks, 1), bytes(4 * blocks)),
        "innovation": RawArray("F32", (blocks, 4), bytes(16 * blocks)),
    }
    data = pack_tensors(arrays, {"format": "memtier-segment-1", "first_block": "0", "start": "0"})
    with pytest.raises(CorruptMemoryError, match="blocks"):
        parse_segment(data, "noise")


def test_an_array_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs 8"):
        RawArray("F32", (2,), b"1234")
    with pytest.raises(ConfigError, match="dtype"):
        RawArray("float32", (1,), b"1234")


def test_half_written_files_are_not_listed_and_are_dropped(store: FileSegmentStore) -> None:
    store.put("whole", b"1")
    torn = store.folder / ".0000000000-0000000003.safetensors.99.tmp"
    torn.write_bytes(b"half")
    assert store.list() == ["whole"]
    assert store.clean() == [torn.name]
    assert not torn.exists()
    assert store.list() == ["whole"]


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, StorageFullError), (errno.EDQUOT, StorageFullError), (errno.EIO, StorageError)]
)
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_half(
    store: FileSegmentStore, monkeypatch: pytest.MonkeyPatch, step: str, code: int, kind: type[StorageError]
) -> None:
    store.put("a", b"old")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, step, fail)
        with pytest.raises(StorageError, match="cannot write") as raised:
            store.put("a", b"new")
    assert type(raised.value) is kind
    assert store.get("a") == b"old"
    assert store.clean() == []


def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_after(
    store: FileSegmentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def logged(name: str):
        real = getattr(os, name)

        def call(*arguments: object) -> object:
            if name == "fsync":
                steps.append("fsync folder" if os.path.isdir(f"/dev/fd/{arguments[0]}") else "fsync file")
            else:
                steps.append(name)
            return real(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, logged(name))
    store.put("a", b"1")
    assert steps == ["fsync file", "replace", "fsync folder"]


def test_short_writes_are_continued(store: FileSegmentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:3]))
    store.put("a", b"0123456789")
    assert store.get("a") == b"0123456789"
