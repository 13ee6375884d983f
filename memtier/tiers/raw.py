"""Tensors as bytes and back: what goes to disk and comes from it."""

from __future__ import annotations

import torch

from memtier_backends.records import RawArray

__all__ = ["to_raw", "to_tensor"]

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def to_raw(tensor: torch.Tensor) -> RawArray:
    """The bytes of a tensor; they may share its memory, so it must not change while they are in use."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return RawArray(NAMES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().data)


def to_tensor(raw: RawArray) -> torch.Tensor:
    """A tensor of its own memory."""
    dtype = DTYPES[raw.dtype]
    if raw.nbytes == 0:
        return torch.empty(raw.shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw.data), dtype=dtype).reshape(raw.shape)
