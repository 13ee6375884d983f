"""span_attention equals one softmax over the union of its sources, outputs and all gradients."""

from dataclasses import replace

import pytest
import torch

from memtier_kernels import Band, Paged, merge, span_attention

B, H, D = 2, 4, 6


def make_sources(tokens, kv_heads, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    def integers(low, high, shape):
        return torch.randint(low, high, shape, generator=generator)

    group = (torch.arange(tokens) + 2) // 5
    rows = int(group.max()) + 1
    prefix = 7
    now = torch.arange(tokens) + prefix
    window = Band(normal(B, prefix + tokens, kv_heads, D), normal(B, prefix + tokens, kv_heads, D), now - 4, now + 1)
    fading = Band(normal(B, prefix + tokens, kv_heads, D), normal(B, prefix + tokens, kv_heads, D), now - 7, now - 4)
    # repeated entries, missing entries, masked tokens
    span = Paged(
        normal(B, 5, 3, kv_heads, D), normal(B, 5, 3, kv_heads, D), integers(-1, 5, (B, rows, 4)),
        mask=integers(0, 4, (B, rows, 4, 3)) > 0,
    )  # fmt: skip
    eidetic = Paged(normal(B, 6, 1, kv_heads, D), normal(B, 6, 1, kv_heads, D), integers(-1, 6, (B, rows, 3)))
    sinks = Paged(normal(B, 2, 1, kv_heads, D), normal(B, 2, 1, kv_heads, D), integers(-1, 2, (B, 1, 2)))
    named = {"window": window, "fading": fading, "span": span, "eidetic": eidetic, "sinks": sinks}
    return normal(B, tokens, H, D), normal(B, tokens, H, D), group, named


def keys_of_token(source, b, t, row):
    """The keys and values one query sees, in the plainest way."""
    if isinstance(source, Band):
        return source.k[b, int(source.start[t]) : int(source.end[t])], source.v[
            b, int(source.start[t]) : int(source.end[t])
        ]
    row = 0 if source.table.shape[1] == 1 else row
    ks, vs = [], []
    for place, block in enumerate(source.table[b, row].tolist()):
        for s in range(source.k.shape[2]):
            if block >= 0 and (source.mask is None or source.mask[b, row, place, s]):
                ks.append(source.k[b, block, s])
                vs.append(source.v[b, block, s])
    empty = source.k.new_zeros(0, *source.k.shape[3:])
    return (torch.stack(ks), torch.stack(vs)) if ks else (empty, empty)


def plain(q, q_far, group, sources):
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"))
    rows = []
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            for h in range(H):
                scores, values = [], []
                for name, source in sources.items():
                    query = (q if name in ("window", "fading") else q_far)[b, t, h]
                    k, v = keys_of_token(source, b, t, int(group[t]))
                    g = h // (H // source.k.shape[-2])
                    scores.append((k[:, g] @ query) * D**-0.5)
                    values.append(v[:, g])
                s, v = torch.cat(scores), torch.cat(values)
                if len(s):
                    rows.append((b, t, h, s.softmax(0) @ v, s.logsumexp(0)))
    index = tuple(torch.tensor(i) for i in zip(*[r[:3] for r in rows], strict=True))
    out = out.index_put(index, torch.stack([r[3] for r in rows]))
    return out, lse.index_put(index, torch.stack([r[4] for r in rows]))


@pytest.mark.parametrize("tokens", [1, 13, 140])
@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=lambda g: f"G{g}")
def test_it_is_one_softmax_over_the_union_with_all_gradients(tokens, kv_heads):
    results = []
    for fast in (True, False):
        q, q_far, group, sources = make_sources(tokens, kv_heads)
        if fast:
            done = span_attention(q, q_far=q_far, group=group, **sources)
            out, lse = done.out, done.lse
        else:
            out, lse = plain(q, q_far, group, sources)
        leaves = [q, q_far] + [t for s in sources.values() for t in (s.k, s.v)]
        generator = torch.Generator().manual_seed(1)
        seen = torch.where(lse.isfinite(), lse, 0.0)
        loss = (out * torch.randn(out.shape, generator=generator, dtype=out.dtype)).sum()
        loss = loss + (seen * torch.randn(lse.shape, generator=generator, dtype=lse.dtype)).sum()
        results.append([out, lse, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("absent", ["window", "fading", "span", "eidetic", "sinks"])
def test_an_absent_source_equals_an_empty_one(absent):
    q, q_far, group, sources = make_sources(13, 2)
    without = span_attention(q, q_far=q_far, group=group, **{n: s for n, s in sources.items() if n != absent})
    source = sources[absent]
    if isinstance(source, Band):
        empty = Band(source.k, source.v, source.end, source.end)
    else:
        empty = Paged(source.k, source.v, torch.full_like(source.table, -1))
    emptied = span_attention(q, q_far=q_far, group=group, **{**sources, absent: empty})
    torch.testing.assert_close(emptied.out, without.out)
    assert bool((emptied.parts[absent] == float("-inf")).all())


def test_a_row_that_sees_nothing_gives_zero_not_nan():
    q = torch.randn(1, 3, 2, 4, requires_grad=True)
    k = torch.randn(1, 3, 2, 4)
    nothing = Band(k, k, torch.arange(3), torch.arange(3))
    done = span_attention(q, window=nothing)
    assert done.out.abs().sum() == 0
    assert bool((done.lse == float("-inf")).all())
    done.out.sum().backward()
    assert q.grad is not None
    assert bool(q.grad.isfinite().all())
    assert span_attention(q).out.abs().sum() == 0


def test_the_parts_tell_the_attention_mass_of_each_source():
    q, q_far, group, sources = make_sources(13, 2)
    done = span_attention(q, q_far=q_far, group=group, **sources)
    total = sum((part - done.lse).exp() for part in done.parts.values())
    torch.testing.assert_close(total, torch.ones_like(total))


def test_the_order_of_merging_does_not_matter():
    torch.manual_seed(0)
    parts = [(torch.randn(5, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)) for _ in range(3)]
    parts[1][1][2] = float("-inf")
    forth, back = merge(parts), merge(parts[::-1])
    torch.testing.assert_close(forth[0], back[0])
    torch.testing.assert_close(forth[1], back[1])


def test_rotation_by_place_equals_rotating_the_gathered_keys():
    from memtier.layers.rotary import apply_rotary, rotary_table

    q, _, group, sources = make_sources(13, 2)
    span = sources["span"]
    cos, sin = rotary_table(torch.arange(12), torch.float64, size=D, theta=100.0)
    turned = span_attention(q, group=group, span=Paged(span.k, span.v, span.table, span.mask, cos, sin))
    rows = span.table.shape[1]
    line = torch.arange(B)[:, None, None]
    pool = apply_rotary(span.k[line, span.table.clamp(min=0)].flatten(2, 3), cos, sin).unflatten(2, (4, 3))
    table = torch.arange(rows * 4).reshape(rows, 4).expand(B, -1, -1).masked_fill(span.table < 0, -1)
    values = span.v[line, span.table.clamp(min=0)]
    plain = span_attention(q, group=group, span=Paged(pool.flatten(1, 2), values.flatten(1, 2), table, span.mask))
    torch.testing.assert_close(turned.out, plain.out)


def test_rows_of_a_batch_may_stand_at_different_places_and_share_a_pool():
    q, q_far, group, sources = make_sources(9, 2, seed=4)
    shift = torch.tensor([[0], [3]])
    window = replace(
        sources["window"], start=(sources["window"].start - shift).clamp(min=0), end=sources["window"].end - shift
    )
    pool = sources["span"].k[:1], sources["span"].v[:1]
    span = replace(sources["span"], k=pool[0].expand(B, -1, -1, -1, -1), v=pool[1].expand(B, -1, -1, -1, -1))
    together = span_attention(q, q_far=q_far, group=group, window=window, span=span)
    for b in range(B):
        row = slice(b, b + 1)
        own = Band(window.k[row], window.v[row], window.start[b], window.end[b])
        alone = span_attention(
            q[row], q_far=q_far[row], group=group, window=own,
            span=replace(span, k=pool[0], v=pool[1], table=span.table[row], mask=span.mask[row]),
        )  # fmt: skip
        torch.testing.assert_close(together.out[row], alone.out)
        torch.testing.assert_close(together.lse[row], alone.lse)


def test_a_shared_half_precision_pool_is_widened_before_it_is_rotated():
    q, _, group, sources = make_sources(23, 2)
    span = sources["span"]
    k, v = span.k[:1].detach().half(), span.v[:1].detach().half()
    angle = torch.rand(12, D, dtype=torch.float64)
    half = replace(span, k=k.expand(B, -1, -1, -1, -1), v=v.expand(B, -1, -1, -1, -1), cos=angle.cos(), sin=angle.sin())
    wide = replace(half, k=half.k.double().contiguous(), v=half.v.double().contiguous())
    one = span_attention(q, group=group, span=half)
    two = span_attention(q, group=group, span=wide)
    assert torch.equal(one.out, two.out)
    assert torch.equal(one.lse, two.lse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 9, 300, 1100])
def test_reading_without_gradients_gives_what_reading_with_them_gives(tokens, dtype):
    q, q_far, group, sources = make_sources(tokens, 2, seed=5, dtype=dtype)
    # not dense in the last axis, as what a convolution over channels gives
    fading = sources["fading"]
    sources["fading"] = replace(fading, k=fading.k.transpose(1, 3).contiguous().transpose(1, 3))
    with_gradients = span_attention(q, q_far=q_far, group=group, **sources)
    with torch.no_grad():
        without = span_attention(q, q_far=q_far, group=group, **sources)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(without.out, with_gradients.out, **tolerance)
    torch.testing.assert_close(without.lse, with_gradients.lse, **tolerance)
    for name, part in with_gradients.parts.items():
        torch.testing.assert_close(without.parts[name], part, **tolerance)
