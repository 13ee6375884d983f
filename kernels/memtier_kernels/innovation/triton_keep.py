"""The kernels of keep_surprising: one order of all candidates, then two sweeps a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memtier_kernels.launch import launch

__all__ = ["keep_surprising"]

Tensor = torch.Tensor


def keep_surprising(innovation: Tensor, positions: Tensor, before: Tensor, m: int) -> Tensor:
    """See `memtier_kernels.keep_surprising`."""
    batch, n = innovation.shape
    rows = before.shape[0]
    device = innovation.device
    positions, before = positions.to(torch.int64), before.to(device, torch.int64).contiguous()
    ranks = torch.empty(batch, n, dtype=torch.int32, device=device)
    # positions in order of innovation
    ordered = torch.empty(batch, n, dtype=torch.int64, device=device)
    kept = torch.empty(batch, rows, m, dtype=torch.int64, device=device)
    tiles = triton.cdiv(n, 32)
    launch(
        _rank, (batch * tiles,), innovation, positions, ranks, ordered, *innovation.stride(), *positions.stride(), n,
        tiles, BLOCK_I=32, BLOCK_J=128, num_warps=4,
    )  # fmt: skip
    launch(
        _keep, (batch * rows,), ranks, positions, ordered, before, kept, *positions.stride(), n, rows, m,
        BLOCK=min(1024, max(16, triton.next_power_of_2(n))), num_warps=4,
    )  # fmt: skip
    return kept


@triton.jit
def _rank(
    innovation, positions, ranks, ordered, e_b, e_n, p_b, p_n, n, tiles, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr
):
    """How many candidates beat each: those of higher innovation, and of equal the older."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    e_i = tl.load(innovation + b * e_b + i * e_n, mask=i < n, other=0.0)[:, None]
    beaten_by = tl.zeros([BLOCK_I, BLOCK_J], tl.int32)
    for first in range(0, n, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        e_j = tl.load(innovation + b * e_b + j * e_n, mask=j < n, other=float("-inf"))[None, :]
        beaten_by += ((e_j > e_i) | ((e_j == e_i) & (j[None, :] < i[:, None]))).to(tl.int32)
    rank = tl.sum(beaten_by, 1)
    tl.store(ranks + b * n + i, rank, mask=i < n)
    tl.store(ordered + b * n + rank, tl.load(positions + b * p_b + i * p_n, mask=i < n, other=-1), mask=i < n)


@triton.jit
def _keep(ranks, positions, ordered, before, kept, p_b, p_n, n, rows, m, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    b = pid // rows
    end = tl.load(before + pid % rows)
    place = tl.arange(0, BLOCK)
    # from the highest innovation down: the rank of the last that has room
    last = tl.cast(n, tl.int32)
    count = tl.zeros([], tl.int32)
    first = tl.zeros([], tl.int32)
    while (first < n) & (count < m):
        rank = first + place
        position = tl.load(ordered + b * n + rank, mask=rank < n, other=-1)
        eligible = ((position >= 0) & (position < end)).to(tl.int32)
        number = count + tl.cumsum(eligible, 0)
        last = tl.minimum(last, tl.min(tl.where((eligible > 0) & (number == m), rank, n), 0))
        count += tl.sum(eligible, 0)
        first += BLOCK
    # from the oldest on: those that have room, in order of age
    kept += pid * m
    count = tl.zeros([], tl.int32)
    for start in range(0, n, BLOCK):
        i = start + place
        position = tl.load(positions + b * p_b + i * p_n, mask=i < n, other=-1)
        rank = tl.load(ranks + b * n + i, mask=i < n, other=n)
        chosen = ((position >= 0) & (position < end) & (rank <= last) & (i < n)).to(tl.int32)
        slot = count + tl.cumsum(chosen, 0) - 1
        tl.store(kept + slot, i.to(tl.int64), mask=chosen > 0)
        count += tl.sum(chosen, 0)
    for start in range(0, m, BLOCK):
        slot = start + place
        tl.store(kept + slot, tl.full([BLOCK], -1, tl.int64), mask=(slot >= count) & (slot < m))
