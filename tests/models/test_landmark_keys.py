"""Landmarks that are keys: which are kept, and that a single token can be found by them."""

import itertools

import pytest
import torch

from memtier.errors import ConfigError
from memtier.layers.landmarks import (
    block_landmarks,
    candidates,
    choose_blocks,
    extend_window,
    settle,
)
from memtier.testing import tiny_config
from memtier_kernels import late_interaction, select_blocks


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_score_is_each_heads_best_landmark():
    queries, marks = draw(2, 3, 6, 5), draw(2, 7, 4, 2, 5, seed=1)
    scores = late_interaction(queries, marks)
    assert scores.shape == (2, 3, 6, 7)
    for b, r, h, n in itertools.product(range(2), range(3), range(6), range(7)):
        wanted = max(float(queries[b, r, h] @ marks[b, n, j, h // 3]) for j in range(4))
        assert float(scores[b, r, h, n]) == pytest.approx(wanted)


def test_more_blocks_than_a_piece_give_the_same_scores_as_each_alone():
    queries, marks = draw(1, 2, 4, 3), draw(1, 2500, 2, 2, 3, seed=1)
    alone = torch.cat([late_interaction(queries, marks[:, i : i + 1]) for i in range(2500)], dim=-1)
    torch.testing.assert_close(late_interaction(queries, marks), alone)


def test_one_landmark_and_one_head_is_the_inner_product():
    queries, marks = draw(2, 3, 8), draw(2, 9, 8, seed=1)
    visible = torch.tensor([9, 4, 0])
    one = select_blocks(queries, marks, visible, 3)
    other = select_blocks(queries[:, :, None], marks[:, :, None, None], visible, 3)
    assert torch.equal(one[0], other[0][:, :, 0])
    torch.testing.assert_close(one[1], other[1][:, :, 0])


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
    assert set(by_keys.flatten().tolist()) == {123}
    assert int(by_mean) != 123


def test_a_block_counts_by_the_share_of_the_head_that_wants_it_most():
    queries, marks = draw(2, 3, 4, 5), draw(2, 60, 3, 2, 5, seed=1)
    visible = torch.tensor([60, 20, 7])
    ids, scores = choose_blocks(queries, marks, visible, 4)
    for b in range(2):
        for r in range(3):
            seen = int(visible[r])
            best = torch.stack([(marks[b, :seen, :, h // 2] @ queries[b, r, h]).amax(-1) for h in range(4)]) * 5**-0.5
            kept = best.topk(min(8, seen), dim=-1)
            shares = kept.values - kept.values.logsumexp(-1, keepdim=True)
            by_block = {}
            for block, share in zip(kept.indices.flatten().tolist(), shares.flatten().tolist(), strict=True):
                by_block[block] = max(share, by_block.get(block, -float("inf")))
            wanted = sorted(sorted(by_block, key=by_block.__getitem__)[-4:])
            assert ids[b, r].tolist() == wanted
            assert scores[b, r].tolist() == pytest.approx([by_block[block] for block in wanted])


def test_one_certain_head_is_not_outvoted_by_heads_that_look_for_nothing():
    marks = 0.3 * draw(1, 3000, 4, 2, 16)
    needle = draw(16, seed=3)
    marks[0, 77, 2, 0] = 1.2 * needle
    # the other heads like a few hundred blocks a little more than the certain head likes any but its own
    queries = torch.stack([needle, *(8.0 * draw(3, 16, seed=4))])[None, None]
    visible = torch.tensor([3000])
    ids, _ = choose_blocks(queries, marks, visible, 4)
    summed = late_interaction(queries, marks).sum(2)
    assert 77 in ids[0, 0]
    assert 77 not in summed[0, 0].topk(4).indices


@pytest.mark.parametrize("cuts", [[40], [1, 39], [8, 9, 30]])
def test_the_best_of_parts_are_the_best_of_all(cuts):
    queries, marks, visible = draw(1, 2, 4, 5), draw(1, 50, 2, 2, 5, seed=1), torch.tensor([50, 33])
    whole = choose_blocks(queries, marks, visible, 3)
    parts = []
    for start, end in zip([0, *cuts], [*cuts, 50], strict=True):
        ids, scores = candidates(queries, marks[:, start:end], (visible - start).clamp(0, end - start), 3)
        parts.append((torch.where(ids < 0, ids, ids + start), scores))
    ids, scores = (torch.cat(x, dim=-1) for x in zip(*parts, strict=True))
    best = scores.topk(6, dim=-1)
    merged = settle(queries, ids.gather(-1, best.indices), best.values, 3)
    assert torch.equal(merged[0], whole[0])
    torch.testing.assert_close(merged[1], whole[1])


def test_newest_blocks_take_the_places_that_no_head_wants_more():
    ids, shares = torch.tensor([[[2, 5, 40, 90]]]), torch.tensor([[[0.9, 0.2, 0.4, 0.1]]])
    newest = torch.tensor([[[87, 88, 89, 90]]])
    for share, wanted in (
        (0.0, [2, 5, 40, 90]),
        (0.05, [2, 5, 40, 90]),
        (0.3, [2, 40, 89, 90]),
        (0.95, [87, 88, 89, 90]),
    ):
        chosen, scores = extend_window(ids, shares.log(), torch.tensor([91]), share)
        assert chosen[0, 0].tolist() == wanted, share
        own = dict(zip(ids[0, 0].tolist(), shares[0, 0].tolist(), strict=True))
        expected = [max(own.get(block, 0.0), share if block in newest else 0.0) for block in wanted]
        assert scores[0, 0].exp().tolist() == pytest.approx(expected)


def test_an_early_boundary_has_fewer_newest_blocks():
    early = torch.tensor([[[0, -1, -1, -1]]]), torch.tensor([[[-2.0] + 3 * [-torch.inf]]])
    ids, scores = extend_window(*early, torch.tensor([2]), 0.5)
    assert ids.tolist() == [[[0, 1, -1, -1]]]
    assert scores[0, 0, :2].exp().tolist() == pytest.approx([0.5, 0.5])


def test_nothing_visible_is_nothing_chosen():
    ids, scores = choose_blocks(draw(1, 1, 4, 5), draw(1, 9, 2, 2, 5), torch.tensor([0]), 3)
    assert ids.tolist() == [[[-1, -1, -1]]]
    assert bool((scores == -float("inf")).all())


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
