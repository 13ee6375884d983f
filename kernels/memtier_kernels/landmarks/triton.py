"""The kernels of landmarks: a mean over the keys of a block, and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memtier_kernels.launch import dense, launch

__all__ = ["backward", "forward"]

Tensor = torch.Tensor

# channels of a program
_CHANNELS = 128


def forward(keys: Tensor) -> Tensor:
    """See `memtier_kernels.landmarks`."""
    keys = dense(keys)
    batch, n, block, groups, size = keys.shape
    marks = torch.empty(batch, n, groups * size, dtype=torch.float32, device=keys.device)
    launch(
        _mean, (batch * n, triton.cdiv(groups * size, _CHANNELS)), keys, marks, *keys.stride()[:4], n, groups, block,
        D=size, BLOCK_S=min(32, max(2, triton.next_power_of_2(block))), BLOCK_C=_CHANNELS, num_warps=4,
    )  # fmt: skip
    return marks


def backward(dmarks: Tensor, block: int, groups: int, dtype: torch.dtype) -> Tensor:
    """The gradient of the keys, (B, n, block, groups, D) of `dtype`."""
    dmarks = dense(dmarks)
    batch, n, channels = dmarks.shape
    dkeys = torch.empty(batch, n, block, groups, channels // groups, dtype=dtype, device=dmarks.device)
    launch(
        _spread, (batch * n, triton.cdiv(channels, _CHANNELS)), dmarks, dkeys, *dmarks.stride()[:2], n, block,
        channels, BLOCK_S=min(32, max(2, triton.next_power_of_2(block))), BLOCK_C=_CHANNELS, num_warps=4,
    )  # fmt: skip
    return dkeys


@triton.jit
def _mean(
    keys, marks, k_b, k_n, k_s, k_g, n, groups, block,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    channels = groups * D
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    keys += pid // n * k_b + pid % n * k_n
    at_C = (c // D).to(tl.int64) * k_g + c % D
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for first in range(0, block, BLOCK_S):
        s = (first + tl.arange(0, BLOCK_S)).to(tl.int64)
        ok = (s < block)[:, None] & (c < channels)[None, :]
        total += tl.load(keys + (s * k_s)[:, None] + at_C[None, :], mask=ok, other=0.0).to(tl.float32)
    tl.store(marks + pid * channels + c, tl.sum(total, 0) / block, mask=c < channels)


@triton.jit
def _spread(dmarks, dkeys, d_b, d_n, n, block, channels, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    flow = tl.load(dmarks + pid // n * d_b + pid % n * d_n + c, mask=c < channels, other=0.0).to(tl.float32)
    share = (flow / block).to(dkeys.dtype.element_ty)
    for first in range(0, block, BLOCK_S):
        s = (first + tl.arange(0, BLOCK_S)).to(tl.int64)
        ok = (s < block)[:, None] & (c < channels)[None, :]
        at = (pid * block + s)[:, None] * channels + c[None, :]
        tl.store(dkeys + at, tl.broadcast_to(share[None, :], [BLOCK_S, BLOCK_C]), mask=ok)
