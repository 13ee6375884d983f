"""The kernels of span_attention give what the reference gives, outputs and every gradient."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtier.errors import KernelError
from memtier_kernels import Band, Paged, merge, span_attention
from memtier_kernels.testing import compare, leaves, make_inputs, tensors

pytest.importorskip("triton")

NAMES = ("window", "fading", "span", "eidetic", "sinks")


def draw(device: Any = "cpu", *, keep: tuple[str, ...] = NAMES, **sizes: Any) -> dict[str, Any]:
    """Small arguments; of the sources only those in `keep`."""
    small = {"B": 1, "H": 2, "G": 1, "W": 6, "S": 3, "K": 2, "blocks": 4, "M": 2, "sinks": 1, **sizes}
    arguments = make_inputs("span_attention", seed=7, device=device, **small)
    return {name: value for name, value in arguments.items() if name not in NAMES or name in keep}


def check(arguments: dict[str, Any]) -> None:
    errors = compare("span_attention", arguments)
    assert max(errors.values()) < 1e-5, errors


def turned(source: Paged) -> Paged:
    """The same with any numbers for cosines and sines."""
    shape = source.table.shape[2] * source.k.shape[2], source.k.shape[-1]
    generator = torch.Generator().manual_seed(3)
    cos, sin = (torch.randn(shape, generator=generator).to(source.k) for _ in range(2))
    return replace(source, cos=cos, sin=sin)


@pytest.mark.parametrize("tokens", [1, 63, 65], ids=lambda t: f"T{t}")
def test_all_five_sources_at_odd_lengths(tokens, device):
    check(draw(device, T=tokens, r=16))


@pytest.mark.parametrize(("size", "heads", "kv_heads"), [(48, 4, 4), (96, 8, 2), (128, 4, 1), (16, 6, 2)])
def test_head_sizes_and_grouped_heads(size, heads, kv_heads, device):
    check(draw(device, keep=("window", "span"), T=9, D=size, H=heads, G=kv_heads))


@pytest.mark.parametrize("block", [1, 3, 16, 64], ids=lambda s: f"S{s}")
@pytest.mark.parametrize("refresh", [1, 4, 16], ids=lambda r: f"r{r}")
def test_blocks_and_groups_of_any_size(block, refresh, device):
    check(draw(device, keep=("span",), T=17, S=block, r=refresh))


def test_ragged_groups_some_of_no_token(device):
    arguments = draw(device, keep=("span", "window"), T=23, r=4)
    group = torch.tensor([0] * 1 + [1] * 9 + [3] * 11 + [5] * 2, device=device)
    check({**arguments, "group": group})
    check({**{k: v for k, v in arguments.items() if k != "group"}})


def test_a_block_listed_twice_and_masked_once_counts_once(device):
    arguments = draw(device, keep=("span",), T=17)
    span = arguments["span"]
    table = span.table.clone()
    table[:, :, 1] = table[:, :, 0].clamp(min=0)
    table[:, :, 0] = table[:, :, 1]
    mask = torch.ones_like(span.mask)
    mask[:, :, 1] = False
    twice = {**arguments, "span": replace(span, table=table, mask=mask)}
    check(twice)
    once = {**arguments, "span": replace(span, table=table[:, :, :1], mask=None)}
    a, b = (span_attention(**x, impl="triton") for x in (twice, once))
    torch.testing.assert_close(a.out, b.out)


@pytest.mark.parametrize("tokens", [2, 33])
def test_rows_of_a_batch_stand_at_their_own_places_and_share_a_pool(tokens, device):
    arguments = draw(device, keep=("window", "span"), B=3, T=tokens)
    shift = torch.tensor([[0], [2], [5]], device=device)
    window, span = arguments["window"], arguments["span"]
    window = replace(window, start=(window.start - shift).clamp(min=0), end=window.end - shift)
    pool = [x.detach()[:1].clone().requires_grad_() for x in (span.k, span.v)]
    shared = [x.expand(3, -1, -1, -1, -1) for x in pool]
    with_pool = {**arguments, "window": window, "span": replace(span, k=shared[0], v=shared[1])}
    copied = replace(span, k=shared[0].detach().clone().requires_grad_(), v=shared[1].detach().clone().requires_grad_())
    check({**arguments, "window": window, "span": copied})
    grads = torch.autograd.grad(span_attention(**with_pool, impl="triton").out.sum(), pool)
    wanted = torch.autograd.grad(
        span_attention(**{**with_pool, "span": copied}, impl="triton").out.sum(), [copied.k, copied.v]
    )
    for got, each in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, each.sum(0, keepdim=True))


@pytest.mark.parametrize("tokens", [1, 33])
@pytest.mark.parametrize("far", [True, False], ids=["q-far", "one-q"])
def test_keys_rotated_by_their_place(tokens, far, device):
    arguments = draw(device, keep=("span", "eidetic", "window"), T=tokens, r=11, D=12)
    if far:
        # one source rotated, another not
        check({**arguments, "span": turned(arguments["span"])})
    else:
        del arguments["q_far"]
        check({**arguments, "span": turned(arguments["span"]), "eidetic": turned(arguments["eidetic"])})


@pytest.mark.parametrize("tokens", [3, 150])
def test_sinks_that_one_row_serves_to_all(tokens, device):
    check(draw(device, keep=("sinks",), T=tokens, H=4, sinks=3))


def test_a_band_as_span_reads_the_far_queries(device):
    arguments = draw(device, keep=("window",), T=70)
    window = arguments["window"]
    k, v = (x.detach().clone().requires_grad_() for x in (window.k, window.v))
    check({**arguments, "span": Band(k, v, torch.zeros_like(window.start), window.start)})


def test_keys_of_any_strides(device):
    arguments = draw(device, keep=("window", "span"), B=2, T=18, G=2, H=4)
    window, span = arguments["window"], arguments["span"]

    def moved(x: torch.Tensor) -> torch.Tensor:
        return x.detach().transpose(1, -2).contiguous().transpose(1, -2).requires_grad_()

    arguments["window"] = replace(window, k=moved(window.k), v=window.v.detach().flip(1).requires_grad_())
    arguments["span"] = replace(span, k=moved(span.k), v=moved(span.v))
    check({**arguments, "q": moved(arguments["q"])})


@pytest.mark.parametrize("tokens", [1, 2, 3, 30])
def test_a_window_that_ends_beyond_its_keys_or_begins_after_its_end(tokens, device):
    arguments = draw(device, keep=("window", "fading"), T=tokens)
    window, fading = arguments["window"], arguments["fading"]
    now = torch.arange(tokens, device=device)
    arguments["window"] = replace(window, start=now, end=now + 11)
    arguments["fading"] = replace(fading, start=now + 2, end=now + 1)
    results = span_attention(**arguments, impl="triton")
    assert bool((results.parts["fading"] == float("-inf")).all())
    check({k: v for k, v in arguments.items() if k != "fading"})


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_row_that_sees_nothing_is_zero_and_has_no_gradient(tokens, device):
    arguments = draw(device, keep=("window", "span"), T=tokens)
    window, span = arguments["window"], arguments["span"]
    arguments["window"] = replace(window, end=window.start)
    arguments["span"] = replace(span, table=torch.full_like(span.table, -1))
    done = span_attention(**arguments, impl="triton")
    assert int(done.out.abs().sum().detach()) == 0
    assert bool((done.lse == float("-inf")).all())
    for grad in torch.autograd.grad(done.out.sum(), leaves(arguments), allow_unused=True):
        assert grad is None or bool((grad == 0).all())
    alone = span_attention(arguments["q"], impl="triton")
    assert int(alone.out.abs().sum().detach()) == 0
    assert alone.parts == {}


def test_gradients_of_the_parts_alone(device):
    arguments = draw(device, T=12)
    flows = {}
    for impl in ("triton", "reference"):
        parts = span_attention(**arguments, impl=impl).parts
        loss = torch.where(parts["span"].isfinite(), parts["span"], 0.0).sum() + parts["window"].square().sum()
        flows[impl] = torch.autograd.grad(loss, leaves(arguments), allow_unused=True, materialize_grads=True)
    for a, b in zip(flows["triton"], flows["reference"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_decoding_gives_what_prefill_gives(tokens, device):
    """The last tokens of a long call, read alone."""
    arguments = draw(device, B=2, T=40, r=1, W=30)
    whole = span_attention(**arguments, impl="triton")
    last = slice(40 - tokens, 40)
    step: dict[str, Any] = {name: arguments[name][:, last] for name in ("q", "q_far")}
    for name in ("window", "fading"):
        band = arguments[name]
        step[name] = replace(band, start=band.start[last], end=band.end[last])
    few = span_attention(
        **step, group=arguments["group"][last], impl="triton",
        **{name: arguments[name] for name in ("span", "eidetic", "sinks")},
    )  # fmt: skip
    torch.testing.assert_close(few.out, whole.out[:, last])
    torch.testing.assert_close(few.lse, whole.lse[:, last])
    for name in NAMES:
        torch.testing.assert_close(few.parts[name], whole.parts[name][:, last])


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("absent", NAMES)
def test_an_absent_source_equals_an_empty_one(absent, tokens, device):
    arguments = draw(device, T=tokens)
    source = arguments[absent]
    if isinstance(source, Band):
        empty: Any = replace(source, end=source.start)
    else:
        empty = replace(source, table=torch.full_like(source.table, -1))
    without = span_attention(**{k: v for k, v in arguments.items() if k != absent}, impl="triton")
    emptied = span_attention(**{**arguments, absent: empty}, impl="triton")
    torch.testing.assert_close(emptied.out, without.out)
    torch.testing.assert_close(emptied.lse, without.lse)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    order=st.permutations(range(4)),
    hidden=st.lists(st.booleans(), min_size=4, max_size=4),
    shift=st.floats(-30, 30),
)
def test_the_order_of_sources_does_not_matter_for_merge(order, hidden, shift):
    generator = torch.Generator().manual_seed(int(shift * 10) + 300)
    parts = []
    for gone in hidden:
        o, log = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 5), (3,)))
        parts.append((o, log.fill_(float("-inf")) if gone else log * shift))
    a, b = merge(parts), merge([parts[i] for i in order])
    torch.testing.assert_close(a[0], b[0])
    torch.testing.assert_close(a[1], b[1])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 24), block=st.integers(1, 5), refresh=st.integers(1, 7), repeat=st.sampled_from([1, 3]),
    keep=st.sets(st.sampled_from(NAMES)), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes_and_any_sources(tokens, block, refresh, repeat, keep, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = draw(device, keep=tuple(keep), T=tokens, S=block, r=refresh, H=repeat)
    with torch.no_grad():
        got = span_attention(**arguments, impl="triton")
        wanted = span_attention(**arguments, impl="reference")
    for a, b in zip(tensors(got), tensors(wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("tokens", [1, 7])
def test_a_compiled_call_has_no_break_and_the_same_gradients(impl, tokens, device):
    arguments = draw(device, T=tokens)
    # one tensor in two places: its gradients add up
    window = arguments["window"]
    arguments["span"] = Band(window.k, window.v, torch.zeros_like(window.start), window.start)

    def loss(given: dict[str, Any]) -> torch.Tensor:
        done = span_attention(**given, impl=impl)
        return done.out.square().sum() + done.lse.sum() + done.parts["window"].sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = []
    for run in (loss, compiled):
        value = run(arguments)
        found.append([value, *torch.autograd.grad(value, leaves(arguments)[:-2], allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_what_the_kernel_cannot_take_is_said():
    q = torch.zeros(1, 1, 1, 264)
    with pytest.raises(KernelError, match="256"):
        span_attention(q, impl="triton")
    with pytest.raises(KernelError, match="positive scale"):
        span_attention(q[..., :8], scale=-1.0, impl="triton")
