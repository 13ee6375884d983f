"""Segments and snapshots: immutable safetensors files, written once, read by range, hashed in pieces.

A segment holds n consecutive blocks: one tensor `kv.{l}` (n, 2, S, G, D) and one `landmarks.{l}` (n, C) a memory layer,
and `innovation` (n, S). A block of a layer is contiguous, so its K and V are one pread; the manifest keeps a hash of
each, and whatever is read is checked before it is returned. Files are never memory-mapped: a file truncated under a map
is a SIGBUS, not an error.

Shape letters: S block tokens, G key/value heads, D head size, C landmark size, n blocks of a segment.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memtier.errors import ConfigError, CorruptMemoryError
from memtier_backends.base import (
    DIGEST_BYTES,
    ITEM_BYTES,
    BlockPayload,
    LayerLayout,
    RawArray,
    SegmentManifest,
    SegmentStore,
)
from memtier_backends.files import TEMPORARY_SUFFIX, flush_folder, storage_errors, write_whole

__all__ = [
    "FileSegmentStore",
    "content_hash",
    "pack_segment",
    "pack_tensors",
    "parse_segment",
    "read_innovation",
    "read_kv",
    "read_landmarks",
    "unpack_tensors",
    "verify_segment",
]

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_LANDMARK_BYTES = ITEM_BYTES["F32"]
_FORMAT = "memtier-segment-1"
# Unsigned type of one element, and the bits that are all set in infinities and NaN.
_EXPONENT = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "F16": ("<u2", 0x1F << 10),
    "BF16": ("<u2", 0xFF << 7),
}


class FileSegmentStore:
    """SegmentStore in a folder of a local disk, which is made if missing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with storage_errors(f"make the folder {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            # Each time, for whoever made it may have died before this.
            flush_folder(folder.parent)

    @property
    def folder(self) -> Path:
        return self._folder

    def put(self, name: str, data: bytes | memoryview) -> None:
        path = self._path(name)
        with storage_errors(f"write {path}"):
            write_whole(path, data)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        path = self._path(name)
        if offset < 0 or (length is not None and length < 0):
            raise ConfigError(f"the range is offset {offset}, length {length}; neither may be negative.")
        with storage_errors(f"read {path}"):
            descriptor = self._open(path)
            try:
                size = os.fstat(descriptor).st_size
                end = size if length is None else offset + length
                data = _read_range(descriptor, offset, end)
            finally:
                os.close(descriptor)
        if len(data) != end - offset:
            raise CorruptMemoryError(
                f"{path} is truncated: bytes {offset} to {end} were asked for, and it has {size}. {_ADVICE}"
            )
        return data

    def list(self) -> list[str]:
        with storage_errors(f"list {self._folder}"):
            return sorted(name for name in os.listdir(self._folder) if _NAME.fullmatch(name))

    def delete(self, name: str) -> None:
        path = self._path(name)
        with storage_errors(f"delete {path}"):
            path.unlink(missing_ok=True)
            flush_folder(self._folder)

    def size(self, name: str) -> int:
        path = self._path(name)
        with storage_errors(f"read {path}"):
            try:
                return path.stat().st_size
            except FileNotFoundError as error:
                raise _missing(path) from error

    def clean(self) -> list[str]:
        with storage_errors(f"clean {self._folder}"):
            left = sorted(
                name for name in os.listdir(self._folder) if name.startswith(".") and name.endswith(TEMPORARY_SUFFIX)
            )
            for name in left:
                (self._folder / name).unlink(missing_ok=True)
            if left:
                flush_folder(self._folder)
        return left

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"the file name is {name!r}; it must be letters, digits, '-', '_' and '.', and not begin with '.'."
            )
        return self._folder / name

    def _open(self, path: Path) -> int:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise _missing(path) from error


_ADVICE = "Restore the file from a backup, or remove the session; its journal still holds every token."


def content_hash(data: bytes | memoryview) -> str:
    """Hex BLAKE2b of bytes: what manifests and snapshot records keep."""
    return blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


def pack_segment(payloads: Sequence[BlockPayload]) -> tuple[bytes, SegmentManifest]:
    """Pack consecutive blocks into one file.

    The bytes depend on the blocks alone, and the name on their numbers and the bytes: a segment that is packed again
    after a crash replaces itself, and files of two lines of tokens never take each other's place.

    Raises:
        ConfigError: no blocks, blocks that do not follow one another, or that differ in layers, dtype or shape.
    """
    first = _check_payloads(payloads)
    n, layers = len(payloads), len(first.kv)
    arrays: dict[str, RawArray] = {}
    for layer in range(layers):
        kv = b"".join(payload.kv[layer].data for payload in payloads)
        arrays[_kv_name(layer)] = RawArray(first.kv[layer].dtype, (n, *first.kv[layer].shape), kv)
        arrays[_landmarks_name(layer)] = _float_array([payload.landmarks[layer] for payload in payloads])
    arrays["innovation"] = _float_array([payload.innovation for payload in payloads])
    last = payloads[-1]
    metadata = {"format": _FORMAT, "first_block": str(first.block), "start": str(first.start)}
    data, offsets = _pack(arrays, metadata)

    def layout(layer: int) -> LayerLayout:
        landmarks = arrays[_landmarks_name(layer)]
        _, two, s, g, d = arrays[_kv_name(layer)].shape
        return LayerLayout(
            dtype=first.kv[layer].dtype,
            shape=(two, s, g, d),
            kv_offset=offsets[_kv_name(layer)],
            kv_hashes=tuple(content_hash(payload.kv[layer].data) for payload in payloads),
            landmark_size=landmarks.shape[1],
            landmark_offset=offsets[_landmarks_name(layer)],
            landmark_hash=content_hash(landmarks.data),
        )

    manifest = SegmentManifest(
        name=f"{first.block:010d}-{last.block:010d}-{content_hash(data)[:16]}.safetensors",
        first_block=first.block,
        blocks=n,
        start=first.start,
        end=last.end,
        layers=tuple(layout(layer) for layer in range(layers)),
        innovation_offset=offsets["innovation"],
        innovation_hash=content_hash(arrays["innovation"].data),
        size=len(data),
        hash=content_hash(data),
    )
    return data, manifest


def parse_segment(data: bytes, name: str) -> SegmentManifest:
    """The manifest of a segment file of unknown origin: it must be what packing its own blocks gives.

    Args:
        data: the whole file.
        name: what to call it in an error.

    Raises:
        CorruptMemoryError: it is no segment, or holds a number that is not finite.
    """
    arrays, metadata = unpack_tensors(data, name)
    try:
        if metadata["format"] != _FORMAT:
            raise ValueError(f"format {metadata['format']!r}, expected {_FORMAT!r}")
        first, start = int(metadata["first_block"]), int(metadata["start"])
        tokens = arrays["innovation"].shape[1]
        layers = range((len(arrays) - 1) // 2)
        kv = [_rows(arrays[_kv_name(layer)], 5) for layer in layers]
        landmarks = [_floats(arrays[_landmarks_name(layer)]) for layer in layers]
        innovation = _floats(arrays["innovation"])
        if not (min(first, start) >= 0 < tokens and all(_is_finite(a) for n, a in arrays.items() if n != "innovation")):
            raise ValueError("numbers that no segment holds")
        packed, manifest = pack_segment(
            [
                BlockPayload(
                    block=first + i,
                    start=start + i * tokens,
                    end=start + (i + 1) * tokens,
                    kv=tuple(rows[i] for rows in kv),
                    landmarks=tuple(rows[i] for rows in landmarks),
                    innovation=row,
                )
                for i, row in enumerate(innovation)
            ]
        )
        if packed != data:
            raise ValueError("its bytes are not those that its blocks give")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise CorruptMemoryError(f"{name} is not a segment of memtier: {error}.") from error
    return manifest


def read_kv(store: SegmentStore, manifest: SegmentManifest, layer: int, block: int) -> RawArray:
    """K and V of one block in one memory layer, (2, S, G, D): one read, hash checked.

    Raises:
        CorruptMemoryError: the file is missing, short or damaged there.
    """
    layout = _layout(manifest, layer)
    at = block - manifest.first_block
    if not 0 <= at < manifest.blocks:
        raise ConfigError(
            f"block {block} is not in segment {manifest.name}, which holds [{manifest.first_block}, "
            f"{manifest.end_block}). Look it up in Journal.segments()."
        )
    data = store.get(manifest.name, layout.kv_offset + at * layout.block_bytes, layout.block_bytes)
    _check(data, layout.kv_hashes[at], f"K/V of block {block}, memory layer {layer}, in segment {manifest.name}")
    return RawArray(layout.dtype, layout.shape, data)


def read_landmarks(store: SegmentStore, manifest: SegmentManifest, layer: int) -> NDArray[np.float32]:
    """(n, C) landmarks of a segment's blocks in one memory layer, read-only; hash checked. Raises as `read_kv`."""
    layout = _layout(manifest, layer)
    shape = (manifest.blocks, layout.landmark_size)
    data = store.get(manifest.name, layout.landmark_offset, shape[0] * shape[1] * _LANDMARK_BYTES)
    _check(data, layout.landmark_hash, f"landmarks of memory layer {layer} in segment {manifest.name}")
    return np.frombuffer(data, dtype="<f4").reshape(shape)


def read_innovation(store: SegmentStore, manifest: SegmentManifest) -> NDArray[np.float32]:
    """(n, S) innovation of a segment's tokens, read-only; hash checked. Raises as `read_kv`."""
    tokens = manifest.end - manifest.start
    data = store.get(manifest.name, manifest.innovation_offset, tokens * ITEM_BYTES["F32"])
    _check(data, manifest.innovation_hash, f"innovation in segment {manifest.name}")
    return np.frombuffer(data, dtype="<f4").reshape(manifest.blocks, tokens // manifest.blocks)


def verify_segment(store: SegmentStore, manifest: SegmentManifest) -> None:
    """Read a whole segment file and check every byte. Raises CorruptMemoryError."""
    data = store.get(manifest.name)
    if len(data) != manifest.size:
        raise CorruptMemoryError(
            f"segment {manifest.name} has {len(data)} bytes; {manifest.size} were written. {_ADVICE}"
        )
    _check(data, manifest.hash, f"segment {manifest.name}")


def pack_tensors(arrays: Mapping[str, RawArray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of named arrays and string metadata. The same input gives the same bytes."""
    return _pack(arrays, metadata)[0]


def unpack_tensors(data: bytes, name: str, hash: str | None = None) -> tuple[dict[str, RawArray], dict[str, str]]:
    """The arrays (views of `data`) and metadata of a safetensors file.

    Args:
        data: the whole file.
        name: what to call the file in an error.
        hash: its content_hash, if known; checked first.

    Raises:
        CorruptMemoryError: `data` does not have that hash, or is not a safetensors file.
    """
    if hash is not None:
        _check(data, hash, f"file {name}")
    try:
        header_bytes = int.from_bytes(data[:8], "little")
        if not 0 < header_bytes <= len(data) - 8:
            raise ValueError(f"a header of {header_bytes} bytes in a file of {len(data)}")
        header = json.loads(data[8 : 8 + header_bytes])
        metadata = header.pop("__metadata__", {})
        body = memoryview(data)[8 + header_bytes :]
        arrays: dict[str, RawArray] = {}
        for key, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if not (0 <= begin <= end <= len(body) and all(type(size) is int and size >= 0 for size in shape)):
                raise ValueError(f"{key} of shape {shape} in bytes {begin} to {end} of {len(body)}")
            arrays[key] = RawArray(entry["dtype"], shape, body[begin:end])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptMemoryError(f"{name} is not a readable safetensors file: {error}. {_ADVICE}") from error
    return arrays, metadata


def _pack(arrays: Mapping[str, RawArray], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The file, and at which byte of it each array begins.

    Wide elements come first, as safetensors writes them: then every array begins at a multiple of its element size.
    """
    order = sorted(arrays, key=lambda name: (-ITEM_BYTES[arrays[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begins: dict[str, int] = {}
    at = 0
    for name in order:
        array = arrays[name]
        begins[name] = at
        header[name] = {"dtype": array.dtype, "shape": array.shape, "data_offsets": (at, at + array.nbytes)}
        at += array.nbytes
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    encoded += b" " * (-len(encoded) % 8)
    base = 8 + len(encoded)
    data = b"".join([len(encoded).to_bytes(8, "little"), encoded, *(arrays[name].data for name in order)])
    return data, {name: base + begin for name, begin in begins.items()}


def _check_payloads(payloads: Sequence[BlockPayload]) -> BlockPayload:
    if not payloads:
        raise ConfigError("pack_segment got no blocks; a segment holds at least one.")
    first = payloads[0]
    next_block, next_start = first.block, first.start
    for payload in payloads:
        if (payload.block, payload.start) != (next_block, next_start):
            raise ConfigError(
                f"block {payload.block} at token {payload.start} came; the blocks of a segment are consecutive, "
                f"so block {next_block} at token {next_start} was expected."
            )
        if _form(payload) != _form(first):
            raise ConfigError(
                f"block {payload.block} has {_form(payload)}; the blocks of a segment are alike, and block "
                f"{first.block} has {_form(first)}."
            )
        next_block, next_start = payload.block + 1, payload.end
    return first


def _form(payload: BlockPayload) -> tuple[object, ...]:
    """What must be equal in all blocks of a segment."""
    kv = tuple((array.dtype, array.shape) for array in payload.kv)
    return (payload.end - payload.start, kv, tuple(v.shape for v in payload.landmarks), payload.innovation.shape)


def _float_array(rows: Sequence[NDArray[np.float32]]) -> RawArray:
    stacked = np.ascontiguousarray(np.stack(rows), dtype="<f4")
    return RawArray("F32", stacked.shape, stacked.tobytes())


def _rows(array: RawArray, dimensions: int) -> list[RawArray]:
    """An array along its first dimension."""
    if len(array.shape) != dimensions:
        raise ValueError(f"an array of shape {array.shape}, and {dimensions} dimensions were expected")
    count, *shape = array.shape
    size = array.nbytes // max(count, 1)
    return [RawArray(array.dtype, tuple(shape), array.data[i * size : (i + 1) * size]) for i in range(count)]


def _floats(array: RawArray) -> NDArray[np.float32]:
    if array.dtype != "F32" or len(array.shape) != 2:
        raise ValueError(f"an array of {array.dtype} and shape {array.shape}, and rows of F32 were expected")
    return np.frombuffer(array.data, "<f4").reshape(array.shape)


def _is_finite(array: RawArray) -> bool:
    kind, exponent = _EXPONENT[array.dtype]
    bits = np.frombuffer(array.data, kind)
    return not bool(((bits & bits.dtype.type(exponent)) == exponent).any())


def _layout(manifest: SegmentManifest, layer: int) -> LayerLayout:
    if not 0 <= layer < len(manifest.layers):
        raise ConfigError(
            f"layer is {layer}; segment {manifest.name} holds {len(manifest.layers)} memory layers, counted from 0."
        )
    return manifest.layers[layer]


def _check(data: bytes, expected: str, what: str) -> None:
    got = content_hash(data)
    if got != expected:
        raise CorruptMemoryError(f"{what} is damaged: its hash is {got}, and {expected} was written. {_ADVICE}")


def _read_range(descriptor: int, offset: int, end: int) -> bytes:
    """Bytes [offset, end), fewer where the file ends. One pread may return less than was asked for."""
    pieces: list[bytes] = []
    while offset < end:
        piece = os.pread(descriptor, end - offset, offset)
        if not piece:
            break
        pieces.append(piece)
        offset += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _missing(path: Path) -> CorruptMemoryError:
    return CorruptMemoryError(f"{path} is missing, though the session's journal names it. {_ADVICE}")


def _kv_name(layer: int) -> str:
    return f"kv.{layer}"


def _landmarks_name(layer: int) -> str:
    return f"landmarks.{layer}"
