"""The causal_conv1d kernels against the reference in float64: outputs and all gradients."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from memtier.errors import KernelError
from memtier_kernels import causal_conv1d
from memtier_kernels.testing import compare, make_inputs

SIZES = {
    "T1": {"T": 1},
    "T2-shorter-than-the-tail": {"T": 2},
    "T63-C48": {"T": 63, "C": 48},
    "T65-C300-over-one-tile-of-channels": {"T": 65, "C": 300},
    "T33-width2": {"T": 33, "width": 2},
    "T33-width8": {"T": 33, "width": 8},
    "T3-width8": {"T": 3, "width": 8},
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_outputs_and_gradients_are_those_of_the_reference(sizes, device):
    errors = compare("causal_conv1d", make_inputs("causal_conv1d", seed=1, device=device, **sizes))
    assert set(errors) == {"out.0", "out.1", "grad.x", "grad.weight", "grad.bias", "grad.tail"}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("absent", [("bias",), ("tail",), ("activation",), ("bias", "tail", "activation")])
def test_optional_inputs_may_be_absent(absent, device):
    arguments = make_inputs("causal_conv1d", seed=2, T=19, device=device) | dict.fromkeys(absent)
    errors = compare("causal_conv1d", arguments)
    assert max(errors.values()) < 1e-5, errors


def test_slices_of_wider_tensors_are_read_by_their_strides(device):
    torch.manual_seed(0)
    wide = make_inputs("causal_conv1d", seed=3, T=21, C=24, device=device)
    x = torch.randn(2, 21, 40, device=device)[:, :, 7:31].requires_grad_()
    weight = torch.randn(4, 24, device=device).t().requires_grad_()
    tail = torch.randn(2, 24, 3, device=device).transpose(1, 2).requires_grad_()
    errors = compare("causal_conv1d", wide | {"x": x, "weight": weight, "tail": tail})
    assert max(errors.values()) < 1e-5, errors


def test_a_gradient_that_is_one_number_everywhere_flows_back(device):
    arguments = make_inputs("causal_conv1d", seed=4, T=9, device=device)
    y, _ = causal_conv1d(**arguments, impl="triton")
    exact, _ = causal_conv1d(**arguments, impl="reference")
    names = ("x", "weight", "bias")
    got = torch.autograd.grad(y.sum(), [arguments[n] for n in names])
    for mine, wanted in zip(got, torch.autograd.grad(exact.sum(), [arguments[n] for n in names]), strict=True):
        torch.testing.assert_close(mine, wanted)


@given(st.integers(1, 40), st.data())
@settings(max_examples=10, deadline=None)
def test_a_stream_cut_anywhere_gives_what_one_pass_gives(tokens, data):
    cuts = sorted({0, tokens, *data.draw(st.lists(st.integers(0, tokens), max_size=4))})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments = make_inputs("causal_conv1d", seed=tokens, B=1, T=tokens, C=3, device=device)
    x, tail = arguments.pop("x"), arguments.pop("tail")
    whole, last = causal_conv1d(x, **arguments, tail=tail, impl="triton")
    pieces = []
    for start, end in pairwise(cuts):
        y, tail = causal_conv1d(x[:, start:end], **arguments, tail=tail, impl="triton")
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert torch.equal(tail, last)


def test_gradients_are_the_same_in_every_run(device):
    grads = []
    for _ in range(2):
        arguments = make_inputs("causal_conv1d", seed=5, T=70, device=device)
        y, _ = causal_conv1d(**arguments, impl="triton")
        grads.append(torch.autograd.grad(y.square().sum(), arguments["weight"])[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_a_compiler_sees_one_graph(impl, device):
    arguments = make_inputs("causal_conv1d", seed=6, T=7, device=device)

    def step(x, weight, bias, tail):
        y, new_tail = causal_conv1d(x, weight, bias, tail=tail, activation="silu", impl=impl)
        return y * 2, new_tail

    tensors = [arguments[n] for n in ("x", "weight", "bias", "tail")]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(*tensors), step(*tensors)
    torch.testing.assert_close(got, wanted)
    for mine, exact in zip(
        torch.autograd.grad(got[0].sum(), tensors), torch.autograd.grad(wanted[0].sum(), tensors), strict=True
    ):
        torch.testing.assert_close(mine, exact)


def test_the_operator_keeps_torchs_rules(device):
    arguments = make_inputs("causal_conv1d", seed=7, T=5, device=device)
    for absent in ((), ("bias", "tail")):
        given_ = arguments | dict.fromkeys(absent)
        opcheck(
            torch.ops.memtier.causal_conv1d.default,
            (given_["x"], given_["weight"], given_["bias"], given_["tail"], True),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


def test_a_kernel_wider_than_eight_is_refused_when_forced(device):
    arguments = make_inputs("causal_conv1d", width=9, device=device)
    with pytest.raises(KernelError, match="width 9"):
        causal_conv1d(**arguments, impl="triton")
    assert causal_conv1d(**arguments)[0].shape == arguments["x"].shape
