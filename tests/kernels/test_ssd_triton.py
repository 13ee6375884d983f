"""The kernels of ssd equal its definition in float64, with all gradients: any size, from any state, packed or not."""

import importlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memtier.errors import ConfigError, KernelError
from memtier_kernels import ssd
from memtier_kernels.testing import compare, make_inputs, tensors

# sizes at which every mask and tile is used, and which the interpreter still runs in a second
SMALL = {"B": 1, "T": 40, "H": 2, "G": 1, "P": 8, "N": 6}
SEQUENCES = ("x", "dt", "B", "C")


@pytest.fixture
def few_programs(monkeypatch):
    """As where there are so many chunks that a program walks over several, and takes several heads of a group."""
    monkeypatch.setattr(importlib.import_module("memtier_kernels.ssd.triton_chunks"), "_PROGRAMS", 1)


def within(errors, bound=1e-5):
    assert errors
    assert max(errors.values()) < bound, {name: e for name, e in errors.items() if e >= bound}


@pytest.mark.parametrize("tokens", [1, 63, 65])
@pytest.mark.parametrize("groups", [1, 2])
def test_outputs_and_gradients_at_lengths_beside_whole_chunks(device, tokens, groups):
    within(compare("ssd", make_inputs("ssd", device=device, **{**SMALL, "T": tokens, "G": groups})))


@pytest.mark.parametrize(("head", "size"), [(16, 16), (48, 32), (128, 20), (24, 130)], ids=lambda n: str(n))
def test_outputs_and_gradients_at_odd_sizes_of_heads_and_states(device, head, size):
    within(compare("ssd", make_inputs("ssd", seed=1, device=device, **{**SMALL, "T": 33, "P": head, "N": size})))


@pytest.mark.parametrize("absent", [("D",), ("state",), ("D", "state")], ids="+".join)
def test_outputs_and_gradients_without_skip_or_state(device, absent):
    arguments = make_inputs("ssd", seed=2, device=device, **SMALL)
    within(compare("ssd", {name: value for name, value in arguments.items() if name not in absent}))


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("sequences", [0, 3])
def test_outputs_and_gradients_where_programs_take_several_chunks_and_heads(device, sequences):
    sizes = {**SMALL, "T": 100, "H": 6, "G": 2, "sequences": sequences}
    within(compare("ssd", make_inputs("ssd", seed=3, device=device, **sizes)))


def test_outputs_and_gradients_of_a_batch(device):
    within(compare("ssd", make_inputs("ssd", seed=4, device=device, **{**SMALL, "B": 2, "T": 33, "G": 2})))


@pytest.mark.parametrize("decay", ["fast", "one-fast-token", "fast-then-slow", "slow"])
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_strong_and_mixed_decays_keep_their_precision(device, decay, impl):
    arguments = make_inputs("ssd", seed=5, device=device, **{**SMALL, "T": 70})
    dt = torch.full_like(arguments["dt"].detach(), 1e-3)
    if decay == "fast":
        dt[:] = 50.0
    elif decay == "one-fast-token":
        dt[:, 20] = 50.0
    elif decay == "fast-then-slow":
        dt[:, :50] = 50.0
    dt *= 1 + 0.1 * torch.rand(dt.shape, generator=torch.Generator().manual_seed(0)).to(device)
    arguments["dt"] = dt.requires_grad_()
    arguments["A"] = torch.tensor([-1.0, -0.7], device=device).requires_grad_()
    errors = compare("ssd", arguments, impl=impl)
    if impl == "reference":
        # autograd adds what a decay gains by some pairs and loses by others; the kernel sums over the pairs it divides
        assert errors.pop("grad.A") < 1e-4
    within(errors)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("lengths", [[40], [0, 17, 0, 0, 33, 1], [32, 32], [0, 0]], ids=str)
def test_packed_sequences_equal_one_by_one(device, impl, lengths):
    arguments = make_inputs("ssd", seed=6, device=device, **{**SMALL, "T": sum(lengths), "sequences": len(lengths)})
    cuts = torch.tensor([0, *lengths]).cumsum(0)
    arguments["cu_seqlens"] = cuts.to(device, torch.int32)
    y, states, decays = ssd(**arguments, impl=impl)
    for s, (a, b) in enumerate(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)):
        if a == b:
            torch.testing.assert_close(states[s], arguments["state"][s], rtol=0, atol=0)
            assert not decays[s].any()
            continue
        one = {name: arguments[name][:, a:b] if name in SEQUENCES else arguments[name] for name in arguments}
        del one["cu_seqlens"]
        alone = ssd(**{**one, "state": arguments["state"][s : s + 1]}, impl="reference")
        for got, wanted in zip((y[:, a:b], states[s : s + 1], decays[s : s + 1]), alone, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    within(compare("ssd", arguments, impl=impl))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_packed_sequences_do_not_touch_each_other(device):
    arguments = make_inputs("ssd", seed=7, device=device, **{**SMALL, "T": 60, "sequences": 3})
    arguments["cu_seqlens"] = torch.tensor([0, 20, 40, 60], device=device)
    with torch.no_grad():
        y, states, decays = ssd(**arguments, impl="triton")
        arguments["x"][:, 20:40] = float("nan")
        arguments["state"][1] = float("inf")
        y_2, states_2, decays_2 = ssd(**arguments, impl="triton")
    others = torch.tensor([0, 2], device=device)
    assert torch.equal(y_2[:, :20], y[:, :20]) and torch.equal(y_2[:, 40:], y[:, 40:])
    assert torch.equal(states_2[others], states[others]) and torch.equal(decays_2, decays)


@given(st.integers(0, 999), st.lists(st.integers(1, 69), max_size=3), st.sampled_from(["triton", "reference"]))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cuts_chained_by_the_state_equal_one_pass(device, seed, cuts, impl):
    arguments = make_inputs("ssd", seed=seed, device=device, **{**SMALL, "T": 70})
    with torch.no_grad():
        whole, end, decay = ssd(**arguments, impl=impl)
        state, parts, decays = arguments["state"], [], []
        for a, b in zip([0, *sorted(set(cuts))], [*sorted(set(cuts)), 70], strict=True):
            part = {name: arguments[name][:, a:b] for name in SEQUENCES}
            y, state, log_decay = ssd(**{**arguments, **part, "state": state}, impl=impl)
            parts.append(y)
            decays.append(log_decay)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, end, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(decays), decay, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("absent", [(), ("D", "state")], ids=["all", "no-D-no-state"])
def test_one_token_without_gradients_takes_the_step_kernel(device, absent, monkeypatch):
    arguments = make_inputs("ssd", seed=8, device=device, **{**SMALL, "B": 3, "T": 1, "P": 20})
    arguments = {name: value.detach() for name, value in arguments.items() if name not in absent}
    chunked = importlib.import_module("memtier_kernels.ssd.triton_forward")
    monkeypatch.setattr(chunked, "forward", None)
    within(compare("ssd", arguments))


def test_strided_inputs_and_gradients_are_taken_as_they_are(device):
    arguments = make_inputs("ssd", seed=9, device=device, **SMALL)
    wanted = ssd(**arguments, impl="reference")
    mixed = torch.cat([arguments[n].detach().flatten(2) for n in ("x", "B", "C")], -1)
    x, B, C = mixed.split([16, 6, 6], -1)
    views = {"x": x.unflatten(-1, (2, 8)), "B": B.unflatten(-1, (1, 6)), "C": C.unflatten(-1, (1, 6))}
    state = arguments["state"].detach().transpose(-1, -2).contiguous().transpose(-1, -2)
    views = {name: value.requires_grad_() for name, value in {**views, "state": state}.items()}
    got = ssd(**{**arguments, **views}, impl="triton")
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    # a gradient of one number a tensor, expanded
    grads = torch.autograd.grad(sum(t.sum() for t in got), list(views.values()))
    exact = torch.autograd.grad(sum(t.sum() for t in wanted), [arguments[name] for name in views])
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sequences", [0, 2])
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_it_compiles_whole(device, impl, sequences):
    arguments = make_inputs("ssd", seed=10, device=device, **{**SMALL, "sequences": sequences})
    compiled = torch.compile(lambda **a: ssd(**a, impl=impl), fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(**arguments), ssd(**arguments, impl=impl), strict=True):
        torch.testing.assert_close(a, b)
    sum(t.sum() for t in tensors(compiled(**arguments))).backward()
    assert arguments["x"].grad.isfinite().all()


@pytest.mark.parametrize("sequences", [0, 2])
def test_the_operator_is_what_it_says(device, sequences):
    a = make_inputs("ssd", seed=11, device=device, **{**SMALL, "T": 20, "sequences": sequences})
    names = ("x", "dt", "A", "B", "C", "D", "state", "cu_seqlens")
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.memtier.ssd, tuple(a.get(name) for name in names), test_utils=checks)
    step = {name: value.detach() for name, value in make_inputs("ssd", device=device, **{**SMALL, "T": 1}).items()}
    torch.library.opcheck(torch.ops.memtier.ssd_step, tuple(step[name] for name in names[:-1]), test_utils=checks[:2])


def test_a_loss_on_one_output_reaches_the_inputs_that_want_it(device):
    arguments = make_inputs("ssd", seed=12, device=device, **SMALL)
    arguments = {name: value.detach() for name, value in arguments.items()}
    arguments["B"].requires_grad_()
    for output in range(2):
        grads = []
        for impl in ("triton", "reference"):
            out = ssd(**arguments, impl=impl)[output]
            grads.append(torch.autograd.grad(out.square().sum(), arguments["B"])[0])
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_what_the_kernel_cannot_take_is_refused():
    with pytest.raises(KernelError, match="heads of up to 128"):
        ssd(**make_inputs("ssd", **{**SMALL, "P": 130}), impl="triton")
    with pytest.raises(ConfigError, match="packed sequences"):
        ssd(**make_inputs("ssd", **{**SMALL, "B": 2}), cu_seqlens=torch.tensor([0, 40]))
