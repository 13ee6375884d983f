"""The frozen records that cross layers, and the legend of shape letters.

    B batch     T tokens      E model width   H query heads   G key/value heads
    D head size N state size  W window        S block tokens  K blocks in a span
    M eidetic slots           r refresh stride   L memory layers   C = G * D

Positions are absolute: token 0 is the first token of a session. A *block* b holds the tokens
[b * S, (b + 1) * S). A *boundary* is a position at which the span is chosen anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

__all__ = [
    "FarAttention",
    "FarPositions",
    "MemoryBlock",
    "MemoryHit",
    "MemorySettings",
    "RetrievalMode",
    "SpanSelection",
    "SpanSelector",
]

RetrievalMode = Literal["on", "off", "random", "recent"]
FarPositions = Literal["compact", "none", "true"]
FarAttention = Literal["span", "dense", "batch"]
"""What far attention reads: the chosen blocks; every sealed token (training, whole sequences); or blocks chosen among
those of every sequence of the batch, which stand in for the store of a long session (likewise)."""


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """The sizes that shape what a model sees; all but `span_blocks` are part of a store's fingerprint."""

    window_tokens: int
    sink_tokens: int
    eidetic_tokens: int
    span_block_tokens: int
    span_refresh_tokens: int
    span_blocks: int
    memory_layers: tuple[int, ...]
    far_positions: FarPositions
    storage_dtype: Literal["float16", "bfloat16", "float32", "float64"]
    landmark_keys: int = 0
    landmark_kind: Literal["mean", "bounds"] = "mean"
    query_kind: Literal["mean", "max"] = "mean"
    recency_share: float = 0.0

    @property
    def widened(self) -> bool:
        """True if the window is widened to whole blocks, so that no past token is invisible."""
        return self.eidetic_tokens > 0 or bool(self.memory_layers)

    @property
    def ring_tokens(self) -> int:
        """Tokens of K/V that a layer must keep behind the position: W + S + r."""
        return self.window_tokens + self.span_block_tokens + self.span_refresh_tokens


@dataclass(frozen=True, slots=True)
class MemoryBlock:
    """S consecutive tokens that have left the window, as every memory layer saw them.

    Args:
        index: block number b; the block holds the tokens [start, end) = [b * S, (b + 1) * S).
        keys: one (S, G, D) a memory layer, storage dtype, CPU, before rotary embedding.
        values: one (S, G, D) a memory layer, storage dtype, CPU.
        landmarks: one (C,) or (m, G, D) a memory layer, float32, CPU.
        innovation: (S,) float32, CPU: mean over the layers that measure it; NaN where none does.
    """

    index: int
    start: int
    end: int
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    landmarks: tuple[torch.Tensor, ...]
    innovation: torch.Tensor


@dataclass(frozen=True, slots=True)
class SpanSelection:
    """What one memory layer retrieved at its last boundary.

    `scores` are float32 inner products; `attention_mass` is the share of the last token's softmax that went to each
    block, mean over heads.
    """

    layer: int
    boundary: int
    block_ids: tuple[int, ...]
    scores: tuple[float, ...]
    token_spans: tuple[tuple[int, int], ...]
    attention_mass: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class MemoryHit:
    """One passage that `recall` found, with its provenance; `start` and `end` are token positions.

    `edition` is the session's at that time: it changes when positions move, and older hits are then refused.
    """

    text: str
    start: int
    end: int
    score: float
    block_id: int
    tier: Literal["context", "storage"]
    created_at: float
    role: str
    source: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    edition: str = ""


class SpanSelector(Protocol):
    """What a memory layer asks while it reads: the seam between the model and the storage tier.

    One selector serves one cache. It is called on the model thread only and never waits for an index.
    """

    def append(
        self, layer: int, first_block: int, keys: torch.Tensor, values: torch.Tensor, landmarks: torch.Tensor
    ) -> None:
        """Take blocks sealed in this step; they are candidates at once.

        Args:
            layer: index of the memory layer in the model.
            first_block: number of the first block; the others follow in order.
            keys: (B, n, S, G, D) in the storage dtype, before rotary embedding; owned by the callee.
            values: (B, n, S, G, D) in the storage dtype; owned by the callee.
            landmarks: (B, n, C), or (B, n, m, G, D) where a block has m landmarks; float32.
        """
        ...

    def select(
        self, layer: int, queries: torch.Tensor, boundaries: torch.Tensor, visible: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose blocks for several boundaries.

        Args:
            queries: (B, R, C), or (B, R, H, D) where a block has several landmarks; float32, one a boundary.
            boundaries: (R,) int64 on the CPU: absolute positions.
            visible: (R,) int64 on the CPU: blocks [0, visible) are candidates.
            k: blocks a boundary.

        Returns:
            ids (B, R, k) int64 on the CPU, ascending, -1 where there is none (at the end); and their float32 scores
            (-inf where there is none).
        """
        ...

    def fetch(self, layer: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of blocks.

        Args:
            ids: (B, n) int64 on the CPU, -1 for none.

        Returns:
            keys and values, each (B, n, S, G, D) in the storage dtype on the CPU; zeros where there is no block.
        """
        ...

    def resident(self, layer: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Blocks where attention can read them on the device, without a copy of their own.

        Args:
            ids: (B, R, k) int64 on the CPU, -1 for none.

        Returns:
            keys and values of a pool, each (B, n, S, G, D) in the storage dtype, good for this step; and the place of
            each block in it, (B, R, k) int64, -1 for none; all on the device. None if they must be fetched.
        """
        ...
