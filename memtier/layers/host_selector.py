"""The plain span selector: every sealed block in host memory, every landmark scored, no store behind it."""

from __future__ import annotations

import torch

from memtier.layers.landmarks import choose_blocks

__all__ = ["HostSpanSelector"]


class HostSpanSelector:
    """Keeps every sealed block in host memory and scores all of them: the plain case, without a store."""

    def __init__(self) -> None:
        self._blocks: dict[int, list[torch.Tensor]] = {}

    def append(
        self, layer: int, first_block: int, keys: torch.Tensor, values: torch.Tensor, landmarks: torch.Tensor
    ) -> None:
        """See `SpanSelector.append`."""
        new = [keys, values, landmarks]
        held = self._blocks.get(layer)
        # gradient checkpointing reads a step a second time: what is sealed again takes the place of what was
        if held is not None:
            # autocast, which training may be in, knows no float16 on a CPU
            with torch.autocast("cpu", enabled=False):
                new = [torch.cat([old[:, :first_block], more], dim=1) for old, more in zip(held, new, strict=True)]
        self._blocks[layer] = new

    def select(
        self, layer: int, queries: torch.Tensor, boundaries: torch.Tensor, visible: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SpanSelector.select`."""
        return choose_blocks(queries, self._blocks[layer][2], visible, k)

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

    def reorder(self, order: torch.Tensor) -> None:
        """Keep the rows of the batch named by `order`."""
        self._blocks = {
            layer: [t.index_select(0, order.cpu()) for t in tensors] for layer, tensors in self._blocks.items()
        }
