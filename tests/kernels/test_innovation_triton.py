"""The kernels of innovation and keep_surprising: gradients, ties, rounds, rows that see little."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from memtier_kernels import innovation, keep_surprising
from memtier_kernels.testing import compare, make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    "sizes",
    [{"T": 1, "E": 1}, {"T": 63, "E": 48}, {"T": 65, "E": 129}, {"T": 3, "E": 4100}, {"B": 1, "T": 2, "E": 16384}],
    ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()),
)
def test_innovation_and_its_gradients_are_those_of_the_reference(sizes, device):
    errors = compare("innovation", make_inputs("innovation", seed=1, device=device, **sizes))
    assert set(errors) == {"out.0", "grad.h", "grad.predicted"}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("wanted", ["h", "predicted"])
def test_only_the_gradient_that_is_asked_for_is_computed(wanted, device):
    arguments = make_inputs("innovation", seed=2, T=5, device=device)
    arguments = {name: t if name == wanted else t.detach() for name, t in arguments.items()}
    errors = compare("innovation", arguments)
    assert set(errors) == {"out.0", f"grad.{wanted}"}
    assert max(errors.values()) < 1e-5, errors


def test_innovation_of_slices_and_of_a_mean(device):
    torch.manual_seed(0)
    wide = torch.randn(2, 9, 40, device=device)
    h, predicted = wide[:, :, 3:20].detach().requires_grad_(), wide[:, 1:, 20:37].detach()
    predicted = torch.cat([predicted, predicted[:, :1]], dim=1).requires_grad_()
    grads = []
    for impl in ("triton", "reference"):
        loss = innovation(h, predicted, impl=impl).mean()
        grads.append(torch.autograd.grad(loss, [h, predicted]))
    for mine, exact in zip(*grads, strict=True):
        torch.testing.assert_close(mine, exact)


def test_a_vector_of_zeros_is_no_division_by_zero(device):
    h = torch.zeros(1, 2, 8, device=device, requires_grad=True)
    predicted = torch.zeros(1, 2, 8, device=device, requires_grad=True)
    errors = compare("innovation", {"h": h, "predicted": predicted})
    assert max(errors.values()) == 0, errors


@pytest.mark.parametrize(
    "sizes",
    [{"n": 1, "m": 3}, {"n": 129, "m": 16, "R": 7}, {"n": 300, "m": 64, "R": 4}, {"n": 40, "m": 50}],
    ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()),
)
def test_the_kept_are_those_of_the_reference(sizes, device):
    assert compare("keep_surprising", make_inputs("keep_surprising", seed=3, device=device, **sizes)) == {"out.0": 0.0}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 6), st.data())
@settings(max_examples=20, deadline=None)
def test_choosing_among_survivors_and_newcomers_is_choosing_among_all(values, m, data):
    n = len(values)
    e = torch.tensor([values], dtype=torch.float32, device=DEVICE)
    positions = torch.arange(n, device=DEVICE)[None]
    everything = torch.tensor([n], device=DEVICE)

    def keep(index: torch.Tensor) -> torch.Tensor:
        kept = keep_surprising(e[:, index], positions[:, index], everything, m, impl="triton")[0, 0]
        return index[kept[kept >= 0]]

    expected = sorted(sorted(range(n), key=lambda i: (-values[i], i))[:m])
    assert keep(positions[0]).tolist() == expected
    kept = torch.empty(0, dtype=torch.int64, device=DEVICE)
    for cut in torch.tensor_split(positions[0], sorted(data.draw(st.lists(st.integers(0, n), max_size=3)))):
        kept = keep(torch.cat([kept, cut])) if len(kept) + len(cut) else kept
    assert kept.tolist() == expected


@given(st.integers(0, 10_000), st.integers(1, 90), st.integers(1, 9))
@settings(max_examples=15, deadline=None)
def test_rows_see_only_what_lies_before_them_and_no_empty_candidate(seed, n, m):
    draw = torch.Generator().manual_seed(seed)
    e = torch.randint(0, 4, (2, n), generator=draw).float().to(DEVICE)
    valid = torch.randint(0, 4, (2, n), generator=draw) > 0
    positions = torch.where(valid, torch.arange(n), -1).to(DEVICE)
    before = torch.randint(-1, n + 2, (3,), generator=draw).to(DEVICE)
    got = keep_surprising(e, positions, before, m, impl="triton")
    assert torch.equal(got, keep_surprising(e, positions, before, m, impl="reference"))
    for b, row in ((b, row) for b in range(2) for row in range(3)):
        seen = [i for i in range(n) if 0 <= int(positions[b, i]) < int(before[row])]
        best = sorted(sorted(seen, key=lambda i: (-float(e[b, i]), i))[:m])
        assert got[b, row].tolist() == best + [-1] * (m - len(best))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_a_compiler_sees_one_graph(impl, device):
    arguments = make_inputs("innovation", seed=6, T=7, device=device)
    choice = make_inputs("keep_surprising", seed=6, n=14, device=device)

    def step(h, predicted):
        e = innovation(h, predicted, impl=impl)
        kept = keep_surprising(
            e.detach().flatten()[None].expand(2, -1), choice["positions"], choice["before"], 3, impl=impl
        )
        return e, kept

    tensors = list(arguments.values())
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors)
    wanted = step(*tensors)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(got[0].sum(), tensors), torch.autograd.grad(wanted[0].sum(), tensors)
    )


def test_the_operators_keep_torchs_rules(device):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = make_inputs("innovation", seed=7, T=5, device=device)
    opcheck(torch.ops.memtier.innovation.default, tuple(arguments.values()), test_utils=checks)
    arguments = make_inputs("keep_surprising", seed=7, device=device)
    opcheck(torch.ops.memtier.keep_surprising.default, tuple(arguments.values()), test_utils=checks)
