"""make_inputs draws valid arguments for every door."""

import pytest
import torch

import memtier_kernels
from memtier.errors import ConfigError
from memtier_kernels.testing import OPS, make_inputs


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "__dataclass_fields__"):
        return [t for name in value.__dataclass_fields__ for t in tensors(getattr(value, name))]
    return [t for v in value for t in tensors(v)] if isinstance(value, (tuple, list)) else []


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tokens", [None, 1, 63])
def test_every_door_takes_what_make_inputs_draws_and_gives_finite_gradients(op, tokens):
    sizes = {"T": tokens} if tokens and "T" in OPS[op] else {}
    arguments = make_inputs(op, seed=1, dtype=torch.float64, **sizes)
    out = getattr(memtier_kernels, op)(**arguments)
    outputs = tensors(out if not isinstance(out, torch.Tensor) else [out])
    leaves = [t for value in arguments.values() for t in tensors(value) if t.requires_grad]
    if leaves:
        smooth = [t.masked_fill(~t.isfinite(), 0.0).sum() for t in outputs if t.requires_grad]
        for grad in torch.autograd.grad(sum(smooth), leaves, allow_unused=True):
            assert grad is None or bool(grad.isfinite().all())


def test_the_same_seed_gives_the_same_numbers_in_every_dtype():
    a, b = make_inputs("ssd", seed=5), make_inputs("ssd", seed=5, dtype=torch.float64)
    torch.testing.assert_close(a["x"].double(), b["x"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arguments", [{"op": "ssm"}, {"op": "ssd", "Q": 3}])
def test_an_unknown_op_or_size_is_refused_by_name(arguments):
    with pytest.raises(ConfigError):
        make_inputs(**arguments)
