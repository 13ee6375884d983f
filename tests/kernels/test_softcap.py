"""Scores that saturate: one softmax over all sources, each score capped, with gradients."""

import pytest
import torch

from memtier.errors import KernelError
from memtier_kernels import Band, span_attention
from memtier_kernels.span_attention.sources import Paged

CAP = 1.5


def sources(seed=0):
    draw = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64, requires_grad=True)

    return make(1, 7, 4, 6), make(1, 9, 2, 6), make(1, 9, 2, 6), make(1, 3, 2, 2, 6), make(1, 3, 2, 2, 6)


def test_a_cap_is_put_on_every_score_of_every_source():
    q, k, v, far_k, far_v = sources()
    place = torch.arange(7)
    window = Band(k, v, (place - 2).clamp(min=0), place + 3)
    table = torch.tensor([[[0, 2, -1]]])
    out = span_attention(q, window=window, span=Paged(far_k, far_v, table), softcap=CAP)
    keys = torch.cat([far_k[:, [0, 2]].flatten(1, 2), k], dim=1).repeat_interleave(2, 2)
    values = torch.cat([far_v[:, [0, 2]].flatten(1, 2), v], dim=1).repeat_interleave(2, 2)
    scores = CAP * (torch.einsum("bihd,bjhd->bhij", q, keys) * 6**-0.5 / CAP).tanh()
    at = torch.arange(9)
    hidden = (at < (place - 2).clamp(min=0)[:, None]) | (at >= (place + 3)[:, None])
    scores = scores.masked_fill(torch.nn.functional.pad(hidden, (4, 0)), float("-inf"))
    wanted = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), values)
    torch.testing.assert_close(out.out, wanted)
    torch.testing.assert_close(out.lse, scores.logsumexp(-1).transpose(1, 2))
    inputs = (q, k, v, far_k, far_v)
    for got, expected in zip(
        torch.autograd.grad(out.out.square().sum(), inputs, allow_unused=True),
        torch.autograd.grad(wanted.square().sum(), inputs, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_the_kernel_is_not_forced_on_what_it_does_not_take():
    q, k, v, _, _ = (x.detach().float() for x in sources())
    place = torch.arange(7)
    with pytest.raises(KernelError, match="soft cap"):
        span_attention(q, window=Band(k, v, place * 0, place + 3), softcap=CAP, impl="triton")
