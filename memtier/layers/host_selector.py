"""The plain span selector: every sealed block in host memory, every landmark scored, no store behind it."""

from __future__ import annotations

import copy

import torch

from memtier.layers.landmarks import choose_blocks, extend_window

__all__ = ["HostSpanSelector"]


class HostSpanSelector:
    """Keeps every sealed block in host memory and scores all of them: the plain case, without a store.

    Args:
        recency_share: see `memtier.layers.landmarks.extend_window`.
    """

    def __init__(self, recency_share: float = 0.0) -> None:
        self._recency_share = recency_share
        # K, V and landmarks of each layer (B, room, ...), of which the first so many blocks are in use
        self._blocks: dict[int, list[torch.Tensor]] = {}
        self._used: dict[int, int] = {}

    def append(
        self, layer: int, first_block: int, keys: torch.Tensor, values: torch.Tensor, landmarks: torch.Tensor
    ) -> None:
        """See `SpanSelector.append`."""
        new = [keys, values, landmarks]
        held, end = self._blocks.get(layer), first_block + keys.shape[1]
        # gradient checkpointing reads a step a second time, and a cropped cache reads other tokens: what is sealed
        # again takes the place of what was
        if held is None or any(t.requires_grad for t in (*new, *held)):
            # autocast, which training may be in, knows no float16 on a CPU
            with torch.autocast("cpu", enabled=False):
                pairs = zip([t[:, :0] for t in new] if held is None else held, new, strict=True)
                self._blocks[layer] = [torch.cat([old[:, :first_block], more], dim=1) for old, more in pairs]
        else:
            foreign = held[0].is_inference() and not torch.is_inference_mode_enabled()
            if end > held[0].shape[1] or foreign:
                room = max(end, 2 * held[0].shape[1])
                held = self._blocks[layer] = [_with_room(t[:, :first_block], room) for t in held]
            for old, more in zip(held, new, strict=True):
                old[:, first_block:end] = more
        self._used[layer] = end

    def select(
        self, layer: int, queries: torch.Tensor, boundaries: torch.Tensor, visible: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SpanSelector.select`."""
        ids, scores = choose_blocks(queries, self._blocks[layer][2][:, : self._used[layer]], visible, k)
        return extend_window(ids, scores, visible, self._recency_share)

    def fetch(self, layer: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SpanSelector.fetch`."""
        keys, values, _ = self._blocks[layer]
        rows = torch.arange(ids.shape[0])[:, None]
        missing = (ids < 0)[..., None, None, None]
        take = ids.clamp(min=0)
        return keys[rows, take].masked_fill(missing, 0), values[rows, take].masked_fill(missing, 0)

    def resident(self, layer: int, ids: torch.Tensor) -> None:
        """See `SpanSelector.resident`: nothing is kept on the device."""

    def detach(self) -> None:
        """No gradient goes back through the blocks kept so far."""
        self._blocks = {layer: [t.detach() for t in tensors] for layer, tensors in self._blocks.items()}

    def rows(self, order: torch.Tensor) -> HostSpanSelector:
        """A copy that holds the rows of the batch named by `order`."""
        other = copy.copy(self)
        other._used = dict(self._used)
        other._blocks = {
            layer: [t[:, : self._used[layer]].index_select(0, order.cpu()) for t in tensors]
            for layer, tensors in self._blocks.items()
        }
        return other


def _with_room(held: torch.Tensor, room: int) -> torch.Tensor:
    wider = held.new_empty(held.shape[0], room, *held.shape[2:])
    wider[:, : held.shape[1]] = held
    return wider
