"""Named arrays as the bytes of a safetensors file and back, and the hash that whatever is read is checked by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from math import prod

from memtier.errors import CorruptMemoryError
from memtier_backends.records import DIGEST_BYTES, ITEM_BYTES, RawArray

__all__ = ["ADVICE", "check_hash", "content_hash", "lay_out", "pack_tensors", "unpack_tensors"]

ADVICE = "Restore the file from a backup, or remove the session; its journal still holds every token."


def content_hash(data: bytes | memoryview) -> str:
    """Hex BLAKE2b of bytes: what manifests and snapshot records keep."""
    return blake2b(data, digest_size=DIGEST_BYTES).hexdigest()


def pack_tensors(arrays: Mapping[str, RawArray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of named arrays and string metadata. The same input gives the same bytes."""
    return lay_out(arrays, metadata)[0]


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
        check_hash(data, hash, f"file {name}")
    try:
        header_bytes = int.from_bytes(data[:8], "little")
        if not 0 < header_bytes <= len(data) - 8:
            raise ValueError(f"a header of {header_bytes} bytes in a file of {len(data)}")
        header = json.loads(data[8 : 8 + header_bytes])
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is not of strings")
        body = memoryview(data)[8 + header_bytes :]
        # one after another and to the end, as the format has it: two that share bytes could stand for any amount
        at = 0
        for begin, end in sorted(tuple(entry["data_offsets"]) for entry in header.values()):
            if begin != at:
                raise ValueError(f"bytes {at} to {begin} belong to no tensor, or to two")
            at = end
        if at != len(body):
            raise ValueError(f"tensors of {at} bytes in a body of {len(body)}")
        arrays: dict[str, RawArray] = {}
        for key, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            plain = all(type(size) is int and size >= 0 for size in shape)
            # of an array without elements, too: no library makes one that could not be counted
            if not (0 <= begin <= end <= len(body) and plain and len(shape) <= 8 and prod(map(_one_of, shape)) < 2**53):
                raise ValueError(f"{key} of shape {shape} in bytes {begin} to {end} of {len(body)}")
            arrays[key] = RawArray(entry["dtype"], shape, body[begin:end])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptMemoryError(f"{name} is not a readable safetensors file: {error}. {ADVICE}") from error
    return arrays, metadata


def lay_out(arrays: Mapping[str, RawArray], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
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


def _one_of(size: int) -> int:
    return max(size, 1)


def check_hash(data: bytes, expected: str, what: str) -> None:
    got = content_hash(data)
    if got != expected:
        raise CorruptMemoryError(f"{what} is damaged: its hash is {got}, and {expected} was written. {ADVICE}")
