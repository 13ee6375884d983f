"""Plain torch: each source alone, then `merge`. Scores and sums are float32 (float64 for float64 inputs)."""

from __future__ import annotations

from typing import Any

import torch

from memtier_kernels.dispatch import compute_dtype
from memtier_kernels.span_attention.sources import Band, Paged, merge

__all__ = ["band_attention", "paged_attention", "span_attention"]

# queries that share one slice of a band: larger wastes masked scores, smaller wastes calls
BAND_QUERIES = 128


def span_attention(
    q: torch.Tensor,
    q_far: torch.Tensor,
    sources: dict[str, Band | Paged | None],
    group: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """See `memtier_kernels.span_attention`."""
    results = {}
    for name, source in sources.items():
        if source is None:
            continue
        queries = q if name in ("window", "fading") else q_far
        if isinstance(source, Band):
            results[name] = band_attention(queries, source, scale)
        else:
            results[name] = paged_attention(queries, source, group, scale)
    if not results:
        nothing = torch.full(q.shape[:3], float("-inf"), dtype=compute_dtype(q.dtype), device=q.device)
        return torch.zeros_like(q), nothing, {}
    out, lse = merge(list(results.values()))
    return out.to(q.dtype), lse, {name: part for name, (_, part) in results.items()}


class _PartialAttention(torch.autograd.Function):
    """``o = softmax(q k^T) v`` and ``l = log sum exp(q k^T)`` of one source, with the gradients of both.

    q: (..., Q, D), scaled.   k, v: (..., n, D).   hidden: bool, broadcasts over (..., Q, n).
    One saved matrix of weights serves the whole backward pass: ``ds = p * (do v^T - sum(do * o) + dl)``.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = (q @ k.transpose(-1, -2)).to(compute_dtype(q.dtype)).masked_fill_(hidden, float("-inf"))
        top = scores.amax(-1, keepdim=True)
        top.masked_fill_(top == float("-inf"), 0.0)
        weights = scores.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        empty = total == 0
        total = total.masked_fill(empty, 1.0)
        p = weights.mul_(total.reciprocal()).to(v.dtype)
        out = p @ v
        lse = (top + total.log()).masked_fill_(empty, float("-inf")).squeeze(-1)
        ctx.save_for_backward(q, k, v, p, out)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, p, out = ctx.saved_tensors
        grad_out, grad_lse = grads[0].to(v.dtype), grads[1]
        shift = grad_lse - (grad_out * out).sum(-1).to(grad_lse.dtype)
        # hidden keys have p = 0, so nothing flows to them
        ds = (grad_out @ v.transpose(-1, -2)).add_(shift[..., None].to(v.dtype)).mul_(p)
        return ds @ k, ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad_out, None


def _partial(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial attention: out (..., Q, D) and lse (..., Q)."""
    if k.shape[-2] == 0:
        nothing = torch.full(q.shape[:-1], float("-inf"), dtype=compute_dtype(q.dtype), device=q.device)
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), nothing
    with torch.autocast(q.device.type, enabled=False):
        out, lse = _PartialAttention.apply(q, k, v, hidden)  # pyright: ignore[reportGeneralTypeIssues]
    return out, lse


def band_attention(q: torch.Tensor, band: Band, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial attention over a band.

    Returns:
        out (B, T, H, D) and lse (B, T, H).
    """
    batch, tokens, heads, size = q.shape
    kv_heads = band.k.shape[2]
    repeat = heads // kv_heads
    q_BGJTD = (q * scale).reshape(batch, tokens, kv_heads, repeat, size).permute(0, 2, 3, 1, 4)
    k_BGnD, v_BGnD = band.k.to(q.dtype).transpose(1, 2), band.v.to(q.dtype).transpose(1, 2)
    start_RT, end_RT = band.start.reshape(-1, tokens), band.end.reshape(-1, tokens)
    starts, ends = start_RT.amin(0).tolist(), end_RT.amax(0).tolist()
    outs, logs = [], []
    for first in range(0, tokens, BAND_QUERIES):
        last = min(first + BAND_QUERIES, tokens)
        # start and end never decrease, so the chunk's first start and last end bound it
        low, high = min(starts[first], ends[last - 1]), ends[last - 1]
        queries = q_BGJTD[:, :, :, first:last].reshape(batch, kv_heads, repeat * (last - first), size)
        index = torch.arange(low, high, device=q.device)
        hidden = (index < start_RT[:, None, first:last, None]) | (index >= end_RT[:, None, first:last, None])
        out, lse = _partial(queries, k_BGnD[:, :, low:high], v_BGnD[:, :, low:high], hidden.repeat(1, 1, repeat, 1))
        outs.append(out.reshape(batch, kv_heads, repeat, last - first, size))
        logs.append(lse.reshape(batch, kv_heads, repeat, last - first))
    out = torch.cat(outs, dim=3).permute(0, 3, 1, 2, 4).reshape(batch, tokens, heads, size)
    return out, torch.cat(logs, dim=3).permute(0, 3, 1, 2).reshape(batch, tokens, heads)


def paged_attention(
    q: torch.Tensor, source: Paged, group: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial attention over a pool by table: the queries of a group share one gather.

    Returns:
        out (B, T, H, D) and lse (B, T, H).
    """
    batch, tokens, heads, size = q.shape
    pool_blocks, block, kv_heads = source.k.shape[1:4]
    rows, blocks = source.table.shape[1:]
    repeat = heads // kv_heads
    # queries by group, padded to the longest: place[t] is the slot of query t, take[slot] the query of a slot
    if rows == 1 or group is None:
        per_row = tokens
        take = torch.arange(tokens, device=q.device)[None].expand(rows, tokens)
        place = take[0]
    else:
        sizes = torch.bincount(group, minlength=rows)
        per_row = int(sizes.max())
        offset = torch.arange(tokens, device=q.device) - (sizes.cumsum(0) - sizes)[group]
        place = group * per_row + offset
        take = torch.zeros(rows * per_row, dtype=torch.int64, device=q.device)
        take[place] = torch.arange(tokens, device=q.device)
        take = take.reshape(rows, per_row)
    q_BRGJQD = (q * scale)[:, take.reshape(-1)]
    q_BRGJQD = q_BRGJQD.reshape(batch, rows, per_row, kv_heads, repeat, size).permute(0, 1, 3, 4, 2, 5)

    # a missing block reads block 0 and is masked
    base = torch.arange(batch, device=q.device)[:, None, None] * pool_blocks
    shared = source.k.stride(0) == 0 and source.v.stride(0) == 0 and not source.k.requires_grad
    flat = (source.table.clamp(min=0) + (0 if shared else base)).reshape(-1)
    pool = slice(0, 1) if shared else slice(None)
    keys = source.k[pool].reshape(-1, block * kv_heads * size).index_select(0, flat)
    values = source.v[pool].reshape(-1, block * kv_heads * size).index_select(0, flat)
    # a pool of a coarser dtype widens before it is rotated
    keys = keys.reshape(batch, rows, blocks * block, kv_heads, size).to(q.dtype)
    values = values.reshape(batch, rows, blocks * block, kv_heads, size).to(q.dtype)
    if source.cos is not None and source.sin is not None:
        left, right = keys.chunk(2, dim=-1)
        turned = torch.cat([-right, left], dim=-1)
        keys = keys * source.cos[:, None].to(keys.dtype) + turned * source.sin[:, None].to(keys.dtype)
    hidden = (source.table < 0)[..., None].expand(batch, rows, blocks, block)
    if source.mask is not None:
        hidden = hidden | ~source.mask
    hidden = hidden.reshape(batch, rows, 1, 1, blocks * block)

    queries = q_BRGJQD.reshape(batch, rows, kv_heads, repeat * per_row, size)
    out, lse = _partial(queries, keys.transpose(2, 3), values.transpose(2, 3), hidden)
    out = out.reshape(batch, rows, kv_heads, repeat, per_row, size).permute(0, 1, 4, 2, 3, 5)
    lse = lse.reshape(batch, rows, kv_heads, repeat, per_row).permute(0, 1, 4, 2, 3)
    out = out.reshape(batch, rows * per_row, heads, size)[:, place]
    return out, lse.reshape(batch, rows * per_row, heads)[:, place]
