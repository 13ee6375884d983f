"""ssd equals its definition, from and to any state, with all gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memtier_kernels import ssd
from memtier_kernels.ssd.reference import ssd_recurrent


def draw(seed, tokens, *, heads=4, groups=2, head=6, state=5, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return {
        "x": normal(batch, tokens, heads, head),
        "dt": normal(batch, tokens, heads).exp(),
        "A": -normal(heads).exp(),
        "B": normal(batch, tokens, groups, state),
        "C": normal(batch, tokens, groups, state),
        "D": normal(heads),
        "state": normal(batch, heads, head, state),
    }


@pytest.mark.parametrize("tokens", [1, 2, 7, 63, 64, 65, 130])
@pytest.mark.parametrize("chunk", [8, 64])
def test_chunks_equal_the_recurrence_with_all_gradients(tokens, chunk):
    results = []
    for run in (lambda a: ssd(**a, chunk_tokens=chunk), lambda a: ssd_recurrent(**a)):
        args = {name: value.requires_grad_() for name, value in draw(0, tokens).items()}
        y, state, log_decay = run(args)
        generator = torch.Generator().manual_seed(1)
        loss = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in (y, state, log_decay))
        grads = torch.autograd.grad(loss, list(args.values()))
        results.append([y, state, log_decay, *grads])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 999), st.integers(2, 70), st.data())
@settings(max_examples=25, deadline=None)
def test_two_passes_chained_by_the_state_equal_one(seed, tokens, data):
    cut = data.draw(st.integers(1, tokens - 1))
    args = draw(seed, tokens)
    whole, end, decay = ssd(**args, chunk_tokens=16)
    sequences = ("x", "dt", "B", "C")
    first, middle, decay_1 = ssd(**{**args, **{n: args[n][:, :cut] for n in sequences}}, chunk_tokens=16)
    rest = {**args, **{n: args[n][:, cut:] for n in sequences}, "state": middle}
    second, last, decay_2 = ssd(**rest, chunk_tokens=16)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last, end, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(decay_1 + decay_2, decay)


def test_float32_is_within_1e_5_of_float64():
    args = draw(3, 200)
    exact = ssd(**args)
    rough = ssd(**{name: value.float() for name, value in args.items()})
    for a, b in zip(rough, exact, strict=True):
        assert (a.double() - b).norm() / b.norm() < 1e-5
        assert a.dtype == torch.float32


def test_a_slow_stretch_after_a_fast_one_keeps_its_precision():
    # the sum of decays is in the thousands when the slow stretch begins
    args = draw(4, 256, heads=2, groups=1)
    args["dt"][:, :128] = 30.0
    args["dt"][:, 128:] = 1e-4
    exact, _, _ = ssd_recurrent(**args)
    rough, _, _ = ssd(**{name: value.float() for name, value in args.items()})
    assert ((rough.double() - exact)[:, 200:].norm() / exact[:, 200:].norm()) < 1e-5


def test_the_state_owns_its_memory():
    _, state, _ = ssd(**draw(5, 130), chunk_tokens=16)
    assert state.untyped_storage().nbytes() == state.numel() * state.element_size()
