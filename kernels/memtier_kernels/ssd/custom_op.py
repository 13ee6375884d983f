"""`ssd` as an operator that torch.compile keeps whole, with its gradient."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["ssd"]

Tensor = torch.Tensor


@torch.library.custom_op("memtier::ssd", mutates_args=())
def _ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from memtier_kernels.ssd.triton_forward import forward

    x, B, C = _dense(x), _dense(B), _dense(C)
    return forward(x, dt, A, B, C, D, state, cu_seqlens)


@torch.library.custom_op("memtier::ssd_step", mutates_args=())
def _ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from memtier_kernels.ssd.triton_step import step

    return step(x, dt, A, B, C, D, state)


@torch.library.custom_op("memtier::ssd_backward", mutates_args=())
def _ssd_backward(
    dy: Tensor, dlast: Tensor, dlog: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    state: Tensor | None, cu_seqlens: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    from memtier_kernels.ssd.triton_backward import backward

    dy, x, B, C = _dense(dy), _dense(x), _dense(B), _dense(C)
    return list(backward(dy, dlast, dlog, x, dt, A, B, C, D, state, cu_seqlens))


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@_ssd.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads, head, size = x.shape[2], x.shape[3], B.shape[3]
    return (
        x.new_empty(x.shape),
        x.new_empty(sequences, heads, head, size, dtype=torch.float32),
        x.new_empty(sequences, heads, dtype=torch.float32),
    )


@_ssd_step.register_fake
def _(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, head = x.shape
    return (
        x.new_empty(x.shape),
        x.new_empty(batch, heads, head, B.shape[3], dtype=torch.float32),
        x.new_empty(batch, heads, dtype=torch.float32),
    )


@_ssd_backward.register_fake
def _(
    dy: Tensor, dlast: Tensor, dlog: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    state: Tensor | None, cu_seqlens: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    like = [tensor.new_empty(tensor.shape) for tensor in (x, dt, A, B, C)]
    dD = x.new_empty(0) if D is None else D.new_empty(D.shape)
    return [*like, dD, dlast.new_empty(dlast.shape)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor, dlast: Tensor, dlog: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dx, ddt, dA, dB, dC, dD, dstate = torch.ops.memtier.ssd_backward(dy, dlast, dlog, *saved)
    D, state = saved[5:7]
    return dx, ddt, dA, dB, dC, None if D is None else dD, None if state is None else dstate, None


_ssd.register_autograd(_backward, setup_context=_setup)


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None,
    cu_seqlens: Tensor | None, chunk_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `memtier_kernels.ssd`; the kernels choose their own chunks."""
    del chunk_tokens
    wants_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, dt, A, B, C, D, state))
    if x.shape[1] == 1 and cu_seqlens is None and not wants_grad:
        return torch.ops.memtier.ssd_step(x, dt, A, B, C, D, state)
    if state is not None:
        state = state.float()
    return torch.ops.memtier.ssd(x, dt, A, B.to(x.dtype), C.to(x.dtype), D, state, cu_seqlens)
