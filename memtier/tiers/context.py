"""The context tier: the window and the eidetic tokens, as positions; texts come from the journal."""

from __future__ import annotations

from dataclasses import dataclass

from memtier.cache import TieredCache
from memtier.reports import LayerSelection, SelectedBlock

__all__ = ["ContextView", "context_view", "last_selection"]


@dataclass(frozen=True, slots=True)
class ContextView:
    """Positions that the newest token sees: window [start, end), and (position, innovation) pairs a layer."""

    window_start: int
    window_end: int
    eidetic: dict[int, list[tuple[int, float]]]


def context_view(cache: TieredCache) -> ContextView:
    """What the context tier holds. Runs on the model thread."""
    start, end = cache.window()
    kinds = cache.config.layer_types or []
    eidetic = {}
    for layer in (i for i, kind in enumerate(kinds) if kind == "bmojo" and cache.settings.eidetic_tokens):
        positions, innovation = cache.eidetic(layer)
        eidetic[layer] = list(zip(positions.tolist(), innovation.tolist(), strict=True))
    return ContextView(start, end, eidetic)


def last_selection(cache: TieredCache) -> tuple[LayerSelection, ...]:
    """What each memory layer retrieved at its last boundary. Runs on the model thread."""
    return tuple(
        LayerSelection(
            layer=chosen.layer,
            boundary=chosen.boundary,
            blocks=tuple(
                SelectedBlock(block_id=block, score=score, start=span[0], end=span[1], attention_mass=mass)
                for block, score, span, mass in zip(
                    chosen.block_ids, chosen.scores, chosen.token_spans, chosen.attention_mass, strict=True
                )
            ),
        )
        for chosen in cache.last_selection()
    )
