"""Compile every kernel of an op to machine code with no GPU, and tell what the assembler says of each.

Run as a program by `memtier_kernels.testing.compile_report`, in a process of its own, since Triton's driver is replaced
by one that only names the architecture: one report asked for a line, as JSON, one answered a line. The op runs forward
and backward with its launches noted instead of run, so the compiled signatures are those of real calls.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import memtier_kernels
from memtier_kernels.launch import recording
from memtier_kernels.testing import leaves, make_inputs, tensors

__all__ = ["main", "report"]


class _Driver:
    """The part of Triton's driver that compilation asks."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device, so each architecture is one
        return self._arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def report(op: str, arch: int, dtype: torch.dtype, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """See `memtier_kernels.testing.compile_report`."""
    driver.set_active(_Driver(arch))  # pyright: ignore[reportArgumentType]
    rows: dict[str, dict[str, Any]] = {}

    def note(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        inner = getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel
        if inner is kernel:
            chosen = [({}, {})]
        else:
            kernel.nargs = dict(zip(kernel.arg_names, args, strict=False))
            chosen = [(c.kwargs, c.all_kwargs()) for c in kernel.prune_configs(constants)]
        for named, every in chosen:
            compiled = inner.warmup(*args, grid=(1,), **{**constants, **every})
            if compiled.hash not in rows:
                options = {k: getattr(compiled.metadata, k) for k in ("num_warps", "num_stages")}
                name = inner.fn.__name__
                rows[compiled.hash] = {"op": op, "kernel": name, "config": {**named, **options}, **_measure(compiled)}

    for i, sizes in enumerate(calls):
        # the backward pass of other sizes is that of the first
        _call(op, make_inputs(op, dtype=dtype, **sizes), note, backward=i == 0)
    return list(rows.values())


def _call(op: str, arguments: dict[str, Any], note: Callable[..., None], *, backward: bool) -> None:
    """The op without gradients, then perhaps forward and backward, its launches noted."""
    door = getattr(memtier_kernels, op)
    with recording(note):
        with torch.no_grad():
            door(**arguments, impl="triton")
        if not backward:
            return
        outputs = tensors(door(**arguments, impl="triton"))
        smooth = [t for t in outputs if t.requires_grad]
        if smooth:
            torch.autograd.grad(smooth, leaves(arguments), [torch.zeros_like(t) for t in smooth], allow_unused=True)


def _measure(compiled: Any) -> dict[str, Any]:
    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", said)}
    return {
        "registers": used["REG"],
        "shared_bytes": compiled.metadata.shared,
        # a kernel has no stack but for registers that did not fit
        "spill_bytes": used["STACK"],
        "has_dot": "tt.dot" in compiled.asm["ttir"],
        "has_mma": bool(re.search(r"\b(mma\.sync|wgmma\.mma_async)", compiled.asm["ptx"])),
    }


def main() -> None:
    """Answer each line of arguments of `report` with a line: its rows, or a text that says what went wrong."""
    # what the compilers print is no answer
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer: Any = report(asked["op"], asked["arch"], getattr(torch, asked["dtype"]), asked["calls"])
        except Exception:  # noqa: BLE001  it is told to who asked
            answer = traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
