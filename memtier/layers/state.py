"""What an attention layer carries between steps. Omit a field, and splitting or restoring is silently wrong.

Every tensor has a fixed size, so device memory does not grow with the stream. Rings are kept in order: the newest
token is the last entry; entries before the session's first token are zeros that no mask lets through. Shape letters:
`memtier.blocks`; R is the ring W + S + r, and the fading ring is W + R.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["AttentionState", "empty_attention_state", "extend", "roll"]


@dataclass(frozen=True)
class AttentionState:
    """The carried tensors of one attention layer; keys are before rotary embedding."""

    keys: torch.Tensor  # (B, R, G, D)
    values: torch.Tensor  # (B, R, G, D)
    innovation: torch.Tensor  # (B, R) float32: of the tokens in the ring
    fading_keys: torch.Tensor  # (B, W + R, G, D); zero tokens without fading memory
    fading_values: torch.Tensor  # (B, W + R, G, D)
    last_fading: torch.Tensor  # (B, E): f of the newest token; (B, width, E) where the predictor is a convolution
    key_tail: torch.Tensor  # (B, width - 1, C): inputs of the k convolution
    value_tail: torch.Tensor  # (B, width - 1, C)
    query_tail: torch.Tensor  # (B, r - 1, C) float32: queries summed per KV head, before rotary
    eidetic_keys: torch.Tensor  # (B, M, G, D)
    eidetic_values: torch.Tensor  # (B, M, G, D)
    eidetic_innovation: torch.Tensor  # (B, M) float32
    eidetic_positions: torch.Tensor  # (B, M) int64, ascending, -1 for an empty slot
    sink_keys: torch.Tensor  # (B, sinks, G, D)
    sink_values: torch.Tensor  # (B, sinks, G, D)
    span_keys: torch.Tensor  # (B, K, S, G, D): what serves the current group
    span_values: torch.Tensor  # (B, K, S, G, D)
    span_ids: torch.Tensor  # (B, K) int64, -1 for none
    span_scores: torch.Tensor  # (B, K) float32
    span_mass: torch.Tensor  # (B, K): share of the newest token's softmax that went to each block
    mass: torch.Tensor  # (B, 5): shares of sinks, span, eidetic, fading, window in the last step


def roll(ring: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The ring after `new` (B, T, ...) came in: the same size, and memory of its own."""
    size, tokens = ring.shape[1], new.shape[1]
    if tokens >= size:
        return new[:, tokens - size :].to(ring.dtype).clone()
    return torch.cat([ring[:, tokens:], new.to(ring.dtype)], dim=1)


def extend(ring: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the tokens of a step may look at, ending with them, and the ring afterwards.

    For one token both are the same tensor: what it sees or seals is never as old as the entry that it pushes out.
    """
    rolled = roll(ring, new)
    return (rolled if new.shape[1] == 1 else torch.cat([ring, new.to(ring.dtype)], dim=1)), rolled


def empty_attention_state(
    batch: int, *, settings, kv_heads: int, head_dim: int, hidden_size: int, conv_size: int, predictor_tokens: int,
    fading: bool, memory: bool, device: torch.device, dtype: torch.dtype,
) -> AttentionState:  # fmt: skip
    """The state before the first token. `settings` is a MemorySettings; a prediction sees `predictor_tokens` of f."""
    full = torch.float64 if dtype == torch.float64 else torch.float32
    ring, eidetic = settings.ring_tokens, settings.eidetic_tokens if fading else 0
    fading_ring = settings.window_tokens + ring if fading else 0
    blocks = settings.span_blocks if memory else 0
    # a query of one token needs none of those before it
    stride = settings.span_refresh_tokens if memory and not settings.landmark_keys else 1
    tail = max(conv_size - 1, 0)
    last = () if predictor_tokens == 1 else (predictor_tokens,)
    channels = kv_heads * head_dim

    def zeros(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(batch, *shape, dtype=kind, device=device)

    def kv(*shape: int) -> torch.Tensor:
        return zeros(*shape, kv_heads, head_dim)

    return AttentionState(
        keys=kv(ring), values=kv(ring), innovation=zeros(ring, kind=full),
        fading_keys=kv(fading_ring), fading_values=kv(fading_ring), last_fading=zeros(*last, hidden_size),
        key_tail=zeros(tail, channels), value_tail=zeros(tail, channels), query_tail=zeros(stride - 1, channels,
        kind=full), eidetic_keys=kv(eidetic), eidetic_values=kv(eidetic), eidetic_innovation=zeros(eidetic, kind=full),
        eidetic_positions=zeros(eidetic, kind=torch.int64) - 1,
        sink_keys=kv(settings.sink_tokens), sink_values=kv(settings.sink_tokens),
        span_keys=kv(blocks, settings.span_block_tokens), span_values=kv(blocks, settings.span_block_tokens),
        span_ids=zeros(blocks, kind=torch.int64) - 1, span_scores=zeros(blocks, kind=torch.float32) - float("inf"),
        span_mass=zeros(blocks, kind=full),
        mass=zeros(5, kind=full),
    )  # fmt: skip
