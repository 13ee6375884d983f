"""gated_rms_norm: the kernels against the reference, the reference against its definition."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from memtier_kernels import gated_rms_norm
from memtier_kernels.testing import compare, make_inputs


def test_the_reference_is_the_norm_of_what_passes_the_gate():
    arguments = make_inputs("gated_rms_norm", dtype=torch.float64)
    x, gate, weight = arguments["x"], arguments["gate"], arguments["weight"]
    expected = F.rms_norm(x * F.silu(gate), x.shape[-1:], weight, eps=arguments["eps"])
    torch.testing.assert_close(gated_rms_norm(**arguments), expected)


@pytest.mark.parametrize(
    "sizes",
    [
        {"T": 1, "E": 2},
        {"T": 63, "E": 48},
        {"T": 65, "E": 129},
        {"B": 1, "T": 600, "E": 5},
        {"B": 1, "T": 3, "E": 8200},
    ],
    ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()),
)
def test_outputs_and_gradients_are_those_of_the_reference(sizes, device):
    errors = compare("gated_rms_norm", make_inputs("gated_rms_norm", seed=1, device=device, **sizes))
    assert set(errors) == {"out.0", "grad.x", "grad.gate", "grad.weight"}
    assert max(errors.values()) < 1e-5, errors


def test_slices_of_a_projection_are_read_by_their_strides(device):
    torch.manual_seed(0)
    wide = torch.randn(2, 9, 70, device=device)
    x, gate = (wide[:, :, at : at + 33].detach().requires_grad_() for at in (1, 36))
    errors = compare("gated_rms_norm", make_inputs("gated_rms_norm", E=33, device=device) | {"x": x, "gate": gate})
    assert max(errors.values()) < 1e-5, errors


def test_a_row_of_zeros_has_gradients(device):
    arguments = make_inputs("gated_rms_norm", seed=2, T=3, device=device)
    arguments["x"] = torch.zeros_like(arguments["x"]).requires_grad_()
    errors = compare("gated_rms_norm", arguments)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_under_autocast_the_result_has_the_autocast_dtype(impl, device):
    arguments = make_inputs("gated_rms_norm", seed=3, T=3, device=device)
    exact = gated_rms_norm(**arguments, impl="reference")
    with torch.autocast(device, dtype=torch.bfloat16):
        y = gated_rms_norm(**arguments, impl=impl)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=2e-2, atol=2e-2)
    (grad,) = torch.autograd.grad(y.float().sum(), arguments["x"])
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_a_compiler_sees_one_graph(impl, device):
    arguments = make_inputs("gated_rms_norm", seed=4, T=5, device=device)
    tensors = [arguments[n] for n in ("x", "gate", "weight")]

    def step(x, gate, weight):
        return gated_rms_norm(x, gate, weight, eps=1e-5, impl=impl) * 2

    got, wanted = torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors), step(*tensors)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), tensors), torch.autograd.grad(wanted.sum(), tensors))


def test_the_operator_keeps_torchs_rules(device):
    arguments = make_inputs("gated_rms_norm", seed=5, T=3, device=device)
    opcheck(
        torch.ops.memtier.gated_rms_norm.default, (*arguments.values(), torch.float32),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip
