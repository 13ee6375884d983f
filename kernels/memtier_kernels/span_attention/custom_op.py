"""The kernels, and the reference while a model is compiled, as custom operators: torch.compile sees one opaque call.

An operator takes flat arguments, so sources come as a list of their tensors and a `form` that says which is which:
"span:paged+mask+turn window:band".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from memtier_kernels.dispatch import compute_dtype
from memtier_kernels.span_attention import reference
from memtier_kernels.span_attention.sources import Band, Paged

__all__ = ["SOURCES", "span_attention", "span_attention_reference"]

# in the order in which they are read
SOURCES = ("sinks", "span", "eidetic", "fading", "window")

Sources = dict[str, Band | Paged | None]
Result = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


def span_attention(
    q: torch.Tensor, q_far: torch.Tensor, sources: Sources, group: torch.Tensor | None, scale: float
) -> Result:
    """See `memtier_kernels.span_attention`: by the kernels."""
    return _call(_kernels, q, q_far, sources, group, scale)


def span_attention_reference(
    q: torch.Tensor, q_far: torch.Tensor, sources: Sources, group: torch.Tensor | None, scale: float
) -> Result:
    """The same by the reference, which reads numbers on the host, as one call that a compiler need not look into."""
    return _call(_reference, q, q_far, sources, group, scale)


def _call(
    run: Any, q: torch.Tensor, q_far: torch.Tensor, sources: Sources, group: torch.Tensor | None, scale: float
) -> Result:
    tensors, form = _pack(sources)
    out, lse, parts = run(q, None if q_far is q else q_far, group, tensors, form, scale)
    names = [name for name in SOURCES if sources.get(name) is not None]
    return out, lse, dict(zip(names, parts.unbind(0), strict=True)) if names else {}


def _pack(sources: Sources) -> tuple[list[torch.Tensor], str]:
    tensors: list[torch.Tensor] = []
    forms = []
    for name in SOURCES:
        source = sources.get(name)
        if source is None:
            continue
        tensors += [source.k, source.v]
        if isinstance(source, Band):
            tensors += [source.start, source.end]
            forms.append(f"{name}:band")
            continue
        form = f"{name}:paged"
        tensors.append(source.table)
        if source.mask is not None:
            tensors.append(source.mask)
            form += "+mask"
        if source.cos is not None and source.sin is not None:
            tensors += [source.cos, source.sin]
            form += "+turn"
        forms.append(form)
    return tensors, " ".join(forms)


def _unpack(tensors: Sequence[torch.Tensor], form: str) -> dict[str, Band | Paged]:
    sources: dict[str, Band | Paged] = {}
    rest = iter(tensors)
    for item in form.split():
        name, kind = item.split(":")
        k, v, first = next(rest), next(rest), next(rest)
        if kind == "band":
            sources[name] = Band(k, v, first, next(rest))
        else:
            mask = next(rest) if "+mask" in kind else None
            cos, sin = (next(rest), next(rest)) if "+turn" in kind else (None, None)
            sources[name] = Paged(k, v, first, mask, cos, sin)
    return sources


@torch.library.custom_op("memtier::span_attention", mutates_args=())
def _kernels(
    q: torch.Tensor, q_far: torch.Tensor | None, group: torch.Tensor | None, tensors: Sequence[torch.Tensor],
    form: str, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    from memtier_kernels.span_attention import triton

    return triton.forward(q, q_far, group, _unpack(tensors, form), scale)


@torch.library.custom_op("memtier::span_attention_reference", mutates_args=())
def _reference(
    q: torch.Tensor, q_far: torch.Tensor | None, group: torch.Tensor | None, tensors: Sequence[torch.Tensor],
    form: str, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    sources = _unpack(tensors, form)
    out, lse, parts = reference.span_attention(q, q if q_far is None else q_far, {**sources}, group, scale)
    return out.contiguous(), lse.contiguous(), _stacked(parts, lse)


def _stacked(parts: dict[str, torch.Tensor], lse: torch.Tensor) -> torch.Tensor:
    return torch.stack(list(parts.values())) if parts else lse.new_empty(0, *lse.shape)
