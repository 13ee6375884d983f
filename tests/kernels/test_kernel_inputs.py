"""make_inputs draws valid arguments for every door."""

import pytest
import torch

import memtier_kernels
from memtier.errors import ConfigError
from memtier_kernels.testing import OPS, compare, leaves, make_inputs, tensors


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tokens", [None, 1, 63])
def test_every_door_takes_what_make_inputs_draws_and_gives_finite_gradients(op, tokens):
    sizes = {"T": tokens} if tokens and "T" in OPS[op] else {}
    arguments = make_inputs(op, seed=1, dtype=torch.float64, **sizes)
    out = getattr(memtier_kernels, op)(**arguments)
    outputs = tensors(out)
    if leaves(arguments):
        smooth = [t.masked_fill(~t.isfinite(), 0.0).sum() for t in outputs if t.requires_grad]
        for grad in torch.autograd.grad(sum(smooth), leaves(arguments), allow_unused=True):
            assert grad is None or bool(grad.isfinite().all())


def test_the_same_seed_gives_the_same_numbers_in_every_dtype():
    a, b = make_inputs("ssd", seed=5), make_inputs("ssd", seed=5, dtype=torch.float64)
    torch.testing.assert_close(a["x"].double(), b["x"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arguments", [{"op": "ssm"}, {"op": "ssd", "Q": 3}])
def test_an_unknown_op_or_size_is_refused_by_name(arguments):
    with pytest.raises(ConfigError):
        make_inputs(**arguments)


@pytest.mark.parametrize("op", OPS)
def test_every_reference_in_float32_agrees_with_itself_in_float64(op):
    errors = compare(op, make_inputs(op, seed=2), impl="reference")
    assert errors
    assert max(errors.values()) < 1e-5, errors
