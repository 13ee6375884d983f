"""For tests, benchmarks and checks from outside: valid random arguments for every door, the error of a kernel against
its float64 reference, and what the assembler says of each kernel."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from memtier.errors import ConfigError, KernelError
from memtier_kernels.span_attention.sources import Band, Paged

__all__ = ["OPS", "compare", "compile_report", "leaves", "make_inputs", "tensors"]


def make_inputs(
    op: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **sizes: int
) -> dict[str, Any]:
    """Arguments for ``memtier_kernels.<op>(**arguments)``.

    Args:
        op: the name of a door, one of `OPS`.
        seed: the same seed gives the same arguments, on any device.
        dtype: of the floating-point tensors that may have any; states and decays stay float32 or float64.
        sizes: any of the sizes in `OPS[op]`, by name.

    Returns:
        Tensors with requires_grad set where the op has a gradient.

    Raises:
        ConfigError: no such op, or no such size.
    """
    if op not in _MAKERS:
        raise ConfigError(f"op is {op!r}; it must be one of {sorted(_MAKERS)}.")
    if unknown := sorted(set(sizes) - set(OPS[op])):
        raise ConfigError(f"{op} has no size {unknown[0]!r}; its sizes are {sorted(OPS[op])}.")
    draw = _Draw(seed, dtype, torch.device(device))
    return _MAKERS[op](draw, **{**OPS[op], **sizes})


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in a value: itself, or those in a dict, list, tuple or dataclass, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for _, part in _parts(value) for tensor in tensors(part)]


def leaves(arguments: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among a door's arguments that want a gradient."""
    return [t for t in tensors(arguments) if t.requires_grad]


def compare(
    op: str,
    arguments: dict[str, Any],
    *,
    impl: str = "triton",
    seed: int = 0,
) -> dict[str, float]:
    """Errors of a door against its reference in float64, on the same numbers, for outputs and all gradients.

    Args:
        op: the name of a door.
        arguments: what the door takes (`make_inputs` draws some).
        impl: the implementation to judge.
        seed: of the random gradients that flow into the outputs.

    Returns:
        For every floating output ("out.0" ..) and every input gradient ("grad.q" ..): the largest difference over the
        largest magnitude. For an output of integers: the share of entries that differ. An entry that is infinite or
        NaN on one side only gives an infinite error.
    """
    door = getattr(importlib.import_module("memtier_kernels"), op)
    wide = _widen(arguments)
    got, wanted = tensors(door(**arguments, impl=impl)), tensors(door(**wide, impl="reference"))
    errors = {f"out.{i}": _error(a, b) for i, (a, b) in enumerate(zip(got, wanted, strict=True))}
    mine, theirs = leaves(arguments), leaves(wide)
    if not mine:
        return errors
    draw = torch.Generator().manual_seed(seed)
    flows = []
    for tensor in wanted:
        flow = torch.randn(tensor.shape, generator=draw, dtype=torch.float64).to(tensor.device)
        # nothing flows back from the log-sum-exp of a row that saw nothing
        flows.append(flow.masked_fill(~tensor.isfinite(), 0.0))
    smooth = [i for i, tensor in enumerate(wanted) if tensor.requires_grad]
    grads = torch.autograd.grad(
        [got[i] for i in smooth], mine, [flows[i].to(got[i].dtype) for i in smooth], allow_unused=True
    )
    exact = torch.autograd.grad([wanted[i] for i in smooth], theirs, [flows[i] for i in smooth], allow_unused=True)
    for name, a, b in zip(_leaf_names(arguments), grads, exact, strict=True):
        if a is not None or b is not None:
            zero = torch.zeros_like(b if a is None else a)
            errors[f"grad.{name}"] = _error(zero if a is None else a, zero if b is None else b)
    return errors


def compile_report(
    op: str, arch: int | str, *, dtype: torch.dtype = torch.bfloat16, **sizes: int
) -> list[dict[str, Any]]:
    """Compile every kernel of an op, forward and backward, without a GPU.

    Args:
        op: the name of a door.
        arch: "sm_80", "sm_90", or the number alone.
        dtype: of the inputs.
        sizes: as for `make_inputs`; what is not given is of a size met in practice (`REPORT_SIZES`).

    Returns:
        One row for every kernel and every configuration that the autotuner may pick: op, kernel, config, registers
        (per thread), shared_bytes (per block), spill_bytes (per thread), has_dot (the kernel multiplies matrices) and
        has_mma (by matrix instructions).

    Raises:
        ConfigError: no such op or size.
        KernelError: a kernel does not compile.
    """
    if op not in OPS:
        raise ConfigError(f"op is {op!r}; it must be one of {sorted(OPS)}.")
    asked = {"op": op, "arch": int(str(arch).removeprefix("sm_")), "dtype": str(dtype).removeprefix("torch.")}
    command = json.dumps({**asked, "calls": [{**preset, **sizes} for preset in REPORT_SIZES.get(op, [{}])]})
    compiler = _offline_compiler()
    with contextlib.suppress(BrokenPipeError):
        print(command, file=compiler.stdin, flush=True)
    assert compiler.stdout is not None
    line = compiler.stdout.readline()
    if not line:
        _offline_compiler.cache_clear()
    answer = json.loads(line) if line else f"the compiler ended with status {compiler.wait()}; see above."
    if isinstance(answer, str):
        raise KernelError(f"a kernel of {op} does not compile for sm_{asked['arch']}: {answer.strip()[-2000:]}")
    return answer


@functools.cache
def _offline_compiler() -> subprocess.Popen[str]:
    """The process that compiles for every report of this one, as starting it takes seconds; it ends with this one."""
    compiler = subprocess.Popen(
        [sys.executable, "-m", "memtier_kernels.triton_offline"],
        env={**os.environ, "TRITON_INTERPRET": "0"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    atexit.register(compiler.communicate)
    return compiler


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return [(str(i), part) for i, part in enumerate(value)]
    return [(f.name, getattr(value, f.name)) for f in fields(value)] if is_dataclass(value) else []


def _leaf_names(value: Any) -> list[str]:
    if isinstance(value, torch.Tensor):
        return [""] if value.requires_grad else []
    return [f"{name}.{rest}".strip(".") for name, part in _parts(value) for rest in _leaf_names(part)]


def _widen(value: Any) -> Any:
    """A copy whose floating tensors are float64 leaves."""
    if isinstance(value, torch.Tensor):
        return value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _widen(part) for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{name: _widen(part) for name, part in _parts(value)})
    return value


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    if not wanted.numel():
        return 0.0
    if not wanted.is_floating_point():
        return float((got != wanted).double().mean())
    a, b = got.detach().double(), wanted.detach().double()
    finite = b.isfinite()
    if not bool((a.isfinite() == finite).all()) or not bool((a == b)[~finite].all()):
        return float("inf")
    a, b = a.masked_fill(~finite, 0.0), b.masked_fill(~finite, 0.0)
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


class _Draw:
    """Random tensors: drawn on the CPU in float64, then moved, so that every device and dtype sees the same numbers."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale
        return drawn.to(self.device, dtype or self.dtype).requires_grad_()

    def fixed(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.normal(*shape, dtype=dtype).detach()

    def positive(self, *shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=self.generator, dtype=torch.float64).exp() * 0.1
        return drawn.to(self.device, self.wide).requires_grad_()

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)


def _ssd(d: _Draw, *, B: int, T: int, H: int, G: int, P: int, N: int, sequences: int) -> dict[str, Any]:
    rate = (-d.positive(H).detach()).requires_grad_()
    arguments: dict[str, Any] = {
        "x": d.normal(B, T, H, P), "dt": d.positive(B, T, H), "A": rate, "B": d.normal(B, T, G, N),
        "C": d.normal(B, T, G, N), "D": d.normal(H), "state": d.normal(sequences or B, H, P, N, dtype=d.wide),
    }  # fmt: skip
    if sequences:
        cuts = d.integers(0, T + 1, sequences - 1).sort().values
        arguments["cu_seqlens"] = F.pad(F.pad(cuts, (1, 0)), (0, 1), value=T)
    return arguments


def _causal_conv1d(d: _Draw, *, B: int, T: int, C: int, width: int) -> dict[str, Any]:
    return {
        "x": d.normal(B, T, C), "weight": d.normal(C, width), "bias": d.normal(C), "tail": d.normal(B, width - 1, C),
        "activation": "silu",
    }  # fmt: skip


def _gated_rms_norm(d: _Draw, *, B: int, T: int, E: int) -> dict[str, Any]:
    return {"x": d.normal(B, T, E), "gate": d.normal(B, T, E), "weight": d.normal(E), "eps": 1e-5}


def _landmarks(d: _Draw, *, B: int, n: int, S: int, G: int, D: int) -> dict[str, Any]:
    return {"keys": d.normal(B, n, S, G, D)}


def _select_blocks(d: _Draw, *, B: int, R: int, n: int, C: int, k: int, H: int, G: int, m: int) -> dict[str, Any]:
    queries, marks = (B, R, C), (B, n, C)
    if m:
        queries, marks = (B, R, H, C), (B, n, m, G, C)
    return {"queries": d.fixed(*queries), "landmarks": d.fixed(*marks), "visible": d.integers(0, n + 1, R), "k": k}


def _innovation(d: _Draw, *, B: int, T: int, E: int) -> dict[str, Any]:
    return {"h": d.normal(B, T, E), "predicted": d.normal(B, T, E)}


def _keep_surprising(d: _Draw, *, B: int, n: int, R: int, m: int) -> dict[str, Any]:
    positions = torch.arange(n, device=d.device).expand(B, n)
    return {
        "innovation": d.fixed(B, n, dtype=d.wide), "positions": positions, "before": d.integers(0, n + 1, R), "m": m,
    }  # fmt: skip


def _span_attention(
    d: _Draw, *, B: int, T: int, H: int, G: int, D: int, W: int, S: int, K: int, blocks: int, M: int, r: int, sinks: int
) -> dict[str, Any]:
    ring = W + S + r
    now = torch.arange(T, device=d.device)
    group = now // r
    rows = (T - 1) // r + 1
    lo = group * r + ring - W + 1
    kv = (B, 2 * ring + T, G, D)
    return {
        "q": d.normal(B, T, H, D), "q_far": d.normal(B, T, H, D), "group": group,
        "window": Band(d.normal(B, ring + T, G, D), d.normal(B, ring + T, G, D), lo, now + ring + 1),
        "fading": Band(d.normal(*kv), d.normal(*kv), lo + ring - W, lo + ring),
        "span": Paged(
            d.normal(B, blocks, S, G, D), d.normal(B, blocks, S, G, D), d.integers(-1, blocks, B, rows, K),
            mask=d.integers(0, 8, B, rows, K, S) > 0,
        ),
        "eidetic": Paged(d.normal(B, 2 * M, 1, G, D), d.normal(B, 2 * M, 1, G, D), d.integers(-1, 2 * M, B, rows, M)),
        "sinks": Paged(d.normal(B, sinks, 1, G, D), d.normal(B, sinks, 1, G, D), d.integers(-1, sinks, B, 1, sinks)),
    }  # fmt: skip


_MAKERS: dict[str, Callable[..., dict[str, Any]]] = {
    "causal_conv1d": _causal_conv1d,
    "gated_rms_norm": _gated_rms_norm,
    "innovation": _innovation,
    "keep_surprising": _keep_surprising,
    "landmarks": _landmarks,
    "select_blocks": _select_blocks,
    "span_attention": _span_attention,
    "ssd": _ssd,
}

# the sizes of each op, with the values they have unless given
OPS: dict[str, dict[str, int]] = {
    "causal_conv1d": {"B": 2, "T": 33, "C": 12, "width": 4},
    "gated_rms_norm": {"B": 2, "T": 33, "E": 24},
    "innovation": {"B": 2, "T": 33, "E": 24},
    "keep_surprising": {"B": 2, "n": 40, "R": 3, "m": 8},
    "landmarks": {"B": 2, "n": 5, "S": 4, "G": 2, "D": 8},
    # m landmarks a block, by heads of size C; 0 for one landmark of C channels
    "select_blocks": {"B": 2, "R": 3, "n": 20, "C": 16, "k": 4, "H": 4, "G": 2, "m": 0},
    "span_attention": {
        "B": 2, "T": 33, "H": 4, "G": 2, "D": 16, "W": 16, "S": 4, "K": 3, "blocks": 10, "M": 5, "r": 4, "sinks": 2,
    },
    # `sequences` packed in a batch of 1, some of them maybe empty; 0 for a batch of whole ones
    "ssd": {"B": 2, "T": 33, "H": 4, "G": 2, "P": 8, "N": 6, "sequences": 0},
}  # fmt: skip

_SPAN_ATTENTION = {
    "B": 1, "H": 32, "G": 8, "D": 128, "W": 256, "S": 64, "K": 8, "blocks": 32, "M": 64, "r": 64, "sinks": 4,
}  # fmt: skip
_SSD = {"B": 1, "H": 16, "G": 1, "P": 64, "N": 128}

# sizes met in practice, where tiles are as large as they get: the calls that `compile_report` compiles, the first of
# them forward and backward
REPORT_SIZES: dict[str, list[dict[str, int]]] = {
    # a sequence, and one token
    "causal_conv1d": [{"B": 2, "T": 512, "C": 1024}, {"B": 8, "T": 1, "C": 1024}],
    # a row in registers, and a row too long for that
    "gated_rms_norm": [{"B": 2, "T": 512, "E": 4096}, {"B": 2, "T": 512, "E": 16_384}],
    "innovation": [{"B": 2, "T": 512, "E": 2048}],
    "keep_surprising": [{"B": 2, "n": 512, "m": 64}],
    "landmarks": [{"B": 1, "n": 16, "S": 64, "G": 8, "D": 128}],
    # many rows, one row, and late interaction
    "select_blocks": [
        {"B": 1, "R": 32, "n": 4096, "C": 1024, "k": 8},
        {"B": 1, "R": 1, "n": 4096, "C": 1024, "k": 64},
        {"B": 1, "R": 32, "n": 4096, "C": 128, "k": 8, "H": 32, "G": 8, "m": 4},
    ],
    # prefill, and decoding
    "span_attention": [{**_SPAN_ATTENTION, "T": 512}, {**_SPAN_ATTENTION, "T": 1}],
    # a sequence, packed sequences, and one token
    "ssd": [{**_SSD, "T": 512}, {**_SSD, "T": 512, "sequences": 4}, {**_SSD, "T": 1}],
}
