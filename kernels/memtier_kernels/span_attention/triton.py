"""The host side of the kernels: sizes, strides, outputs and launches."""

from __future__ import annotations

from functools import cache

import torch
import triton

from memtier_kernels.launch import launch
from memtier_kernels.span_attention.custom_op import SOURCES
from memtier_kernels.span_attention.sources import Band, Paged
from memtier_kernels.span_attention.triton_forward import decode, merge_splits, prefill
from memtier_kernels.span_attention.triton_tiles import LOG2E, Rows, Source

__all__ = ["forward"]

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
            out, lse, parts, *shared, (0, 0, 0, 0, 0), tokens, kv_heads, scale * LOG2E.value,
            *classes(rows, sources), SPLIT=False, **constants,
        )  # fmt: skip
        return out, lse, parts
    splits = split_sources(sources, tokens, batch * kv_heads, _processors(q.device))
    shares = sum(splits)
    partial = torch.empty((batch, kv_heads, shares, rows, size), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(partial.shape[:-1], dtype=torch.float32, device=q.device)
    launch(
        decode, (kv_heads * shares, batch),
        partial, partial_lse, parts, *shared, splits, tokens, kv_heads, scale * LOG2E.value, *classes(rows, sources),
        SPLIT=True, BLOCK_M=max(16, triton.next_power_of_2(rows)), **constants,
    )  # fmt: skip
    counts = [count for name, count in zip(SOURCES, splits, strict=True) if name in sources]
    bounds = tuple(sum(counts[:i]) for i in range(len(counts) + 1))
    launch(
        merge_splits, (rows, batch * kv_heads),
        out, lse, parts, partial, partial_lse, bounds, tokens, kv_heads,
        PARTS=len(counts), D=size, D_PAD=constants["D_PAD"], J=constants["J"],
        SHARES_PAD=triton.next_power_of_2(shares), num_warps=1 if size <= 64 else 2,
    )  # fmt: skip
    return out, lse, parts


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
    rotated = source.cos is not None and source.sin is not None
    return Source(
        k, v, table, None, mask,
        source.cos.contiguous() if rotated else None, source.sin.contiguous() if rotated else None,  # pyright: ignore
        table.shape[2] * k.shape[2], int(by_group and table.shape[1] > 1),
        *k.stride()[:4], *v.stride()[:4], table.stride(0), 0, table.stride(1),
        0 if mask is None else mask.stride(0), 0 if mask is None else mask.stride(1),
    )  # fmt: skip


def layout(sources: dict[str, Band | Paged], size: int) -> dict[str, int]:
    """The kernels' constants that say which sources there are: -1 absent, 0 a band, else tokens a block."""
    found = {name.upper(): -1 for name in SOURCES}
    halves = False
    for name, source in sources.items():
        found[name.upper()] = 0 if isinstance(source, Band) else source.k.shape[2]
        halves = halves or (isinstance(source, Paged) and source.cos is not None and source.sin is not None)
    return {
        **found, "D": size, "D_PAD": max(16, triton.next_power_of_2(size)),
        "H_PAD": max(16, triton.next_power_of_2(size // 2)), "HALVES": halves,
    }  # fmt: skip


def classes(rows: int, sources: dict[str, Band | Paged]) -> tuple[int, int]:
    """What a choice of configuration is kept for: the number of query rows, and of rows in a group (0: all), coarsely."""
    tables = [s.table.shape[1] for s in sources.values() if isinstance(s, Paged) and s.table.shape[1] > 1]
    in_group = 0 if not tables else max(16, min(128, triton.next_power_of_2(triton.cdiv(rows, max(tables)))))
    return min(16, max(6, rows.bit_length())), in_group


@cache
def _processors(device: torch.device) -> int:
    # the number of an H100, where a kernel is interpreted or only compiled
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
