"""The host side of the kernels: sizes, strides, outputs and launches."""

from __future__ import annotations

from functools import cache

import torch
import triton

from memtier_kernels.launch import launch
from memtier_kernels.span_attention.sources import SOURCES, Band, Paged
from memtier_kernels.span_attention.triton_forward import decode, merge_splits, prefill
from memtier_kernels.span_attention.triton_keys import CELL, band_gradients, block_tile, paged_gradients
from memtier_kernels.span_attention.triton_queries import query_gradients, row_shifts
from memtier_kernels.span_attention.triton_tiles import LOG2E, Rows, Source, weight

__all__ = ["backward", "forward"]

# few enough query rows of one key/value head for one tile, few enough tokens that one program a head leaves a GPU idle
DECODE_ROWS, DECODE_TOKENS = 64, 16
# keys of one share: as many programs as fill the GPU several times, but not so many that partial results weigh
SHARE_KEYS = (128, 1024)


def forward(
    q: torch.Tensor, q_far: torch.Tensor | None, group: torch.Tensor | None, sources: dict[str, Band | Paged],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """out (B, T, H, D), lse (B, T, H) and parts (P, B, T, H), in the order of `sources`."""
    batch, tokens, heads, size = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    parts = torch.empty((len(sources), *q.shape[:3]), dtype=torch.float32, device=q.device)
    if not q.numel():
        return out, lse, parts
    if not sources:
        return out.zero_(), lse.fill_(float("-inf")), parts
    kv_heads = next(iter(sources.values())).k.shape[-2]
    shared = arguments(q, q_far, group, sources, kv_heads)
    constants = {**layout(sources, size), "J": heads // kv_heads}
    rows = tokens * heads // kv_heads
    if rows > DECODE_ROWS or tokens > DECODE_TOKENS:
        launch(
            prefill, lambda chosen: (triton.cdiv(rows, chosen["BLOCK_M"]), batch * kv_heads),
            out, lse, parts, *shared, 0, 0, 0, 0, 0, tokens, kv_heads, scale * LOG2E.value,
            *classes(rows, sources), SPLIT=False, **constants,
        )  # fmt: skip
        return out, lse, parts
    splits = split_sources(sources, tokens, batch * kv_heads, _processors(q.device))
    shares = sum(splits)
    partial = torch.empty((batch, kv_heads, shares, rows, size), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(partial.shape[:-1], dtype=torch.float32, device=q.device)
    launch(
        decode, (kv_heads * shares, batch),
        partial, partial_lse, parts, *shared, *splits, tokens, kv_heads, scale * LOG2E.value, *classes(rows, sources),
        SPLIT=True, BLOCK_M=max(16, triton.next_power_of_2(rows)), **constants,
    )  # fmt: skip
    counts = [count for name, count in zip(SOURCES, splits, strict=True) if name in sources]
    launch(
        merge_splits, (rows, batch * kv_heads),
        out, lse, parts, partial, partial_lse, *counts, *[0] * (5 - len(counts)), tokens, kv_heads,
        PARTS=len(counts), D=size, D_PAD=constants["D_PAD"], J=constants["J"],
        SHARES_PAD=triton.next_power_of_2(shares), num_warps=1 if size <= 64 else 2,
    )  # fmt: skip
    return out, lse, parts


def backward(
    grads: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    q: torch.Tensor, q_far: torch.Tensor | None, group: torch.Tensor | None, sources: dict[str, Band | Paged],
    scale: float, wanted: dict[str, bool],
) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, tuple[torch.Tensor, torch.Tensor]]]:  # fmt: skip
    """Gradients of q, of q_far, and of k and v of the sources that are `wanted`."""
    d_out, d_lse, d_parts = grads
    out, lse, parts = outputs
    batch, tokens, heads, size = q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dq_far = None if q_far is None else torch.empty_like(dq)
    if not sources or not q.numel():
        nothing = {n: (torch.zeros_like(s.k), torch.zeros_like(s.v)) for n, s in sources.items() if wanted[n]}
        return dq.zero_(), None if dq_far is None else dq_far.zero_(), nothing
    if all(name in ("fading", "window") for name in sources) and dq_far is not None:
        dq_far.zero_()
    kv_heads = next(iter(sources.values())).k.shape[-2]
    repeat = heads // kv_heads
    rows = tokens * repeat
    given = rows_of(d_out)
    planes = 1 if d_parts is None else len(sources)
    delta = torch.empty((planes, *lse.shape), dtype=torch.float32, device=q.device)
    launch(
        row_shifts, (triton.cdiv(lse.numel(), 16),),
        delta, out, given, lse, None if d_lse is None else d_lse.contiguous(), parts,
        None if d_parts is None else d_parts.contiguous(), tokens, heads, lse.numel(),
        PLANES=planes, D=size, D_PAD=max(16, triton.next_power_of_2(size)), BLOCK=16,
    )  # fmt: skip
    shared = arguments(q, q_far, group, sources, kv_heads)
    constants = {**layout(sources, size), "J": repeat}
    plane = 0 if d_parts is None else lse.numel()
    launch(
        query_gradients, lambda chosen: (triton.cdiv(rows, chosen["BLOCK_M"]), batch * kv_heads),
        dq, dq_far, given, lse, delta, *shared, plane, tokens, kv_heads, scale * LOG2E.value, *classes(rows, sources),
        JOINT=q_far is None, **constants,
    )  # fmt: skip
    done = {}
    for i, (name, source) in enumerate(sources.items()):
        if wanted[name]:
            queries = shared[0] if name in ("fading", "window") else shared[1]
            assert isinstance(queries, Rows)
            described = shared[3 + SOURCES.index(name)]
            assert isinstance(described, Source)
            shift = delta[i if planes > 1 else 0]
            if isinstance(source, Band):
                done[name] = band_backward(source, described, queries, given, lse, shift, scale)
            else:
                done[name] = paged_backward(source, described, queries, given, lse, shift, group, scale)
    return dq, dq_far, done


def band_backward(
    band: Band, source: Source, queries: Rows, d_out: Rows, lse: torch.Tensor, delta: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of k and v of a band."""
    batch, tokens, heads = lse.shape
    keys, kv_heads, size = band.k.shape[1:]
    dk = torch.empty((batch, keys, kv_heads, size), dtype=band.k.dtype, device=lse.device)
    dv = torch.empty(dk.shape, dtype=band.v.dtype, device=lse.device)
    if not keys:
        return dk, dv
    cells = torch.arange(0, keys, CELL, device=lse.device)
    first = torch.searchsorted(source.second, cells.expand(len(source.second), -1).contiguous(), right=True)
    stop = torch.searchsorted(source.first, (cells + (CELL - 1)).expand(len(source.first), -1).contiguous(), right=True)
    launch(
        band_gradients, lambda chosen: (triton.cdiv(keys, chosen["BLOCK_N"]), batch * kv_heads),
        dk, dv, source, queries, d_out, lse, delta, first, stop, 0 if len(first) == 1 else len(cells),
        0 if len(stop) == 1 else len(cells), tokens, kv_heads, scale * LOG2E.value, min(16, keys.bit_length()),
        D=size, D_PAD=max(16, triton.next_power_of_2(size)), J=heads // kv_heads, CELL=CELL,
    )  # fmt: skip
    return dk, dv


def paged_backward(
    paged: Paged, source: Source, queries: Rows, d_out: Rows, lse: torch.Tensor, delta: torch.Tensor,
    group: torch.Tensor | None, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of k and v of a pool, through the table turned round."""
    batch, tokens, heads = lse.shape
    blocks, block, kv_heads, size = paged.k.shape[1:]
    table_rows, per_row = paged.table.shape[1:]
    repeat = heads // kv_heads
    if not blocks * block * per_row:
        return torch.zeros_like(paged.k), torch.zeros_like(paged.v)
    found, order = paged.table.flatten(1).sort(dim=1, stable=True)
    numbers = torch.arange(blocks + 1, device=lse.device)
    bounds = torch.searchsorted(found, numbers.expand(batch, -1).contiguous())
    if source.by_group:
        assert group is not None
        group_bounds = torch.searchsorted(group.contiguous(), torch.arange(table_rows + 1, device=lse.device))
    else:
        # the first row serves every token, others none
        group_bounds = torch.full((table_rows + 1,), tokens, device=lse.device)
        group_bounds[0] = 0
    halved = _halved(size, source.cos is not None)
    single = queries.at.element_size() == 4
    tile = block_tile(block, weight({**halved, "q": queries}), bool(halved["HALVES"]), single)
    tiles = blocks * triton.cdiv(block, tile)
    # few blocks that many queries see (sinks) are shared among programs, each with sums of its own
    parts = min(8 * _processors(lse.device) // (tiles * batch * kv_heads) + 1, triton.cdiv(tokens * repeat, 256))
    shape = (batch, blocks, block, kv_heads, size)
    kinds = (paged.k.dtype, paged.v.dtype) if parts == 1 else (torch.float32, torch.float32)
    dk, dv = (torch.empty((parts, *shape), dtype=kind, device=lse.device) for kind in kinds)
    launch(
        paged_gradients, (tiles, batch * kv_heads, parts),
        dk, dv, source, queries, d_out, lse, delta, order // per_row, order % per_row, bounds, group_bounds,
        blocks, table_rows * per_row, tokens, kv_heads, scale * LOG2E.value, *classes(tokens * repeat, {"": paged}),
        S=block, BLOCK_N=tile, J=repeat, **halved,
    )  # fmt: skip
    if parts == 1:
        return dk[0], dv[0]
    return dk.sum(0).to(paged.k.dtype), dv.sum(0).to(paged.v.dtype)


def split_sources(sources: dict[str, Band | Paged], tokens: int, pairs: int, processors: int) -> tuple[int, ...]:
    """How many shares each source is read in, in the order of SOURCES; known from sizes alone."""
    keys = {}
    for name, source in sources.items():
        if isinstance(source, Band):
            keys[name] = source.k.shape[1]
        else:
            keys[name] = min(source.table.shape[1], tokens) * source.table.shape[2] * source.k.shape[2]
    wanted = sum(keys.values()) * pairs // (8 * processors)
    one = max(SHARE_KEYS[0], min(wanted, SHARE_KEYS[1]))
    # a row of partial results is joined by one program
    one = max(one, sum(keys.values()) // 512)
    return tuple(max(1, triton.cdiv(keys[name], one)) if name in sources else 0 for name in SOURCES)


def arguments(
    q: torch.Tensor, q_far: torch.Tensor | None, group: torch.Tensor | None, sources: dict[str, Band | Paged],
    kv_heads: int,
) -> tuple[object, ...]:  # fmt: skip
    """What every walk over the sources is given: queries, groups and the five sources."""
    far = q if q_far is None else q_far
    by_group = group is not None
    return (
        rows_of(q), rows_of(far), None if group is None else group.contiguous(),
        *(describe(sources.get(name), q.shape[1], by_group) for name in SOURCES),
    )  # fmt: skip


def rows_of(x: torch.Tensor) -> Rows:
    """A (B, T, H, D) tensor with a dense last axis."""
    x = dense(x)
    return Rows(x, *x.stride()[:3])


def dense(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last axis is dense."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def describe(source: Band | Paged | None, tokens: int, by_group: bool) -> Source | None:
    """A source as the kernels take it."""
    if source is None:
        return None
    k, v = dense(source.k), dense(source.v)
    if isinstance(source, Band):
        start, end = source.start.reshape(-1, tokens).contiguous(), source.end.reshape(-1, tokens).contiguous()
        return Source(
            k, v, start, end, None, None, None, k.shape[1], 0,
            k.stride(0), 0, k.stride(1), k.stride(2), v.stride(0), 0, v.stride(1), v.stride(2),
            0 if len(start) == 1 else tokens, 0 if len(end) == 1 else tokens, 0, 0, 0,
        )  # fmt: skip
    table, mask = dense(source.table), source.mask
    if mask is not None:
        mask = mask.flatten(2)
    cos = sin = None
    if source.cos is not None and source.sin is not None:
        cos, sin = source.cos.contiguous(), source.sin.contiguous()
    k_strides, v_strides = k.stride(), v.stride()
    return Source(
        k, v, table, None, mask, cos, sin, table.shape[2] * k.shape[2], int(by_group and table.shape[1] > 1),
        k_strides[0], k_strides[1], k_strides[2], k_strides[3],
        v_strides[0], v_strides[1], v_strides[2], v_strides[3], table.stride(0), 0, table.stride(1),
        0 if mask is None else mask.stride(0), 0 if mask is None else mask.stride(1),
    )  # fmt: skip


def layout(sources: dict[str, Band | Paged], size: int) -> dict[str, int]:
    """The kernels' constants that say which sources there are: -1 absent, 0 a band, else tokens a block."""
    found = {name.upper(): -1 for name in SOURCES}
    halves = False
    for name, source in sources.items():
        found[name.upper()] = 0 if isinstance(source, Band) else source.k.shape[2]
        halves = halves or (isinstance(source, Paged) and source.cos is not None and source.sin is not None)
    return {**found, **_halved(size, halves)}


def _halved(size: int, halves: bool) -> dict[str, int]:
    padded = max(16, triton.next_power_of_2(size)), max(16, triton.next_power_of_2(size // 2))
    return {"D": size, "D_PAD": padded[0], "H_PAD": padded[1], "HALVES": halves}


def classes(rows: int, sources: dict[str, Band | Paged]) -> tuple[int, int]:
    """What a choice of configuration is kept for: roughly, the query rows, and those in a group (0: all)."""
    tables = [s.table.shape[1] for s in sources.values() if isinstance(s, Paged) and s.table.shape[1] > 1]
    in_group = 0 if not tables else max(16, min(128, triton.next_power_of_2(triton.cdiv(rows, max(tables)))))
    return min(16, max(6, rows.bit_length())), in_group


@cache
def _processors(device: torch.device) -> int:
    # the number of an H100, where a kernel is interpreted or only compiled
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
