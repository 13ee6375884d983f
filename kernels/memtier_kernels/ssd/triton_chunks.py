"""The list of chunks that all kernels of `ssd` walk, and the decays within each chunk.

All sequences, of a batch or packed, are cut into chunks of Q tokens, numbered one after another: everything that is
kept per chunk has that number as its first axis. A sequence has one chunk at least, so an empty one hands its state on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from memtier_kernels.launch import launch

__all__ = ["Chunks", "Decays", "decays", "locate", "padded", "plan"]

# enough for two on each of the 132 multiprocessors of a large GPU, twice over
_PROGRAMS = 528


@dataclass(frozen=True)
class Chunks:
    """How tokens are cut: `Q` tokens a chunk, `each` chunks a sequence (0 if packed), `total` chunks in all.

    `run` chunks are walked by one program where states pass from chunk to chunk, in `runs` runs.
    `table` (total, 5) int64, for packed sequences: sequence, first token, tokens, is the first, is the last.
    """

    Q: int
    each: int
    total: int
    run: int
    runs: int
    sequences: int
    table: torch.Tensor | None

    def heads_each(self, groups: int, heads: int) -> int:
        """How many of a group's `heads` one program takes, where chunks are worked on apart: they share B and C."""
        return max(1, min(heads, self.total * groups * heads // _PROGRAMS))


def padded(size: int) -> int:
    """What a tile is long to hold `size`: a power of two, and as long as a matrix instruction needs."""
    return max(16, triton.next_power_of_2(size))


def plan(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> Chunks:
    """Cut `x` (B, T, H, P) into chunks; no value is read from the device."""
    batch, tokens, heads, _ = x.shape
    # products of float32 take three times the registers
    Q = 32 if x.dtype == torch.float32 else 64
    if cu_seqlens is None:
        each = max(1, triton.cdiv(tokens, Q))
        total, sequences, table = batch * each, batch, None
    else:
        each, sequences = 0, cu_seqlens.shape[0] - 1
        # a sequence has at most one chunk more than whole ones
        total = tokens // Q + sequences
        table = _table(cu_seqlens.to(torch.int64), Q, total)
    run = min(64, max(1, total * heads // _PROGRAMS))
    return Chunks(Q, each, total, run, triton.cdiv(total, run), sequences, table)


def _table(cu: torch.Tensor, Q: int, total: int) -> torch.Tensor:
    counts = ((cu.diff() + Q - 1) // Q).clamp(min=1)
    ends = counts.cumsum(0)
    chunk = torch.arange(total, device=cu.device)
    found = torch.searchsorted(ends, chunk, right=True)
    # chunks beyond the last sequence have no token and belong to none
    used = found < counts.shape[0]
    sequence = found.clamp(max=counts.shape[0] - 1)
    local = chunk - (ends - counts)[sequence]
    start = cu[sequence] + local * Q
    tokens = torch.minimum(cu[sequence + 1] - start, torch.full_like(start, Q))
    columns = [sequence, start, tokens, (local == 0).to(cu.dtype), (local == counts[sequence] - 1).to(cu.dtype)]
    return torch.stack([column.where(used, 0) for column in columns], dim=1)


@triton.jit
def locate(table, c, tokens, each, Q: tl.constexpr, PACKED: tl.constexpr):
    """Row of the batch, sequence, first token, number of tokens, is the first, is the last, of chunk `c` (int32)."""
    if PACKED:
        row = table + c.to(tl.int64) * 5
        sequence, start, count = tl.load(row), tl.load(row + 1), tl.load(row + 2)
        return sequence * 0, sequence, start, count, tl.load(row + 3) > 0, tl.load(row + 4) > 0
    else:
        local = c % each
        sequence, start = (c // each).to(tl.int64), local.to(tl.int64) * Q
        return sequence, sequence, start, tl.minimum(tokens - start, Q), local == 0, local == each - 1


@dataclass(frozen=True)
class Decays:
    """Per chunk, head and token: `dt`, and the sum of log2 decays since the chunk began as `high + low`, all float32.

    (total, H, Q). Past the end of a sequence dt is 0 and the sum stays. `whole` (total, H) float64 is the chunk's sum.
    """

    dt: torch.Tensor
    high: torch.Tensor
    low: torch.Tensor
    whole: torch.Tensor


def decays(dt: torch.Tensor, A: torch.Tensor, chunks: Chunks) -> Decays:
    """Sums of ``dt A`` within each chunk, for dt (B, T, H) and A (H,)."""
    tokens, heads = dt.shape[1:]
    shape = (chunks.total, heads, chunks.Q)
    steps, high, low = (torch.empty(shape, dtype=torch.float32, device=dt.device) for _ in range(3))
    out = Decays(steps, high, low, torch.empty(shape[:2], dtype=torch.float64, device=dt.device))
    block = min(16, triton.next_power_of_2(heads))
    launch(
        _decays, (chunks.total * triton.cdiv(heads, block),), dt, A, chunks.table, out.dt, out.high, out.low, out.whole,
        dt.stride(0), dt.stride(1), dt.stride(2), A.stride(0), tokens, chunks.each, heads,
        Q=chunks.Q, BLOCK_H=block, PACKED=chunks.table is not None, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["stride_b", "tokens", "each"])
def _decays(
    dt, A, table, out_dt, out_high, out_low, out_whole, stride_b, stride_t, stride_h, stride_A, tokens, each, H,
    Q: tl.constexpr, BLOCK_H: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    # divisions in 32 bits: those of 64 take many registers; offsets in 64
    pid = tl.program_id(0)
    blocks = tl.cdiv(H, BLOCK_H)
    c = pid // blocks
    batch, _, start, count, _, _ = locate(table, c, tokens, each, Q, PACKED)
    c = c.to(tl.int64)
    h = (pid % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, Q)
    head_ok = h < H
    ok = (i < count)[:, None] & head_ok[None, :]
    rows = batch * stride_b + (start + i) * stride_t
    step = tl.load(dt + rows[:, None] + (h * stride_h)[None, :], mask=ok, other=0.0).to(tl.float32)
    rate = tl.load(A + h * stride_A, mask=head_ok, other=0.0).to(tl.float64) * 1.4426950408889634
    # In float64, and kept as two float32: a slow stretch after a fast one lives in the difference of two large sums.
    decay = step.to(tl.float64) * rate[None, :]
    total = tl.cumsum(decay, axis=0)
    high = total.to(tl.float32)
    low = (total - high.to(tl.float64)).to(tl.float32)
    to = ((c * H + h) * Q)[None, :] + i[:, None]
    mask = head_ok[None, :] & (i < Q)[:, None]
    tl.store(out_dt + to, step, mask=mask)
    tl.store(out_high + to, high, mask=mask)
    tl.store(out_low + to, low, mask=mask)
    tl.store(out_whole + c * H + h, tl.sum(decay, axis=0), mask=head_ok)
