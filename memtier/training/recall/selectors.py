"""Span selectors for evaluation: they note what was chosen, and choose by the controls.

on       by landmarks, as in use
recent   the newest sealed blocks
random   blocks drawn by a hash of layer, boundary, row and block
oracle   the block that holds the answer, and the best by landmark beside it
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from memtier.layers.host_selector import HostSpanSelector

__all__ = ["NotingSelector", "SpanRule"]

SpanRule = Literal["on", "recent", "random", "oracle"]


class NotingSelector(HostSpanSelector):
    """Keeps the blocks of a batch in host memory.

    Args:
        gold: (B, T) the block that holds the answer asked for at each position, -1 for none.

    `hits` and `asked` count, a layer, the questions whose block was among those chosen.
    """

    def __init__(self, gold: np.ndarray, rule: SpanRule = "on") -> None:
        super().__init__()
        self.rule = rule
        self.hits: dict[int, int] = {}
        self.asked: dict[int, int] = {}
        self._gold = torch.from_numpy(gold)

    def select(
        self, layer: int, queries: torch.Tensor, boundaries: torch.Tensor, visible: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `SpanSelector.select`."""
        ids, scores = super().select(layer, queries, boundaries, visible, k)
        gold = self._gold[:, boundaries]
        # a block that is not sealed yet is still in the window
        gold = gold.masked_fill(gold >= visible, -1)
        if self.rule in ("recent", "random"):
            ids, scores = self._control(layer, boundaries, visible, k)
        elif self.rule == "oracle":
            ids = _with_gold(ids, gold)
        found = (ids == gold[..., None]).any(-1) & (gold >= 0)
        self.hits[layer] = self.hits.get(layer, 0) + int(found.sum())
        self.asked[layer] = self.asked.get(layer, 0) + int((gold >= 0).sum())
        return ids, scores

    def _control(
        self, layer: int, boundaries: torch.Tensor, visible: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, n = self._gold.shape[0], int(visible.max())
        blocks = torch.arange(n)
        if self.rule == "recent":
            order = blocks.expand(batch, len(boundaries), n).double()
        else:
            rng = np.random.default_rng([layer, int(boundaries[0])])
            order = torch.from_numpy(rng.random((batch, len(boundaries), n)))
        order = order.masked_fill(blocks >= visible[:, None], -1.0)
        best = order.topk(min(k, n), dim=-1)
        ids = best.indices.masked_fill(best.values < 0, -1)
        ids = torch.nn.functional.pad(ids, (0, k - ids.shape[-1]), value=-1)
        # ascending, absent ones last
        ids = ids.masked_fill(ids < 0, n).sort(dim=-1).values
        ids = ids.masked_fill(ids == n, -1)
        return ids, torch.zeros(ids.shape).masked_fill(ids < 0, float("-inf"))


def _with_gold(ids: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    """The ids (B, R, K) with the wanted block (B, R) in place of the last, where it is missing."""
    missing = (gold >= 0) & ~(ids == gold[..., None]).any(-1)
    last = torch.where(missing, gold, ids[..., -1])
    ids = torch.cat([ids[..., :-1], last[..., None]], dim=-1)
    high = torch.iinfo(ids.dtype).max
    ids = ids.masked_fill(ids < 0, high).sort(dim=-1).values
    return ids.masked_fill(ids == high, -1)
