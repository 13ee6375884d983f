"""Landmarks as bounds, and the best of several queries: what they score, causal, and independent of the split."""

import pytest
import torch

from memtier.cache import TieredCache
from memtier.errors import ConfigError
from memtier.layers.landmarks import best_of_queries, block_landmarks
from memtier.testing import tiny_config, tiny_model
from memtier_kernels import select_blocks

KINDS = {
    "bounds": {"landmark_kind": "bounds"},
    "max": {"query_kind": "max"},
    "bounds-max": {"landmark_kind": "bounds", "query_kind": "max", "num_key_value_heads": 2},
    "r1": {"span_refresh_tokens": 1, "query_kind": "max"},
    "r16": {"span_refresh_tokens": 16, "query_kind": "max", "landmark_kind": "bounds"},
    "recency": {"landmark_keys": 3, "recency_share": 0.4},
    "r16-mean": {"span_refresh_tokens": 16},
}
TOKENS = 100


def each_kind(function):
    return pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)(function)


def tokens(batch=2, count=TOKENS, seed=0):
    return torch.randint(0, 256, (batch, count), generator=torch.Generator().manual_seed(seed))


@each_kind
@torch.inference_mode()
def test_any_split_and_any_restore_give_the_logits_of_the_whole(overrides):
    model, x = tiny_model(dtype=torch.float64, **overrides), tokens()
    whole = model(x, marks={37, 81}).logits
    for cuts in ([], [5, 6, 7, 50, 53, 90, 91, 92], list(range(1, TOKENS))):
        cache = TieredCache(model.config, dtype=torch.float64, batch_size=2)
        for mark in (37, 81):
            cache.mark(mark)
        parts = []
        for start, end in zip([0, *cuts], [*cuts, TOKENS], strict=True):
            parts.append(model(x[:, start:end], past_key_values=cache).logits)
            if start == 50:
                saved = {name: value.clone() for name, value in cache.state_dict().items()}
                cache = TieredCache(model.config, dtype=torch.float64, batch_size=2, selector=cache.selector)
                cache.load_state_dict(saved)
        assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-9


@each_kind
@torch.inference_mode()
def test_no_output_depends_on_a_later_token_and_later_ones_do(overrides):
    model, x = tiny_model(dtype=torch.float64, **overrides), tokens(1)
    whole = model(x).logits
    for at in (0, 40, 83):
        changed = x.clone()
        changed[:, at] = (changed[:, at] + 1) % 256
        difference = (model(changed).logits - whole).abs().amax(-1)[0]
        assert difference[:at].max() == 0 if at else True
        assert difference[at:].max() > 1e-3


@each_kind
def test_dense_attention_teaches_every_kind(overrides):
    model, x = tiny_model(**overrides).train(), tokens()
    loss = model(x, labels=x, far_attention="dense").span_loss
    assert float(loss) > 0
    weight = model.model.layers[1].mixer.k_proj.weight
    with_loss = torch.autograd.grad(model(x, labels=x, far_attention="dense").loss, weight)[0]
    model.config.span_loss_weight = 0.0
    without = torch.autograd.grad(model(x, labels=x, far_attention="dense").loss, weight)[0]
    assert (with_loss - without).abs().max() > 0


def test_a_score_by_bounds_is_the_most_that_a_key_between_them_could_reach():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 7, 4, 2, 3, generator=generator, dtype=torch.float64)
    q = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    marks = block_landmarks(keys, None, 0, "bounds")
    scores = torch.cat([q.clamp(min=0), q.clamp(max=0)], dim=-1) @ marks.transpose(1, 2)
    low, high = keys.flatten(3).amin(2), keys.flatten(3).amax(2)
    most = torch.maximum(q[:, :, None] * low[:, None], q[:, :, None] * high[:, None]).sum(-1)
    assert (scores - most).abs().max() < 1e-12
    reached = torch.einsum("brc,bnsc->brns", q, keys.flatten(3)).amax(-1)
    assert (scores - reached).min() > -1e-12


@pytest.mark.parametrize("k", [1, 3, 9])
def test_the_best_of_several_queries_is_that_of_all_scores_together(k):
    generator = torch.Generator().manual_seed(k)
    # few values, so that there are ties
    q = torch.randint(-2, 3, (2, 4 * 5, 3), generator=generator).float()
    marks = torch.randint(-2, 3, (2, 11, 3), generator=generator).float()
    visible = torch.tensor([0, 2, 7, 11])
    ids, scores = best_of_queries(*select_blocks(q, marks, visible.repeat_interleave(5), k), 5, k)
    best = (q @ marks.transpose(1, 2)).unflatten(1, (4, 5)).amax(2)
    for row in range(2):
        for group in range(4):
            order = sorted(range(int(visible[group])), key=lambda b: (-float(best[row, group, b]), -b))[:k]
            kept = [i for i in ids[row, group].tolist() if i >= 0]
            assert kept == sorted(order)
            assert scores[row, group, : len(kept)].tolist() == [float(best[row, group, b]) for b in kept]
            assert bool((ids[row, group, len(kept) :] == -1).all())


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ({"landmark_kind": "median"}, "landmark_kind"),
        ({"query_kind": "min"}, "query_kind"),
        ({"recency_share": 0.4}, "recency_share"),
        ({"recency_share": 1.0, "landmark_keys": 2}, "recency_share"),
        ({"landmark_keys": 2, "query_kind": "max"}, "landmark_keys"),
    ],
)
def test_kinds_that_cannot_be_are_refused_by_name(overrides, word):
    with pytest.raises(ConfigError, match=word):
        tiny_config(**overrides)
