"""Segments: immutable safetensors files, written once, read by range, hashed in pieces.

A segment holds n consecutive blocks: one tensor `kv.{l}` (n, 2, S, G, D) and one `landmarks.{l}` (n, C) a memory layer,
and `innovation` (n, S). A block of a layer is contiguous, so its K and V are one pread; the manifest keeps a hash of
each, and whatever is read is checked before it is returned.

Shape letters: S block tokens, G key/value heads, D head size, C landmark size, n blocks of a segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from memtier.errors import ConfigError, CorruptMemoryError
from memtier_backends.base import SegmentStore
from memtier_backends.records import ITEM_BYTES, BlockPayload, LayerLayout, RawArray, SegmentManifest
from memtier_backends.tensors import ADVICE, check_hash, content_hash, lay_out, unpack_tensors

__all__ = [
    "pack_segment",
    "parse_segment",
    "read_innovation",
    "read_kv",
    "read_landmarks",
    "read_payloads",
    "verify_segment",
]

_LANDMARK_BYTES = ITEM_BYTES["F32"]
_FORMAT = "memtier-segment-1"
# Many times what is ever put in one file: each block becomes objects of Python, larger than the smallest blocks.
_MOST_BLOCKS = 4096
# Unsigned type of one element, and the bits that are all set in infinities and NaN.
_EXPONENT = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "F16": ("<u2", 0x1F << 10),
    "BF16": ("<u2", 0xFF << 7),
}


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
    data, offsets = lay_out(arrays, metadata)

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
        payloads = _payloads(arrays, metadata)
        kv_and_landmarks = (array for key, array in arrays.items() if key != "innovation")
        if not (min(payloads[0].block, payloads[0].start) >= 0 and all(map(_is_finite, kv_and_landmarks))):
            raise ValueError("numbers that no segment holds")
        packed, manifest = pack_segment(payloads)
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
    check_hash(data, layout.kv_hashes[at], f"K/V of block {block}, memory layer {layer}, in segment {manifest.name}")
    return RawArray(layout.dtype, layout.shape, data)


def read_landmarks(store: SegmentStore, manifest: SegmentManifest, layer: int) -> NDArray[np.float32]:
    """(n, C) landmarks of a segment's blocks in one memory layer, read-only; hash checked. Raises as `read_kv`."""
    layout = _layout(manifest, layer)
    shape = (manifest.blocks, layout.landmark_size)
    data = store.get(manifest.name, layout.landmark_offset, shape[0] * shape[1] * _LANDMARK_BYTES)
    check_hash(data, layout.landmark_hash, f"landmarks of memory layer {layer} in segment {manifest.name}")
    return np.frombuffer(data, dtype="<f4").reshape(shape)


def read_innovation(store: SegmentStore, manifest: SegmentManifest) -> NDArray[np.float32]:
    """(n, S) innovation of a segment's tokens, read-only; hash checked. Raises as `read_kv`."""
    tokens = manifest.end - manifest.start
    data = store.get(manifest.name, manifest.innovation_offset, tokens * ITEM_BYTES["F32"])
    check_hash(data, manifest.innovation_hash, f"innovation in segment {manifest.name}")
    return np.frombuffer(data, dtype="<f4").reshape(manifest.blocks, tokens // manifest.blocks)


def read_payloads(store: SegmentStore, manifest: SegmentManifest) -> list[BlockPayload]:
    """The blocks of a segment, as `pack_segment` takes them; every byte is checked. Raises as `read_kv`."""
    arrays, metadata = unpack_tensors(store.get(manifest.name), manifest.name, manifest.hash)
    return _payloads(arrays, metadata)


def verify_segment(store: SegmentStore, manifest: SegmentManifest) -> None:
    """Read a whole segment file and check every byte. Raises CorruptMemoryError."""
    data = store.get(manifest.name)
    if len(data) != manifest.size:
        raise CorruptMemoryError(
            f"segment {manifest.name} has {len(data)} bytes; {manifest.size} were written. {ADVICE}"
        )
    check_hash(data, manifest.hash, f"segment {manifest.name}")


def _payloads(arrays: Mapping[str, RawArray], metadata: Mapping[str, str]) -> list[BlockPayload]:
    """The blocks of an unpacked segment. Raises ValueError, KeyError, TypeError or IndexError if it is none."""
    if metadata["format"] != _FORMAT:
        raise ValueError(f"format {metadata['format']!r}, expected {_FORMAT!r}")
    first, start = int(metadata["first_block"]), int(metadata["start"])
    layers = range((len(arrays) - 1) // 2)
    innovation = _floats(arrays["innovation"])
    blocks, tokens = innovation.shape
    if not 0 < blocks <= _MOST_BLOCKS or not tokens:
        raise ValueError(f"{blocks} blocks of {tokens} tokens")
    for name, array in arrays.items():
        # before anything is made of them: a size of 0 would let a count be anything
        if array.shape[0] != blocks or not array.nbytes:
            raise ValueError(f"{name} of shape {array.shape}, for {blocks} blocks")
    kv = [_rows(arrays[_kv_name(layer)], 5) for layer in layers]
    landmarks = [_floats(arrays[_landmarks_name(layer)]) for layer in layers]
    return [
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
    size = array.nbytes // count
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


def _kv_name(layer: int) -> str:
    return f"kv.{layer}"


def _landmarks_name(layer: int) -> str:
    return f"landmarks.{layer}"
