"""Attention over several memories in one softmax: sinks, span, eidetic, fading and window."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from memtier_kernels.dispatch import Impl, choose, is_interpreted
from memtier_kernels.span_attention import custom_op, reference
from memtier_kernels.span_attention.sources import Band, Paged, merge

__all__ = ["Band", "Paged", "SpanAttentionOutput", "merge", "span_attention"]


@dataclass(frozen=True)
class SpanAttentionOutput:
    """What was read.

    `out` is (B, T, H, D); `lse` (B, T, H) the log-sum-exp of the whole row, -inf where a row sees nothing; `parts` the
    same for each source alone, so that ``exp(parts[s] - lse)`` is the attention mass of source s.
    """

    out: torch.Tensor
    lse: torch.Tensor
    parts: dict[str, torch.Tensor]


def span_attention(
    q: torch.Tensor,
    *,
    window: Band | None = None,
    fading: Band | None = None,
    sinks: Paged | Band | None = None,
    eidetic: Paged | Band | None = None,
    span: Paged | Band | None = None,
    q_far: torch.Tensor | None = None,
    group: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    impl: Impl = "auto",
) -> SpanAttentionOutput:
    """One softmax over the union of the sources; equals attention over their concatenation.

    Args:
        q: (B, T, H, D) queries for `window` and `fading`, rotated as their keys are.
        window, fading: keys in a row, each query seeing one interval of them.
        sinks, eidetic, span: keys by table, one table row a group of queries (or a `Band`).
        q_far: (B, T, H, D) queries for sinks, eidetic and span; None for q.
        group: (T,) int64, ascending: the table row of each query; None if there is one row.
        scale: of the scores; None for D ** -0.5.
        softcap: scores s become ``softcap * tanh(s / softcap)``; None leaves them.

    A row that sees no key at all has out = 0 and lse = -inf. An absent source (None) equals an empty one.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    limit = None
    if q.shape[-1] > 256:
        limit = f"its kernel takes heads of up to 256 channels, and got {q.shape[-1]}"
    elif q.shape[-1] > 128 and q.dtype == torch.float32 and not is_interpreted():
        limit = f"its kernel takes float32 heads of up to 128 channels, and got {q.shape[-1]}"
    elif factor <= 0:
        limit = f"its kernel takes a positive scale, and got {factor}"
    elif softcap is not None:
        limit = "its kernel takes no soft cap of scores"
    plain = reference.span_attention if not torch.compiler.is_compiling() else custom_op.span_attention_reference
    if softcap is not None:
        plain = partial(reference.span_attention, softcap=softcap)
    run = choose("span_attention", impl, q, reference=plain, triton=custom_op.span_attention, limit=limit)
    sources = {"sinks": sinks, "span": span, "eidetic": eidetic, "fading": fading, "window": window}
    out, lse, parts = run(q, q if q_far is None else q_far, sources, group, factor)
    return SpanAttentionOutput(out, lse, parts)
