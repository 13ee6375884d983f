"""Valid random arguments for every door, of any size: for tests, benchmarks and checks from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memtier.errors import ConfigError
from memtier_kernels.span_attention.sources import Band, Paged

__all__ = ["OPS", "make_inputs"]


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


def _ssd(d: _Draw, *, B: int, T: int, H: int, G: int, P: int, N: int) -> dict[str, Any]:
    return {
        "x": d.normal(B, T, H, P), "dt": d.positive(B, T, H), "A": -d.positive(H).detach(), "B": d.normal(B, T, G, N),
        "C": d.normal(B, T, G, N), "D": d.normal(H), "state": d.normal(B, H, P, N, dtype=d.wide),
    }  # fmt: skip


def _causal_conv1d(d: _Draw, *, B: int, T: int, C: int, width: int) -> dict[str, Any]:
    return {
        "x": d.normal(B, T, C), "weight": d.normal(C, width), "bias": d.normal(C), "tail": d.normal(B, width - 1, C),
        "activation": "silu",
    }  # fmt: skip


def _landmarks(d: _Draw, *, B: int, n: int, S: int, G: int, D: int) -> dict[str, Any]:
    return {"keys": d.normal(B, n, S, G, D)}


def _select_blocks(d: _Draw, *, B: int, R: int, n: int, C: int, k: int) -> dict[str, Any]:
    return {
        "queries": d.fixed(B, R, C), "landmarks": d.fixed(B, n, C), "visible": d.integers(0, n + 1, R), "k": k,
    }  # fmt: skip


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
    "innovation": {"B": 2, "T": 33, "E": 24},
    "keep_surprising": {"B": 2, "n": 40, "R": 3, "m": 8},
    "landmarks": {"B": 2, "n": 5, "S": 4, "G": 2, "D": 8},
    "select_blocks": {"B": 2, "R": 3, "n": 20, "C": 16, "k": 4},
    "span_attention": {
        "B": 2, "T": 33, "H": 4, "G": 2, "D": 16, "W": 16, "S": 4, "K": 3, "blocks": 10, "M": 5, "r": 4, "sinks": 2,
    },
    "ssd": {"B": 2, "T": 33, "H": 4, "G": 2, "P": 8, "N": 6},
}  # fmt: skip
