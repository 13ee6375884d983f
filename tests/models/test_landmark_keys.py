"""Landmarks that are keys: which are kept, and that a single token can be found by them."""

import pytest
import torch

from memtier.errors import ConfigError
from memtier.layers.landmarks import block_landmarks
from memtier.testing import tiny_config
from memtier_kernels import late_interaction, select_blocks


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_score_is_each_heads_best_landmark_summed_over_heads():
    queries, marks = draw(2, 3, 6, 5), draw(2, 7, 4, 2, 5, seed=1)
    scores = late_interaction(queries, marks)
    for b in range(2):
        for r in range(3):
            for n in range(7):
                wanted = sum(max(float(queries[b, r, h] @ marks[b, n, j, h // 3]) for j in range(4)) for h in range(6))
                assert float(scores[b, r, n]) == pytest.approx(wanted)


def test_more_blocks_than_a_piece_give_the_same_scores_as_each_alone():
    queries, marks = draw(1, 2, 4, 3), draw(1, 2500, 2, 2, 3, seed=1)
    alone = torch.cat([late_interaction(queries, marks[:, i : i + 1]) for i in range(2500)], dim=-1)
    torch.testing.assert_close(late_interaction(queries, marks), alone)


def test_one_landmark_and_one_head_is_the_inner_product():
    queries, marks = draw(2, 3, 8), draw(2, 9, 8, seed=1)
    visible = torch.tensor([9, 4, 0])
    one = select_blocks(queries, marks, visible, 3)
    other = select_blocks(queries[:, :, None], marks[:, :, None, None], visible, 3)
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[1], other[1])


def test_the_most_salient_keys_are_kept_in_the_order_of_their_tokens():
    keys = torch.zeros(1, 1, 5, 1, 2)
    keys[0, 0, :, 0, 0] = torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0])
    assert block_landmarks(keys, None, 2)[0, 0, :, 0, 0].tolist() == [5.0, 4.0]
    surprise = torch.tensor([[[1.0, 0.0, 1.0, 1e-9, 1.0]]])
    assert block_landmarks(keys, surprise, 2)[0, 0, :, 0, 0].tolist() == [2.0, 3.0]


def test_a_single_token_is_found_that_the_mean_buries():
    noise = draw(1, 4000, 32, 2, 16)
    needle = draw(2, 16, seed=3)
    noise[0, 123, 17] = 1.6 * needle
    queries = needle.repeat_interleave(2, 0)
    visible = torch.tensor([4000])
    by_keys, _ = select_blocks(queries[None, None], block_landmarks(noise, None, 4), visible, 1)
    by_mean, _ = select_blocks(
        queries.unflatten(0, (2, 2)).sum(1).flatten()[None, None], block_landmarks(noise, None, 0), visible, 1
    )
    assert int(by_keys) == 123
    assert int(by_mean) != 123


def test_gradients_reach_the_chosen_keys_alone():
    keys = draw(1, 3, 6, 2, 4).requires_grad_()
    marks = block_landmarks(keys, None, 2)
    late_interaction(draw(1, 2, 4, 4, seed=2), marks).sum().backward()
    assert keys.grad is not None
    touched = keys.grad.abs().flatten(3).sum(-1) > 0
    assert 0 < int(touched.sum()) <= 6


def test_more_landmarks_than_a_block_has_tokens_are_refused():
    with pytest.raises(ConfigError, match="landmark_keys is 5"):
        tiny_config(landmark_keys=5)
