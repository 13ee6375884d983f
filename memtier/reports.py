"""What memtier tells: frozen pydantic reports of a call, of a session's four tiers, and of a runtime.

What is told of checkpoints, of forgetting and of damage: recovery/reports.py.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "AttentionMass",
    "BlockContent",
    "ContextReport",
    "EideticToken",
    "FinishReason",
    "LayerSelection",
    "MemoryReport",
    "ObserveReport",
    "Report",
    "RuntimeStats",
    "SelectedBlock",
    "SessionInfo",
    "SessionStats",
    "StateLayer",
    "StateReport",
    "StorageReport",
    "TurnInfo",
    "WeightsReport",
]


class Report(BaseModel):
    """Frozen; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class ObserveReport(Report):
    """What one `observe` took in.

    `bits_per_byte` is the model's surprise at the text, over its UTF-8 bytes; None where nothing was predicted or the
    bytes are unknown (token ids without a tokenizer). `logits` is (tokens, vocabulary), the outputs after each token,
    only when asked for, and never part of the JSON.
    """

    tokens: int
    position: int
    bits_per_byte: float | None
    bits_per_token: float | None
    seconds: float
    logits: torch.Tensor | None = Field(None, exclude=True, repr=False)


class WeightsReport(Report):
    """The model: permanent structural memory."""

    name: str
    parameters: int
    bytes: int
    dtype: str
    device: str
    fingerprint: str
    adapters: tuple[str, ...] = ()


class StateLayer(Report):
    """The fading memory of one layer; `half_life_tokens` follows from the decay of the last step."""

    layer: int
    kind: str
    shape: tuple[int, ...]
    bytes: int
    norm: float
    half_life_tokens: float | None


class StateReport(Report):
    """Fading memory: constant in size, whatever was read."""

    bytes: int
    layers: tuple[StateLayer, ...]


class EideticToken(Report):
    """An old token that the innovation test keeps verbatim."""

    position: int
    text: str
    innovation: float


class ContextReport(Report):
    """Short-term memory: the window [window_start, window_end) and, a layer, the surprising old tokens."""

    window_start: int
    window_end: int
    window_text: str
    eidetic: dict[int, tuple[EideticToken, ...]]


class SelectedBlock(Report):
    """One retrieved block: its score, its tokens [start, end), and its share of the last token's attention."""

    block_id: int
    score: float
    start: int
    end: int
    attention_mass: float


class LayerSelection(Report):
    """What one memory layer retrieved at its last boundary."""

    layer: int
    boundary: int
    blocks: tuple[SelectedBlock, ...]


class StorageReport(Report):
    """Long-term memory. `pending_blocks` are sealed and not yet on disk; `lag_tokens` not yet searchable.

    Of `blocks`, the oldest `dropped_blocks` are not retrieved any more (`MemoryConfig.retain_tokens` and its like).
    """

    blocks: int
    dropped_blocks: int
    tokens: int
    bytes_on_disk: int
    pending_blocks: int
    lag_tokens: int
    last_selection: tuple[LayerSelection, ...]


AttentionMass = dict[int, dict[str, float]]


class MemoryReport(Report):
    """The four tiers of a session, as they stand."""

    session: str
    position: int
    weights: WeightsReport
    state: StateReport
    context: ContextReport
    storage: StorageReport
    attention_mass: AttentionMass


class SessionStats(Report):
    """Counters of one open session. Bytes are of host memory, but for `device_bytes`, and `segment_bytes` on disk.

    Each limit stands beside what it limits; None where there is none. `waited_seconds` is how long steps have waited
    for the disk: back-pressure, as `inbox_blocks` reached its limit or a snapshot was on its way. `dropped_blocks`, of
    `blocks`, are not retrieved any more. `merges`: how often small segments became one.
    """

    session: str
    position: int
    blocks: int
    dropped_blocks: int
    segments: int
    merges: int
    inbox_blocks: int
    inbox_limit_blocks: int
    waited_seconds: float
    pinned_bytes: int
    hot_bytes: int
    hot_limit_bytes: int | None
    landmark_bytes: int
    landmark_limit_bytes: int | None
    device_bytes: int
    segment_bytes: int
    lag_tokens: int
    blocks_from_hot: int
    blocks_from_disk: int
    snapshots: int
    failure: str | None


class RuntimeStats(Report):
    """Counters of a runtime: its open sessions, the jobs that wait for the model thread, free space on the store's disk
    (below `min_free_bytes` nothing new is taken), its device pool, and
    `decode_batches`: forward passes over sampled tokens by how many sessions shared them.

    `pool_bytes` are on the device whether used or not. `pool_hit_rate` is the share of retrieved blocks that were in
    the pool, None before the first. `pool_refusals` counts how often a layer needed more than there was room for.
    """

    model: str
    device: str
    waiting_steps: int
    open_sessions: int
    max_open_sessions: int
    free_bytes: int
    min_free_bytes: int
    pool_bytes: int
    pool_blocks: int
    pool_hits: int
    pool_misses: int
    pool_refusals: int
    pool_hit_rate: float | None
    decode_batches: dict[int, int]
    sessions: tuple[SessionStats, ...]


class SessionInfo(Report):
    """One session of a store, as its journal tells without a model; `open` in the runtime that was asked."""

    id: str
    tenant: str
    position: int
    turns: int
    blocks: int
    bytes_on_disk: int
    created_at: float | None
    updated_at: float | None
    model: str | None
    open: bool = False


class TurnInfo(Report):
    """One turn of a session: who spoke, when, and its tokens [start, end).

    `text` is the original; where a part of it is not known (token ids, an answer, a call that was cut off) it is
    decoded from the tokens.
    """

    turn: int
    role: str
    start: int
    end: int
    text: str
    source: str | None
    metadata: dict[str, Any]
    created_at: float


class BlockContent(Report):
    """One block of long-term memory, read back.

    `keys` and `values` are one (S, G, D) float32 array a memory layer, `landmarks` one (C,), `innovation` (S,); all are
    read-only numpy arrays and no part of the JSON.
    """

    block_id: int
    start: int
    end: int
    text: str
    role: str
    source: str | None
    metadata: dict[str, Any]
    created_at: float
    on_disk: bool
    keys: tuple[Any, ...] = Field((), exclude=True, repr=False)
    values: tuple[Any, ...] = Field((), exclude=True, repr=False)
    landmarks: tuple[Any, ...] = Field((), exclude=True, repr=False)
    innovation: Any = Field(None, exclude=True, repr=False)


FinishReason = Literal["stop", "length", "closed", "cancelled"]
