"""causal_conv1d, landmarks, select_blocks, innovation, keep_surprising, and the doors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import memtier_kernels
from memtier.errors import ConfigError, KernelError
from memtier_kernels import causal_conv1d, innovation, keep_surprising, landmarks, select_blocks
from memtier_kernels.dispatch import compact_indices


@pytest.mark.parametrize("tokens", [1, 2, 3, 65])
def test_causal_conv1d_is_the_depthwise_convolution_and_its_tail_continues_it(tokens):
    torch.manual_seed(0)
    x = torch.randn(2, tokens + 9, 5, dtype=torch.float64)
    weight, bias = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    padded = F.pad(x.transpose(1, 2), (3, 0))
    expected = F.silu(F.conv1d(padded, weight[:, None], bias, groups=5)).transpose(1, 2)
    first, tail = causal_conv1d(x[:, :tokens], weight, bias, activation="silu")
    second, _ = causal_conv1d(x[:, tokens:], weight, bias, tail=tail, activation="silu")
    torch.testing.assert_close(torch.cat([first, second], 1), expected)
    assert tail.untyped_storage().nbytes() == tail.numel() * tail.element_size()


def test_landmarks_are_means_of_keys_heads_concatenated():
    keys = torch.randn(2, 3, 4, 2, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(landmarks(keys)[1, 2], keys[1, 2].mean(0).flatten())


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(0, 12), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_select_blocks_is_the_sorted_top_k_with_ties_to_the_newer(seed, rows, blocks, k):
    generator = torch.Generator().manual_seed(seed)
    # few distinct values, so that ties are common
    queries = torch.randint(-1, 2, (1, rows, 2), generator=generator).float()
    marks = torch.randint(-1, 2, (1, blocks, 2), generator=generator).float()
    visible = torch.randint(0, blocks + 1, (rows,), generator=generator)
    ids, scores = select_blocks(queries, marks, visible, k)
    for row in range(rows):
        value = [float(queries[0, row] @ marks[0, b]) for b in range(int(visible[row]))]
        expected = sorted(sorted(range(len(value)), key=lambda b: (-value[b], -b))[:k])
        got = [b for b in ids[0, row].tolist() if b >= 0]
        assert got == expected
        assert ids[0, row].tolist() == expected + [-1] * (k - len(expected))
        assert scores[0, row, : len(got)].tolist() == [value[b] for b in got]


def test_innovation_is_the_relative_squared_error():
    h, predicted = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = ((h - predicted) ** 2).sum(-1) / ((h**2).sum(-1) + 1e-6)
    torch.testing.assert_close(innovation(h, predicted), expected, rtol=1e-5, atol=0)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 6), st.data())
@settings(max_examples=60, deadline=None)
def test_keeping_in_two_rounds_equals_keeping_once_and_ties_keep_the_older(values, m, data):
    e = torch.tensor([values], dtype=torch.float32)
    positions = torch.arange(len(values))[None]
    everything = torch.tensor([len(values)])
    once = keep_surprising(e, positions, everything, m)[0, 0]
    expected = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:m])
    assert once[once >= 0].tolist() == expected
    cut = data.draw(st.integers(0, len(values)))
    early = keep_surprising(e[:, :cut], positions[:, :cut], everything, m)[0, 0] if cut else torch.empty(0).long()
    kept = torch.cat([early[early >= 0], torch.arange(cut, len(values))])
    late = keep_surprising(e[:, kept], positions[:, kept], everything, m)[0, 0]
    assert kept[late[late >= 0]].tolist() == expected


def test_keep_surprising_never_looks_past_the_row():
    e, positions = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[-1, 1, 2]])
    table = keep_surprising(e, positions, torch.tensor([1, 2, 3]), 2)
    assert table[0].tolist() == [[-1, -1], [1, -1], [1, 2]]


def test_compact_indices_gives_the_first_true_entries():
    mask = torch.tensor([[True, False, True, True], [False, False, False, False]])
    assert compact_indices(mask, 2).tolist() == [[0, 2], [-1, -1]]


@pytest.mark.parametrize(("impl", "error"), [("triton", KernelError), ("fastest", ConfigError)])
def test_a_forced_implementation_never_falls_back(impl, error):
    # which no kernel takes, wherever it runs
    h = torch.ones(1, 1, 2, dtype=torch.float64)
    with pytest.raises(error, match=impl):
        innovation(h, h, impl=impl)


def test_every_public_name_of_the_package_exists():
    assert all(hasattr(memtier_kernels, name) for name in memtier_kernels.__all__)
