"""Plain torch: each source alone, then `merge`. Scores and sums are float32 (float64 for float64 inputs)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from memtier_kernels.dispatch import compute_dtype
from memtier_kernels.span_attention.sources import Band, Paged, merge

__all__ = ["band_attention", "paged_attention", "span_attention"]

# queries that share one slice of a band: larger wastes masked scores, smaller wastes calls
BAND_QUERIES = 96
# such slices that are read in one call
BAND_CHUNKS = 8
# rows of a table that are gathered in one call: larger leaves the CPU's cache
PAGED_ROWS = 8


def span_attention(
    q: torch.Tensor,
    q_far: torch.Tensor,
    sources: dict[str, Band | Paged | None],
    group: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """See `memtier_kernels.span_attention`."""
    results = {}
    for name, source in sources.items():
        if source is None:
            continue
        queries = q if name in ("window", "fading") else q_far
        if isinstance(source, Band):
            results[name] = band_attention(queries, source, scale, softcap)
        else:
            results[name] = paged_attention(queries, source, group, scale, softcap)
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
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial attention: out (..., Q, D) and lse (..., Q)."""
    if k.shape[-2] == 0:
        nothing = torch.full(q.shape[:-1], float("-inf"), dtype=compute_dtype(q.dtype), device=q.device)
        return q.new_zeros(*q.shape[:-1], v.shape[-1]), nothing
    if softcap is not None:
        return _capped(q, k, v, hidden, softcap)
    if q.device.type == "cpu" and not _wants_gradient(q, k, v):
        return _flash_on_cpu(q, k, v, hidden)
    with torch.autocast(q.device.type, enabled=False):
        out, lse = _PartialAttention.apply(q, k, v, hidden)  # pyright: ignore[reportGeneralTypeIssues]
    return out, lse


def _wants_gradient(*inputs: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of scores that saturate at `softcap`, step by step: no fused attention takes them."""
    scores = softcap * ((q @ k.transpose(-1, -2)).to(compute_dtype(q.dtype)) / softcap).tanh()
    lse = scores.masked_fill(hidden, float("-inf")).logsumexp(-1)
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    weights = (scores - shift[..., None]).exp().masked_fill(hidden, 0.0)
    return weights.to(v.dtype) @ v, lse


def _flash_on_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by torch's own fused attention, whose public door keeps the log-sum-exp to itself.

    It has a backward pass, but none for the log-sum-exp.
    """
    lead = q.shape[:-2]
    # it reads the last axis as if it were dense, whatever its stride
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf"))
    mask = mask.expand(*lead[:-1], mask.shape[-3], q.shape[-2], k.shape[-2])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.flatten(0, -4) for x in (q, k, v)), 0.0, False, attn_mask=mask.flatten(0, -4), scale=1.0
    )
    # a row that sees nothing has a log-sum-exp of 0 there
    empty = hidden.all(-1).expand(*lead, q.shape[-2])
    return out.reshape(q.shape), lse.reshape(q.shape[:-1]).masked_fill(empty, float("-inf"))


def band_attention(
    q: torch.Tensor, band: Band, scale: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
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
    together = 1 if batch > 1 or _wants_gradient(q, band.k, band.v) else BAND_CHUNKS
    for first, chunks, low, width in _runs(starts, ends, together):
        last = min(first + chunks * BAND_QUERIES, tokens)
        per_chunk = (last - first) // chunks
        hidden = _hidden(start_RT[:, first:last], end_RT[:, first:last], low, width, chunks)
        queries = q_BGJTD[:, :, :, first:last].unflatten(3, (chunks, per_chunk)).permute(0, 3, 1, 2, 4, 5)
        queries = queries.reshape(batch * chunks, kv_heads, repeat * per_chunk, size)
        keys, values = (_chunked(x, low, width, chunks) for x in (k_BGnD, v_BGnD))
        out, lse = _partial(queries, keys, values, hidden.repeat(1, 1, repeat, 1), softcap)
        out = out.reshape(batch, chunks, kv_heads, repeat, per_chunk, size).permute(0, 1, 4, 2, 3, 5)
        outs.append(out.reshape(batch, last - first, heads, size))
        lse = lse.reshape(batch, chunks, kv_heads, repeat, per_chunk).permute(0, 1, 4, 2, 3)
        logs.append(lse.reshape(batch, last - first, heads))
    return torch.cat(outs, dim=1), torch.cat(logs, dim=1)


def _runs(starts: list[int], ends: list[int], longest: int) -> Iterator[tuple[int, int, int, int]]:
    """Chunks of queries, alike ones together: (first query, chunks, first key of the first chunk, keys a chunk).

    Chunks are alike if each begins BAND_QUERIES keys after the one before and has as many queries and keys.
    """
    run: tuple[int, int, int, int] | None = None
    for first in range(0, len(starts), BAND_QUERIES):
        last = min(first + BAND_QUERIES, len(starts))
        # start and end never decrease, so the chunk's first start and last end bound it
        low, high = min(starts[first], ends[last - 1]), ends[last - 1]
        if run is not None:
            begun, chunks, low_of_run, width = run
            shift = chunks * BAND_QUERIES
            full = last - first == BAND_QUERIES
            if full and chunks < longest and (low, high) == (low_of_run + shift, low_of_run + shift + width):
                run = begun, chunks + 1, low_of_run, width
                continue
            yield run
        run = first, 1, low, high - low
    if run is not None:
        yield run


def _hidden(start: torch.Tensor, end: torch.Tensor, low: int, width: int, chunks: int) -> torch.Tensor:
    """(R * chunks, 1, Q, width): which keys the queries of a run do not see; (1, 1, Q, width) if that is the same for
    each of its chunks, as in a plain window: the mask costs a sixth of the attention."""
    first = low + BAND_QUERIES * torch.arange(chunks, device=start.device)[:, None]
    start, end = (x.reshape(-1, chunks, x.shape[1] // chunks) - first for x in (start, end))
    if chunks > 1 and all(bool((x == x[:, :1]).all()) for x in (start, end)):
        start, end = start[:, :1], end[:, :1]
    index = torch.arange(width, device=start.device)
    return ((index < start[..., None]) | (index >= end[..., None])).flatten(0, 1)[:, None]


def _chunked(x_BGnD: torch.Tensor, low: int, width: int, chunks: int) -> torch.Tensor:
    """(B * chunks, G, width, D): keys of consecutive chunks, which overlap: a view, no copy, if there is one batch row
    or one chunk."""
    if chunks == 1:
        return x_BGnD[:, :, low : low + width]
    cut = x_BGnD[:, :, low : low + width + (chunks - 1) * BAND_QUERIES]
    return cut.unfold(2, width, BAND_QUERIES).permute(0, 2, 1, 4, 3).flatten(0, 1)


def paged_attention(
    q: torch.Tensor, source: Paged, group: torch.Tensor | None, scale: float, softcap: float | None = None
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
    queries = q_BRGJQD.reshape(batch, rows, kv_heads, repeat * per_row, size)

    # a missing block reads block 0 and is masked
    base = torch.arange(batch, device=q.device)[:, None, None] * pool_blocks
    shared = source.k.stride(0) == 0 and source.v.stride(0) == 0 and not source.k.requires_grad
    flat = source.table.clamp(min=0) + (0 if shared else base)
    pool_k, pool_v = (x[:1].flatten(0, 1) if shared else x.flatten(0, 1) for x in (source.k, source.v))
    hidden = (source.table < 0)[..., None].expand(batch, rows, blocks, block)
    if source.mask is not None:
        hidden = hidden | ~source.mask
    hidden = hidden.reshape(batch, rows, 1, 1, blocks * block)

    together = rows if q.is_cuda or _wants_gradient(q, source.k, source.v) else PAGED_ROWS
    outs, logs = [], []
    for first in range(0, rows, together):
        some = slice(first, first + together)
        taken = flat[:, some]
        keys = _turned(pool_k, taken, source, q.dtype)
        values = pool_v.index_select(0, taken.reshape(-1)).to(q.dtype)
        keys, values = (x.reshape(*taken.shape[:2], blocks * block, kv_heads, size) for x in (keys, values))
        out, lse = _partial(queries[:, some], keys.transpose(2, 3), values.transpose(2, 3), hidden[:, some], softcap)
        outs.append(out)
        logs.append(lse)
    out, lse = torch.cat(outs, dim=1), torch.cat(logs, dim=1)
    out = out.reshape(batch, rows, kv_heads, repeat, per_row, size).permute(0, 1, 4, 2, 3, 5)
    lse = lse.reshape(batch, rows, kv_heads, repeat, per_row).permute(0, 1, 4, 2, 3)
    out = out.reshape(batch, rows * per_row, heads, size)[:, place]
    return out, lse.reshape(batch, rows * per_row, heads)[:, place]


def _turned(pool: torch.Tensor, taken: torch.Tensor, source: Paged, dtype: torch.dtype) -> torch.Tensor:
    """Blocks `taken` (B, R, K) of a pool (n, S, G, D), one after another, each turned as its place in its row asks.

    A pool of a coarser dtype widens before it is turned.
    """
    flat, blocks = taken.reshape(-1), taken.shape[2]
    if source.cos is None or source.sin is None:
        return pool.index_select(0, flat).to(dtype)
    place = torch.arange(blocks, device=flat.device).expand(taken.shape).reshape(-1)
    again = None
    if flat.numel() > blocks and not _wants_gradient(pool):
        # neighbouring rows name the same block at the same place: it is turned once
        pair, again = (flat * blocks + place).unique(return_inverse=True)
        flat, place = pair // blocks, pair % blocks
    keys = pool.index_select(0, flat).to(dtype)
    cos, sin = (t.unflatten(0, (blocks, pool.shape[1]))[place][:, :, None].to(dtype) for t in (source.cos, source.sin))
    left, right = keys.chunk(2, dim=-1)
    turned = keys * cos + torch.cat([-right, left], dim=-1) * sin
    return turned if again is None else turned.index_select(0, again)
