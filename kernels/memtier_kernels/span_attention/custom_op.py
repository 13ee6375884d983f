"""The kernels, and the reference while a model is compiled, as custom operators: torch.compile sees one opaque call.

An operator takes flat arguments, so sources come as a list of their tensors and a `form` that says which is which:
"span:paged+mask+turn window:band".
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from memtier_kernels.dispatch import compute_dtype, is_interpreted
from memtier_kernels.span_attention import reference
from memtier_kernels.span_attention.sources import SOURCES, Band, Paged

__all__ = ["span_attention", "span_attention_reference"]

# Heads of float32 larger than this do not fit into the registers of the kernels for gradients: a product that is exact
# to float32 keeps each number in three parts. What does not fit goes by the reference, on the device that it is on.
LARGEST_SINGLE_GRADIENT = 64

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
    return _read(q, q_far, group, tensors, form, scale)


def _read(
    q: torch.Tensor, q_far: torch.Tensor | None, group: torch.Tensor | None, tensors: Sequence[torch.Tensor],
    form: str, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The reference, its parts stacked."""
    sources: Sources = {**_unpack(tensors, form)}
    out, lse, parts = reference.span_attention(q, q if q_far is None else q_far, sources, group, scale)
    stacked = torch.stack(list(parts.values())) if parts else lse.new_empty(0, *lse.shape)
    # with one source, its part is the whole row
    return out.contiguous(), lse.clone(memory_format=torch.contiguous_format), stacked


@_kernels.register_fake
def _(q, q_far, group, tensors, form, scale):  # pyright: ignore[reportUnusedFunction]
    return _like_results(q, form, torch.float32)


@_reference.register_fake
def _(q, q_far, group, tensors, form, scale):  # pyright: ignore[reportUnusedFunction]
    return _like_results(q, form, compute_dtype(q.dtype))


def _like_results(q: torch.Tensor, form: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = q.shape[:3]
    return q.new_empty(q.shape), q.new_empty(rows, dtype=dtype), q.new_empty((len(form.split()), *rows), dtype=dtype)


@torch.library.custom_op("memtier::span_attention_backward", mutates_args=())
def _kernels_backward(
    d_out: torch.Tensor | None, d_lse: torch.Tensor | None, d_parts: torch.Tensor | None, out: torch.Tensor,
    lse: torch.Tensor, parts: torch.Tensor, q: torch.Tensor, q_far: torch.Tensor | None, group: torch.Tensor | None,
    tensors: Sequence[torch.Tensor], form: str, scale: float, wanted: Sequence[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """dq, dq_far if there is one, then k's and v's of each source that is wanted."""
    if q.dtype == torch.float32 and q.shape[-1] > LARGEST_SINGLE_GRADIENT and not is_interpreted():
        return _gradients_of_reference((d_out, d_lse, d_parts), q, q_far, group, tensors, form, scale, wanted)
    from memtier_kernels.span_attention import triton

    sources = _unpack(tensors, form)
    grads = torch.zeros_like(out) if d_out is None else d_out, d_lse, d_parts
    dq, dq_far, others = triton.backward(
        grads, (out, lse, parts), q, q_far, group, sources, scale, dict(zip(sources, wanted, strict=True))
    )
    return [dq, *([] if dq_far is None else [dq_far]), *(x for pair in others.values() for x in pair)]


@torch.library.custom_op("memtier::span_attention_reference_backward", mutates_args=())
def _reference_backward(
    d_out: torch.Tensor | None, d_lse: torch.Tensor | None, d_parts: torch.Tensor | None, out: torch.Tensor,
    lse: torch.Tensor, parts: torch.Tensor, q: torch.Tensor, q_far: torch.Tensor | None, group: torch.Tensor | None,
    tensors: Sequence[torch.Tensor], form: str, scale: float, wanted: Sequence[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """The same, by the reference."""
    return _gradients_of_reference((d_out, d_lse, d_parts), q, q_far, group, tensors, form, scale, wanted)


def _gradients_of_reference(
    grads: tuple[torch.Tensor | None, ...], q: torch.Tensor, q_far: torch.Tensor | None, group: torch.Tensor | None,
    tensors: Sequence[torch.Tensor], form: str, scale: float, wanted: Sequence[bool],
) -> list[torch.Tensor]:  # fmt: skip
    """By reading once more with gradients."""
    far = [] if q_far is None else [q_far]
    places = _keys_and_values(form, wanted)

    def run() -> list[torch.Tensor]:
        # one tensor may serve several sources: a leaf for each
        leaves = [x.detach().requires_grad_() for x in (q, *far, *(tensors[place] for place in places))]
        read = list(tensors)
        for place, leaf in zip(places, leaves[1 + len(far) :], strict=True):
            read[place] = leaf
        results = _read(leaves[0], leaves[1] if far else None, group, read, form, scale)
        flows = zip(results, grads, strict=True)
        flows = [(y, dy) for y, dy in flows if dy is not None and y.requires_grad]
        if not flows:
            return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in leaves]
        found = torch.autograd.grad(
            [y for y, _ in flows], leaves, [dy for _, dy in flows], allow_unused=True, materialize_grads=True
        )
        # a result may share its memory neither with an input nor with another result
        return [x.clone(memory_format=torch.contiguous_format) for x in found]

    # within an operator its thread records no gradients
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(run).result()


@_kernels_backward.register_fake
@_reference_backward.register_fake
def _(d_out, d_lse, d_parts, out, lse, parts, q, q_far, group, tensors, form, scale, wanted):  # pyright: ignore[reportUnusedFunction]
    like = [q, *([] if q_far is None else [q_far]), *(tensors[place] for place in _keys_and_values(form, wanted))]
    return [x.new_empty(x.shape) for x in like]


def _keys_and_values(form: str, wanted: Sequence[bool]) -> list[int]:
    """Where k and v of the wanted sources stand among the tensors."""
    places, place = [], 0
    for item, want in zip(form.split(), wanted, strict=True):
        if want:
            places += [place, place + 1]
        place += 4 if item.endswith(":band") else 3 + item.count("+mask") + 2 * item.count("+turn")
    return places


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, q_far, group, tensors, form, scale = inputs
    ctx.save_for_backward(*output, q, q_far, group, *tensors)
    ctx.form, ctx.scale = form, scale
    # an output that nobody reads costs nothing
    ctx.set_materialize_grads(False)


def _backward(run: Any) -> Any:
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        out, lse, parts, q, q_far, group, *tensors = ctx.saved_tensors
        if all(grad is None for grad in grads):
            return None, None, None, [None] * len(tensors), None, None
        needs = ctx.needs_input_grad[3]
        every = _keys_and_values(ctx.form, [True] * len(ctx.form.split()))
        wanted = [needs[k] or needs[v] for k, v in zip(every[::2], every[1::2], strict=True)]
        found = run(*grads, out, lse, parts, q, q_far, group, tensors, ctx.form, ctx.scale, wanted)
        dq, dq_far, rest = found[0], None, found[1:]
        if q_far is not None:
            dq_far, rest = found[1], found[2:]
        by_tensor: list[torch.Tensor | None] = [None] * len(tensors)
        for place, grad in zip(_keys_and_values(ctx.form, wanted), rest, strict=True):
            by_tensor[place] = grad
        return dq, dq_far, None, by_tensor, None, None

    return backward


_kernels.register_autograd(_backward(_kernels_backward), setup_context=_keep)
_reference.register_autograd(_backward(_reference_backward), setup_context=_keep)
