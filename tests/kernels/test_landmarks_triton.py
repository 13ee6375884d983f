"""The kernels of landmarks and select_blocks: exact choices, ties, rows that see little, several landmarks a block."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from memtier.errors import KernelError
from memtier_kernels import landmarks, select_blocks
from memtier_kernels.testing import compare, make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def whole_numbers(seed: int, **sizes: Any) -> dict[str, Any]:
    """Arguments of small whole numbers: their scores are exact in float32, and many tie."""
    arguments = make_inputs("select_blocks", seed=seed, device=DEVICE, **sizes)
    draw = torch.Generator().manual_seed(seed)
    for name in ("queries", "landmarks"):
        arguments[name] = torch.randint(-1, 2, arguments[name].shape, generator=draw).float().to(DEVICE)
    return arguments


@pytest.mark.parametrize(
    "sizes",
    [{"n": 1, "S": 1, "G": 1, "D": 1}, {"n": 3, "S": 63, "G": 3, "D": 48}, {"S": 65, "G": 1, "D": 130}, {"n": 0}],
    ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()),
)
def test_landmarks_and_their_gradient_are_those_of_the_reference(sizes, device):
    errors = compare("landmarks", make_inputs("landmarks", seed=1, device=device, **sizes))
    assert set(errors) == {"out.0", "grad.keys"}
    assert max(errors.values()) < 1e-5, errors


def test_landmarks_of_a_slice_of_a_longer_stream(device):
    torch.manual_seed(0)
    stream = torch.randn(2, 30, 3, 2, 8, device=device)[:, 2:26, 1]
    keys = stream.unflatten(1, (6, 4)).detach().requires_grad_()
    assert not keys.is_contiguous()
    errors = compare("landmarks", {"keys": keys})
    assert max(errors.values()) < 1e-5, errors
    (grad,) = torch.autograd.grad(landmarks(keys, impl="triton").sum(), keys)
    torch.testing.assert_close(grad, torch.full_like(keys, 0.25))


@pytest.mark.parametrize(
    "sizes",
    [
        {"n": 1, "k": 3}, {"n": 0, "k": 3}, {"n": 70, "R": 17, "C": 65}, {"n": 600, "R": 2, "k": 5, "C": 130},
        {"n": 70, "R": 17, "m": 3}, {"n": 530, "R": 2, "k": 2, "m": 2, "C": 70, "H": 3, "G": 3},
    ],
    ids=lambda s: "-".join(f"{k}{v}" for k, v in s.items()),
)  # fmt: skip
def test_the_chosen_and_their_scores_are_those_of_the_reference(sizes, device):
    errors = compare("select_blocks", make_inputs("select_blocks", seed=2, device=device, **sizes))
    assert errors["out.0"] == 0
    assert errors["out.1"] < 1e-5


@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(0, 90), st.integers(1, 9), st.sampled_from([0, 2]))
@settings(max_examples=20, deadline=None)
def test_the_choice_is_a_plain_sort_with_ties_to_the_newer(seed, rows, blocks, k, m):
    arguments = whole_numbers(seed, B=1, R=rows, n=blocks, C=2, k=k, m=m)
    q, marks = arguments["queries"][0], arguments["landmarks"][0]
    if m:
        # heads 0 and 1 share a KV head, and so do 2 and 3
        products = torch.einsum("rhd,nmhd->rhnm", q, marks.repeat_interleave(2, dim=2)).amax(-1)
    else:
        products = (q @ marks.T).unsqueeze(1)
    for impl in ("triton", "reference"):
        ids, scores = (x[0].unflatten(0, (rows, -1)).flatten(1, -2) for x in select_blocks(**arguments, impl=impl))
        for row, visible in enumerate(arguments["visible"].tolist()):
            for head, value in enumerate(products[row].tolist()):
                best = sorted(sorted(range(visible), key=lambda b, v=value: (-v[b], -b))[:k])
                assert ids[row, head].tolist() == best + [-1] * (k - len(best))
                assert scores[row, head].tolist() == [value[b] for b in best] + [float("-inf")] * (k - len(best))


@pytest.mark.parametrize("m", [0, 2])
def test_many_blocks_shared_among_programs_are_merged_exactly(m, device):
    # over 512 blocks a row a second program joins
    arguments = whole_numbers(3, B=1, R=3, n=1100, C=3, k=4, m=m)
    arguments["visible"] = torch.tensor([1100, 513, 2], device=device)
    ids, scores = select_blocks(**arguments, impl="triton")
    exact = select_blocks(**arguments, impl="reference")
    assert torch.equal(ids, exact[0])
    assert torch.equal(scores, exact[1])


def test_all_zero_scores_of_either_sign_tie(device):
    queries = torch.tensor([[[0.0, -0.0]]], device=device)
    marks = torch.tensor([[[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]], device=device)
    ids, _ = select_blocks(queries, marks, torch.tensor([4], device=device), 2, impl="triton")
    assert ids.tolist() == [[[2, 3]]]


def test_scores_of_16_bit_inputs_are_float32():
    arguments = make_inputs("select_blocks", dtype=torch.bfloat16)
    exact = make_inputs("select_blocks", dtype=torch.float64)
    _, scores = select_blocks(**arguments)
    assert scores.dtype == torch.float32
    wide = {n: t.double() if n in ("queries", "landmarks") else t for n, t in arguments.items()}
    torch.testing.assert_close(scores.double(), select_blocks(**wide)[1], rtol=1e-5, atol=1e-5)
    assert select_blocks(**exact)[1].dtype == torch.float64


@pytest.mark.parametrize("m", [0, 2])
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_a_compiler_sees_one_graph(impl, m, device):
    arguments = make_inputs("select_blocks", seed=4, m=m, device=device)
    keys = make_inputs("landmarks", seed=4, device=device)["keys"]

    def step(queries, marks, visible, keys):
        return select_blocks(queries, marks, visible, 4, impl=impl), landmarks(keys, impl=impl) * 2

    tensors = [*(arguments[n] for n in ("queries", "landmarks", "visible")), keys]
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*tensors)
    wanted = step(*tensors)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got[1].sum(), keys), torch.autograd.grad(wanted[1].sum(), keys))


def test_the_operators_keep_torchs_rules(device):
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    keys = make_inputs("landmarks", seed=5, device=device)["keys"]
    opcheck(torch.ops.memtier.landmarks.default, (keys,), test_utils=checks)
    arguments = make_inputs("select_blocks", seed=5, device=device)
    opcheck(torch.ops.memtier.select_blocks.default, tuple(arguments.values()), test_utils=checks)


def test_more_blocks_than_the_kernel_holds_are_refused_when_forced(device):
    arguments = make_inputs("select_blocks", k=65, device=device)
    with pytest.raises(KernelError, match="k 65"):
        select_blocks(**arguments, impl="triton")
    assert select_blocks(**arguments)[0].shape == (2, 3, 65)
