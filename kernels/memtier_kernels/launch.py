"""Launching a kernel: on its tensors' device, or, while a report is made, noted instead of run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["dense", "is_recording", "launch", "recording"]

_record: Callable[[Any, tuple[Any, ...], dict[str, Any]], None] | None = None


def launch(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``; the first argument is a tensor, whose device runs it.

    Args:
        grid: programs along up to three axes, or a function of the chosen configuration.
    """
    # said aloud, since the default of this option changes between Triton's versions
    constants["enable_fp_fusion"] = True
    if _record is not None:
        _record(kernel, args, constants)
    elif args[0].is_cuda:
        with torch.cuda.device(args[0].device):
            kernel[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants)


@contextmanager
def recording(note: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Within, kernels do not run: `note(kernel, args, constants)` is called instead, and outputs stay as allocated."""
    global _record
    before, _record = _record, note
    try:
        yield
    finally:
        _record = before


def dense(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last axis is dense, else a copy: kernels take the strides of the other axes."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def is_recording() -> bool:
    """Whether launches are noted instead of run: then a kernel needs no device."""
    return _record is not None
