"""One token: the state is read once, moved on, multiplied by C, and written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from memtier_kernels.launch import launch
from memtier_kernels.ssd.triton_states import strides
from memtier_kernels.triton_tuning import config, tuned

__all__ = ["step"]


def step(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """See `memtier_kernels.ssd`, for T = 1."""
    batch, _, heads, head = x.shape
    groups, size = B.shape[2:]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    after = torch.empty(batch, heads, head, size, dtype=torch.float32, device=x.device)
    log_decay = torch.empty(batch, heads, dtype=torch.float32, device=x.device)
    launch(
        _step, lambda meta: (batch * heads * triton.cdiv(head, meta["BLOCK_P"]),),
        x, dt, A, B, C, D, state, y, after, log_decay,
        x.stride(0), *x.stride()[2:], dt.stride(0), dt.stride(2), A.stride(0), B.stride(0), *B.stride()[2:],
        C.stride(0), *C.stride()[2:], 0 if D is None else D.stride(0), *strides(state),
        batch * heads, heads, heads // groups, head, size, BLOCK_N=triton.next_power_of_2(size),
    )  # fmt: skip
    return y, after, log_decay


def _fits(one: triton.Config, arguments: dict[str, Any]) -> bool:
    # a thread holds 16 numbers of the state at most
    return one.kwargs["BLOCK_P"] * arguments["BLOCK_N"] <= 16 * 32 * one.num_warps


@tuned(
    [
        config(warps=4, stages=1, BLOCK_P=8),
        config(warps=4, stages=1, BLOCK_P=16),
        config(warps=8, stages=1, BLOCK_P=32),
    ],
    key=["P", "N", "rows"], prune=_fits,
)  # fmt: skip
@triton.jit(do_not_specialize=["rows", "dt_b"])
def _step(
    x, dt, A, B, C, D, state, y, after, log_decay,
    x_b, x_h, x_p, dt_b, dt_h, A_h, B_b, B_g, B_n, C_b, C_g, C_n, D_h, state_b, state_h, state_p, state_n,
    rows, H, J, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles = tl.cdiv(P, BLOCK_P)
    tile = pid % tiles
    h = (pid // tiles % H).to(tl.int64)
    g = (pid // tiles % H // J).to(tl.int64)
    b = (pid // tiles // H).to(tl.int64)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    p_ok, n_ok = p < P, n < N
    ok = p_ok[:, None] & n_ok[None, :]

    step = tl.load(dt + b * dt_b + h * dt_h).to(tl.float32)
    log = step * tl.load(A + h * A_h).to(tl.float32)
    x_P = tl.load(x + b * x_b + h * x_h + p * x_p, mask=p_ok, other=0.0).to(tl.float32)
    B_N = tl.load(B + b * B_b + g * B_g + n * B_n, mask=n_ok, other=0.0).to(tl.float32)
    C_N = tl.load(C + b * C_b + g * C_g + n * C_n, mask=n_ok, other=0.0).to(tl.float32)
    S = (step * x_P)[:, None] * B_N[None, :]
    if state is not None:
        at = state + b * state_b + h * state_h + p[:, None] * state_p + n[None, :] * state_n
        S += tl.exp(log) * tl.load(at, mask=ok, other=0.0).to(tl.float32)
    tl.store(after + (b * H + h) * P * N + p[:, None] * N + n[None, :], S, mask=ok)
    y_P = tl.sum(S * C_N[None, :], axis=1)
    if D is not None:
        y_P += tl.load(D + h * D_h).to(tl.float32) * x_P
    tl.store(y + (b * H + h) * P + p, y_P.to(y.dtype.element_ty), mask=p_ok)
    tl.store(log_decay + b * H + h, log, mask=tile == 0)
