"""The far memories of an attention layer: eidetic slots, and the expansion span retrieved from sealed blocks.

Both are chosen at boundaries, from what has left the window before the boundary, so what a token sees is a function
of tokens up to itself. Shape letters: `memtier.blocks`; R is the number of groups in the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from memtier.layers.landmarks import (
    best_of_queries,
    block_landmarks,
    boundary_queries,
    choose_blocks,
    extend_window,
    queries_a_boundary,
)
from memtier.layers.plan import StepPlan
from memtier.layers.rotary import apply_rotary
from memtier.layers.rules import EideticRule
from memtier.layers.state import AttentionState
from memtier_kernels import Band, Paged, SpanAttentionOutput, keep_surprising
from memtier_kernels.span_attention.sources import SOURCES

__all__ = [
    "EideticStep",
    "LayerMemory",
    "SpanStep",
    "attention_shares",
    "block_mass",
    "eidetic_step",
    "hide_retrieved",
    "sink_step",
    "span_step",
]

# the number of a block that no session has: beyond all that are read
NO_BLOCK = 1 << 40
STORAGE_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


class LayerMemory(Protocol):
    """What a layer asks of the cache for its sealed blocks: `SpanSelector` plus the innovation that labels a block."""

    def seal(
        self, layer: int, first_block: int, keys: torch.Tensor, values: torch.Tensor, marks: torch.Tensor,
        innovation: torch.Tensor | None,
    ) -> None: ...  # fmt: skip

    def select(
        self, layer: int, queries: torch.Tensor, boundaries: torch.Tensor, visible: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def fetch(self, layer: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def resident(self, layer: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None: ...


@dataclass(frozen=True)
class EideticStep:
    """`table` (B, R, M) into the candidates (B, n, ...), -1 for none."""

    keys: torch.Tensor
    values: torch.Tensor
    innovation: torch.Tensor
    positions: torch.Tensor
    table: torch.Tensor

    def carried(self) -> dict[str, torch.Tensor]:
        """The slots that the next step starts from, as fields of AttentionState."""
        slots = self.table[:, -1]
        empty = slots < 0
        rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
        take = slots.clamp(min=0)
        return {
            "eidetic_keys": self.keys[rows, take].masked_fill(empty[..., None, None], 0.0),
            "eidetic_values": self.values[rows, take].masked_fill(empty[..., None, None], 0.0),
            "eidetic_innovation": self.innovation[rows, take].masked_fill(empty, 0.0),
            "eidetic_positions": self.positions[rows, take].masked_fill(empty, -1),
        }


def eidetic_step(
    plan: StepPlan, state: AttentionState | None, keys: torch.Tensor, values: torch.Tensor, innovation: torch.Tensor,
    prefix: int, rule: EideticRule,
) -> EideticStep | None:  # fmt: skip
    """Choose each group's eidetic tokens among the carried slots and the tokens that leave the window in this step.

    Args:
        keys, values: (B, prefix + T, G, D), ring and new tokens; innovation: (B, prefix + T).
        rule: scores the candidates; the highest stay.

    Returns:
        None if there is no candidate at all.
    """
    slots, block = plan.settings.eidetic_tokens, plan.settings.span_block_tokens
    first, last = plan.sealed_from * block, plan.sealed_to * block
    leaving = slice(first - plan.start + prefix, last - plan.start + prefix)
    positions = torch.arange(first, last, device=keys.device)
    positions = positions.masked_fill(positions < plan.settings.sink_tokens, -1).expand(keys.shape[0], -1)
    if state is None:
        if first == last:
            return None
        k, v, e, p = keys[:, leaving], values[:, leaving], innovation[:, leaving], positions
    else:
        k = torch.cat([state.eidetic_keys, keys[:, leaving]], dim=1)
        v = torch.cat([state.eidetic_values, values[:, leaving]], dim=1)
        e = torch.cat([state.eidetic_innovation, innovation[:, leaving]], dim=1)
        p = torch.cat([state.eidetic_positions, positions], dim=1)
    if first == last:
        table = torch.arange(slots, device=keys.device).expand(p.shape).masked_fill(p < 0, -1)
        table = table[:, None].expand(-1, len(plan.boundaries), -1)
    else:
        scores = rule(e, p)
        allowed = p.masked_fill(scores == float("-inf"), -1)
        table = keep_surprising(scores.masked_fill(allowed < 0, 0.0), allowed, plan.lo_row, slots)
    return EideticStep(k, v, e, p, table)


def hide_retrieved(eidetic: EideticStep, span_ids: torch.Tensor, block: int) -> torch.Tensor:
    """The eidetic table without tokens that the group's span holds too: no token counts twice.

    Args:
        span_ids: (B, R, K) block numbers, -1 for none.
    """
    rows = torch.arange(eidetic.table.shape[0], device=eidetic.table.device)[:, None, None]
    blocks = eidetic.positions[rows, eidetic.table.clamp(min=0)] // block
    twice = (blocks[..., None] == span_ids[:, :, None, :]).any(-1)
    return eidetic.table.masked_fill(twice, -1)


def sink_step(
    plan: StepPlan, state: AttentionState | None, k: torch.Tensor, v: torch.Tensor
) -> tuple[Paged | None, dict[str, torch.Tensor]]:
    """The first tokens of the session, seen by every group whose window no longer holds them.

    Args:
        k, v: (B, T, G, D), of the step's own tokens.

    Returns:
        the source, and the fields of AttentionState that change.
    """
    count = plan.settings.sink_tokens
    if not count:
        return None, {}
    if state is None:
        keys, values, changes = k[:, :count], v[:, :count], {}
    else:
        keys, values = state.sink_keys, state.sink_values
        fresh = min(count - plan.start, k.shape[1])
        if fresh > 0:
            keys, values = keys.clone(), values.clone()
            keys[:, plan.start : plan.start + fresh] = k[:, :fresh]
            values[:, plan.start : plan.start + fresh] = v[:, :fresh]
        changes = {"sink_keys": keys, "sink_values": values}
    place = torch.arange(keys.shape[1], device=k.device)
    table = torch.where(place < plan.lo_row[..., None], place, -1)
    return Paged(keys.unsqueeze(2), values.unsqueeze(2), table.expand(k.shape[0], -1, -1)), changes


@dataclass(frozen=True)
class SpanStep:
    """The blocks that serve each group: pools (B, n, S, G, D), `table` (B, R, K) into them, `ids` (B, R, K) their
    numbers.

    The pools are of the model's dtype or of the storage's; `empty` is True where the table is known to name no block;
    `fresh` is False where all is as the last step left it.
    """

    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor
    ids: torch.Tensor
    scores: torch.Tensor
    empty: bool
    fresh: bool = True

    def carried(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The last group's span, as those fields of AttentionState that change."""
        if not self.fresh:
            return {}
        rows = torch.arange(self.table.shape[0], device=self.table.device)[:, None]
        last = self.table[:, -1]
        missing = (last < 0)[..., None, None, None]

        def taken(pool: torch.Tensor) -> torch.Tensor:
            if self.empty:
                return pool.new_zeros(*last.shape, *pool.shape[2:], dtype=dtype)
            return pool[rows, last.clamp(min=0)].to(dtype).masked_fill(missing, 0.0)

        return {
            "span_keys": taken(self.keys),
            "span_values": taken(self.values),
            "span_ids": self.ids[:, -1].clone(),
            "span_scores": self.scores[:, -1].clone(),
        }

    def paged(self, settings) -> Paged:
        """As a source of attention; sinks inside a retrieved block are masked, since they are always seen."""
        mask = None
        if settings.sink_tokens:
            block = settings.span_block_tokens
            position = self.ids[..., None] * block + torch.arange(block, device=self.ids.device)
            mask = position >= settings.sink_tokens
        return Paged(self.keys, self.values, self.table, mask)


def span_step(
    layer: int, plan: StepPlan, state: AttentionState | None, memory: LayerMemory | None, keys: torch.Tensor,
    values: torch.Tensor, queries: torch.Tensor, innovation: torch.Tensor | None, prefix: int, *,
    of_batch: bool = False,
) -> SpanStep | None:  # fmt: skip
    """Seal the blocks that left the window, choose a span for every new boundary, and fetch it.

    Without a `memory` (a plain forward pass over a whole sequence) the blocks of the sequence itself are the store. K
    and V of a sealed block are rounded to the storage dtype in both cases, so the two give the same numbers.

    Args:
        of_batch: without a memory, choose among the blocks of every sequence of the batch, sealed by then.
    """
    settings = plan.settings
    block, k = settings.span_block_tokens, settings.span_blocks
    storage = STORAGE_DTYPES[settings.storage_dtype]
    sealed = slice(plan.sealed_from * block - plan.start + prefix, plan.sealed_to * block - plan.start + prefix)
    count = plan.sealed_to - plan.sealed_from
    new_keys = keys[:, sealed].unflatten(1, (count, block)).to(storage)
    new_values = values[:, sealed].unflatten(1, (count, block)).to(storage)
    labels = None if innovation is None else innovation[:, sealed].unflatten(1, (count, block)).float()
    fresh = plan.visible[plan.new]
    wanted = k > 0 and any(fresh)
    each = queries_a_boundary(settings)
    picks = boundary_queries(plan, queries, None if state is None else state.query_tail) if wanted else None
    if memory is None or state is None:
        if picks is None:
            return None
        marks = block_landmarks(new_keys.float(), labels, settings.landmark_keys, settings.landmark_kind)
        visible = plan.visible_row[plan.new].repeat_interleave(each)
        pool_keys, pool_values, rows = new_keys.to(keys.dtype), new_values.to(values.dtype), 1
        if of_batch:
            pool_keys, pool_values, marks = _of_batch(pool_keys), _of_batch(pool_values), _of_batch(marks)
            rows = len(keys)
        chosen = choose_blocks(picks.float(), marks, visible * rows, k)
        chosen = extend_window(*chosen, visible, settings.recency_share, rows=rows)
        table, scores = best_of_queries(*chosen, each, k)
        # a block of another sequence has no number in this one
        ids = torch.where(table < 0, table, (table // rows).masked_fill(table % rows != rows - 1, NO_BLOCK))
        return SpanStep(pool_keys, pool_values, table, ids, scores, empty=False)

    if count:
        owned = new_keys.to("cpu", copy=True), new_values.to("cpu", copy=True)
        labels = None if labels is None else labels.cpu()
        wide = owned[0].to(torch.float32)
        marks = block_landmarks(wide, labels, settings.landmark_keys, settings.landmark_kind)
        memory.seal(layer, plan.sealed_from, *owned, marks, labels)
    held = _held(state) if plan.carried else None
    if not fresh:
        assert held is not None, "a step without a boundary goes on with the last one's span"
        return held
    if picks is None:
        rows = (keys.shape[0], len(fresh), k)
        ids, scores = torch.full(rows, -1), torch.full(rows, float("-inf"))
    else:
        at, visible = torch.tensor([plan.boundaries[plan.new], fresh]).repeat_interleave(each, dim=1)
        ids, scores = best_of_queries(*memory.select(layer, picks.float().cpu(), at, visible, k), each, k)
    scores = scores.to(keys.device, torch.float32)
    if bool((ids >= 0).any()):
        return _resident(layer, memory, held, ids, scores) or _fetched(layer, memory, held, ids, scores, keys)
    none = ids.to(keys.device)
    return _after(held, SpanStep(state.span_keys, state.span_values, none, none, scores, empty=True))


def _of_batch(blocks: torch.Tensor) -> torch.Tensor:
    """(B, n, ...) -> (B, n * B, ...): block by block, those of the other sequences and then the own one.

    So what may be chosen at a boundary was sealed before it, in every sequence.
    """
    row = torch.arange(blocks.shape[0], device=blocks.device)
    return blocks[(row[:, None] + row + 1) % len(row)].transpose(1, 2).flatten(1, 2)


def _held(state: AttentionState) -> SpanStep:
    """The span that a step begins with."""
    ids = state.span_ids
    # on a GPU to look would cost a wait
    empty = ids.shape[1] == 0 or (not ids.is_cuda and not bool((ids >= 0).any()))
    table = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape).masked_fill(ids < 0, -1)
    return SpanStep(
        state.span_keys, state.span_values, table[:, None], ids[:, None], state.span_scores[:, None], empty, fresh=False
    )


def _resident(
    layer: int, memory: LayerMemory, held: SpanStep | None, ids: torch.Tensor, scores: torch.Tensor
) -> SpanStep | None:
    """The span of all groups where it lies in a pool on the device; None where there is no pool, or no room in it."""
    every = ids if held is None else _join([held.ids.cpu(), ids], -1)
    found = memory.resident(layer, every)
    if found is None:
        return None
    keys, values, table = found
    scores = scores if held is None else _join([held.scores, scores], float("-inf"))
    return SpanStep(keys, values, table, every.to(keys.device), scores, empty=False)


def _fetched(
    layer: int, memory: LayerMemory, held: SpanStep | None, ids: torch.Tensor, scores: torch.Tensor,
    like: torch.Tensor,
) -> SpanStep:  # fmt: skip
    """The span of all groups, the new blocks copied to the device for this step."""
    # where too few were found, one of these stands in: any other block may have been dropped
    unique, place = ids.where(ids >= 0, ids.max()).unique(return_inverse=True)
    keys, values = (t.to(like.device, like.dtype) for t in memory.fetch(layer, unique.expand(ids.shape[0], -1)))
    if held is not None:
        place = place + held.keys.shape[1]
        keys, values = torch.cat([held.keys, keys], dim=1), torch.cat([held.values, values], dim=1)
    table = place.masked_fill(ids < 0, -1).to(like.device)
    return _after(held, SpanStep(keys, values, table, ids.to(like.device), scores, empty=False))


def _after(held: SpanStep | None, chosen: SpanStep) -> SpanStep:
    """The groups of `held`, then those of `chosen`, whose pool begins with that of `held`."""
    if held is None:
        return chosen
    return SpanStep(
        chosen.keys, chosen.values, _join([held.table, chosen.table], -1), _join([held.ids, chosen.ids], -1),
        _join([held.scores, chosen.scores], float("-inf")), held.empty and chosen.empty,
    )  # fmt: skip


def attention_shares(
    far_q: torch.Tensor,
    result: SpanAttentionOutput,
    span: Paged | Band | None,
    span_ids: torch.Tensor | None,
    scale: float | None = None,
    *,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Where the attention of a step went, as those fields of AttentionState that report it.

    Args:
        far_q: (B, T, H, D), as the queries met the span.
        span_ids: (B, K), the last group's new ones; None if they did not change.
        scale: of the scores; None for D ** -0.5.
        softcap: see `span_attention`.
        sink_logits: (H,), of a sink that holds no value; what it takes is missing from the sum of the shares.
    """
    lse = result.lse if sink_logits is None else torch.logaddexp(result.lse, sink_logits.to(result.lse.dtype))
    none = torch.full_like(result.lse, float("-inf"))
    parts = torch.stack([result.parts.get(source, none) for source in SOURCES], dim=-1)
    shares = {"mass": (parts - lse[..., None]).exp().mean((1, 2))}
    if isinstance(span, Paged):
        shares["span_mass"] = block_mass(far_q[:, -1], lse[:, -1], span, scale, softcap)
    elif span_ids is not None:
        shares["span_mass"] = result.lse.new_zeros(span_ids.shape)
    return shares


def block_mass(
    q: torch.Tensor, lse: torch.Tensor, span: Paged, scale: float | None = None, softcap: float | None = None
) -> torch.Tensor:
    """The share of one token's softmax that went to each block of the last table row, mean over heads.

    Args:
        q: (B, H, D), as it met the span; lse: (B, H), log-sum-exp of its whole row.
        scale: of the scores; None for D ** -0.5.
        softcap: see `span_attention`.

    Returns:
        (B, K), 0 where there is no block.
    """
    batch = q.shape[0]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    block, kv_heads = span.k.shape[2:4]
    table = span.table[:, -1]
    keys = span.k[torch.arange(batch, device=q.device)[:, None], table.clamp(min=0)].to(q.dtype).flatten(1, 2)
    if span.cos is not None and span.sin is not None:
        keys = apply_rotary(keys, span.cos, span.sin)
    hidden = (table < 0)[..., None].expand(-1, -1, block)
    if span.mask is not None:
        hidden = hidden | ~span.mask[:, -1]
    scores = torch.einsum("bgjd,bngd->bgjn", q.unflatten(1, (kv_heads, -1)) * factor, keys).flatten(1, 2)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    share = (scores.to(lse.dtype) - lse[..., None]).exp().masked_fill(hidden.flatten(1)[:, None], 0.0)
    return share.mean(1).unflatten(-1, (table.shape[1], block)).sum(-1)


def _join(rows: list[torch.Tensor], fill: float) -> torch.Tensor:
    """Concatenate (B, R_i, K_i) along R; K may have changed between steps, so rows are padded to the widest."""
    width = max(row.shape[-1] for row in rows)
    return torch.cat([torch.nn.functional.pad(r, (0, width - r.shape[-1]), value=fill) for r in rows], dim=1)
