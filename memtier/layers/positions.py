"""Rotary positions of every memory, rebased a step so that they stay small and exact however long the stream.

Near keys (window, fading) keep their distance to the query. Far keys follow `far_positions`:

    compact   packed as [sinks | eidetic | span] just before the fading band: no position exceeds what training saw
    none      neither far keys nor their queries are rotated: a far token is found by content alone
    true      their own distance: for short runs only, since the angles grow with the stream
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from memtier.blocks import MemorySettings
from memtier.layers.plan import StepPlan
from memtier.layers.rotary import RotaryTable, apply_rotary
from memtier_kernels import Band, Paged

__all__ = ["Sources", "rotate_sources"]


@dataclass(frozen=True)
class Sources:
    """The memories of one layer in one step, before rotation.

    `eidetic_positions` (B, n) are those of the eidetic candidates, `span_ids` (B, R, K) the blocks of the table's rows.
    """

    window: Band
    fading: Band | None
    sinks: Paged | None
    eidetic: Paged | None
    span: Paged | Band | None
    eidetic_positions: torch.Tensor | None = None
    span_ids: torch.Tensor | None = None


def rotate_sources(
    q: torch.Tensor,
    sources: Sources,
    plan: StepPlan,
    rotary: RotaryTable | None,
    far_sizes: tuple[int, int, int],
    carried: bool,
    *,
    fading_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Sources]:
    """Queries for the near sources, queries for the far ones, and the sources, rotated to fit.

    Args:
        q: (B, T, H, D).
        rotary: cosines and sines of positions; None: nothing is rotated.
        far_sizes: tokens reserved for sinks, eidetic and span in the compact layout; the same in every step.
        carried: True if the bands begin with the rings of a carried state.
        fading_tokens: places left for the fading band in the compact layout; None: the window's size.
    """
    if rotary is None:
        return q, q, sources
    settings: MemorySettings = plan.settings
    device = q.device
    # position of token plan.start + t is base + t: the oldest entry of the longest ring has position 0
    base = settings.window_tokens + settings.ring_tokens if carried else 0

    def turn(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return apply_rotary(x, *rotary(positions, q.dtype))

    def turn_band(band: Band) -> Band:
        first = base + q.shape[1] - band.k.shape[1]
        return replace(band, k=turn(band.k, torch.arange(band.k.shape[1], device=device) + first))

    now = torch.arange(q.shape[1], device=device) + base
    fading = None if sources.fading is None else turn_band(sources.fading)
    near, sources = turn(q, now), replace(sources, window=turn_band(sources.window), fading=fading)
    if settings.far_positions == "none":
        return near, q, sources
    sinks, eidetic, span = sources.sinks, sources.eidetic, sources.span
    if settings.far_positions == "true" or isinstance(span, Band):
        shift = base - plan.origin
        shift = shift if isinstance(shift, int) else shift[..., None]
        if isinstance(span, Band):
            span = turn_band(span)
        elif span is not None and sources.span_ids is not None:
            span = _turn_span(span, sources.span_ids, shift, turn, q.dtype)
        if eidetic is not None and sources.eidetic_positions is not None:
            eidetic = replace(eidetic, k=turn(eidetic.k, sources.eidetic_positions[..., None] + shift))
        if sinks is not None:
            sinks = replace(sinks, k=turn(sinks.k, torch.arange(sinks.k.shape[1], device=device)[:, None] + shift))
        return near, near, replace(sources, sinks=sinks, eidetic=eidetic, span=span)

    def by_place(source: Paged | None, first: int) -> Paged | None:
        if source is None:
            return None
        place = torch.arange(source.table.shape[2] * source.k.shape[2], device=device) + first
        cos, sin = rotary(place, q.dtype)
        return replace(source, cos=cos, sin=sin)

    between = settings.window_tokens if fading_tokens is None else fading_tokens
    far = turn(q, now - base + plan.origin - plan.lo_token + between + sum(far_sizes))
    sinks, eidetic = by_place(sinks, 0), by_place(eidetic, far_sizes[0])
    return near, far, replace(sources, sinks=sinks, eidetic=eidetic, span=by_place(span, sum(far_sizes[:2])))


def _turn_span(span: Paged, ids: torch.Tensor, shift: int | torch.Tensor, turn, dtype: torch.dtype) -> Paged:
    """The span with one pool entry a table entry, each rotated to the distance of its own tokens."""
    batch, rows, blocks = span.table.shape
    block = span.k.shape[2]
    take = span.table.clamp(min=0).flatten(1)
    line = torch.arange(batch, device=ids.device)[:, None]
    positions = ids.clamp(min=0).flatten(1)[..., None] * block + torch.arange(block, device=ids.device) + shift
    table = torch.arange(rows * blocks, device=ids.device).reshape(rows, blocks).expand(batch, -1, -1)
    return replace(
        span, k=turn(span.k[line, take].to(dtype), positions), v=span.v[line, take].to(dtype),
        table=table.masked_fill(ids < 0, -1),
    )  # fmt: skip
