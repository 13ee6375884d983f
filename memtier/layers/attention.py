"""Attention of a model that was trained without memory, read over window, sinks and span in one softmax.

The projections are the model's; this begins with its queries, keys and values before rotary embedding. Source of the
span: Nunez et al. 2024. Shape letters: `memtier.blocks`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from memtier.errors import ConfigError
from memtier.layers.finite import check_keys
from memtier.layers.landmarks import search_queries
from memtier.layers.memories import LayerMemory, attention_shares, sink_step, span_step
from memtier.layers.plan import StepPlan
from memtier.layers.positions import Sources, rotate_sources
from memtier.layers.rotary import RotaryTable, turn, turn_of
from memtier.layers.state import AttentionState, extend, roll
from memtier_kernels import Band, span_attention
from memtier_kernels.span_attention.sources import SOURCES

__all__ = ["attend", "reach"]


def reach(settings) -> int:
    """The largest distance between a query and a key, plus one, under a MemorySettings with compact positions."""
    far = settings.sink_tokens + (settings.span_blocks * settings.span_block_tokens if settings.memory_layers else 0)
    if not settings.widened:
        return settings.window_tokens + settings.span_refresh_tokens + far
    return settings.ring_tokens + far


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: StepPlan,
    carried: AttentionState,
    memory: LayerMemory,
    *,
    layer: int,
    rotary: RotaryTable | None,
    scale: float,
    local_tokens: int | None = None,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, AttentionState]:
    """Read a step in one layer.

    Args:
        q: (B, T, H, D); k, v: (B, T, G, D); all before rotary embedding.
        rotary: the model's; None for a layer without positions.
        scale: of the scores.
        local_tokens: the layer's own sliding window: each token sees itself and the `local_tokens - 1` before it at
            most, and nothing farther. None: the layer may see all that is remembered.
        softcap: scores s become ``softcap * tanh(s / softcap)``.
        sink_logits: (H,), scores of a sink of the model's own, which takes attention and gives nothing.

    Returns:
        (B, T, H, D), and the state after the step.

    Raises:
        ConfigError: a layer with a span has a sliding window that is smaller than what memory spreads over.
    """
    settings = plan.settings
    remembers = layer in settings.memory_layers
    if local_tokens is not None and local_tokens >= reach(settings):
        local_tokens = None
    if local_tokens is not None and remembers:
        raise ConfigError(
            f"memory_layers names layer {layer}, whose sliding window of {local_tokens} tokens is smaller than what "
            f"memory spreads over ({reach(settings)}). Leave the layer out, or take a smaller window and span."
        )
    tokens = q.shape[1]
    changes: dict[str, torch.Tensor] = {}
    # a first step that stays inside the window is plain causal attention over itself
    whole = (local_tokens is None or local_tokens >= tokens) and softcap is None and sink_logits is None
    short = settings.widened or tokens <= settings.window_tokens
    plain = plan.start == 0 and isinstance(plan.origin, int) and plan.lo[-1] == 0 and short and whole
    if plain:
        keys, values = k, v
        changes["keys"], changes["values"] = roll(carried.keys, k), roll(carried.values, v)
    else:
        keys, changes["keys"] = extend(carried.keys, k)
        values, changes["values"] = extend(carried.values, v)
    prefix = keys.shape[1] - tokens

    span, span_ids = None, None
    if remembers:
        queries = search_queries(q, k.shape[2], settings.landmark_keys)
        step = span_step(layer, plan, carried, memory, keys, values, queries, None, prefix)
        assert step is not None, "a step with a state always has a span, maybe an empty one"
        span_ids = step.ids
        span = None if step.empty else step.paged(settings)
        changes.update(step.carried(q.dtype))
        if not settings.landmark_keys:
            changes["query_tail"] = roll(carried.query_tail, queries)
    sinks, sink_changes = sink_step(plan, carried, k, v)
    changes.update(sink_changes)

    if plain:
        mass = torch.zeros_like(carried.mass)
        mass[:, SOURCES.index("window")] = 1.0
        if span_ids is not None:
            changes["span_mass"] = mass.new_zeros(span_ids.shape[0], span_ids.shape[2])
        check_keys({layer: k})
        return _causal(q, k, v, rotary, scale), replace(carried, **changes, mass=mass)
    place = torch.arange(tokens, device=q.device)
    start = plan.lo_token
    if local_tokens is not None:
        sinks = None
        start = torch.maximum(start, place + (plan.origin - local_tokens + 1))
    window = Band(
        keys, values, start - plan.origin + prefix, (place + (prefix + 1)).expand(plan.lo_token.shape)
    )  # fmt: skip
    far_sizes = settings.sink_tokens, 0, settings.span_blocks * settings.span_block_tokens if remembers else 0
    sources = Sources(window, None, sinks, None, span, None, span_ids)
    near_q, far_q, sources = rotate_sources(q, sources, plan, rotary, far_sizes, carried=True, fading_tokens=0)
    result = span_attention(
        near_q,
        q_far=far_q,
        group=plan.group,
        window=sources.window,
        sinks=sources.sinks,
        span=sources.span,
        scale=scale,
        softcap=softcap,
    )
    out = result.out
    if sink_logits is not None:
        out = out * torch.sigmoid(result.lse - sink_logits.to(result.lse.dtype))[..., None].to(out.dtype)
    shares = attention_shares(
        far_q, result, sources.span, changes.get("span_ids"), scale, softcap=softcap, sink_logits=sink_logits
    )
    changes.update(shares)
    return out.to(q.dtype), replace(carried, **changes)


def _causal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: RotaryTable | None, scale: float
) -> torch.Tensor:
    """Each token sees itself and those before it; shapes as of `attend`."""
    if rotary is not None:
        by = turn_of(*rotary(torch.arange(q.shape[1], device=q.device), q.dtype))
        q, k = turn(q, by), turn(k, by)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)
