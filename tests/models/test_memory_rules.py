"""The rules of memory: causal, independent of how the stream is split, constant on the device."""

import pytest
import torch

from memtier.cache import TieredCache
from memtier.layers.host_selector import HostSpanSelector
from memtier.layers.plan import make_plan
from memtier.testing import tiny_config, tiny_model

VARIANTS = {
    "all": {},
    "sinks": {"sink_tokens": 3},
    "far-none": {"far_positions": "none", "sink_tokens": 2},
    "far-true": {"far_positions": "true", "sink_tokens": 2},
    "no-rotary": {"rope_theta": None},
    "eidetic-only": {"memory_layers": []},
    "span-only": {"eidetic_tokens": 0},
    "fading-only": {"eidetic_tokens": 0, "memory_layers": []},
    "attention": {"fading": "none", "eidetic_tokens": 0},
    "mixed-layers": {"layer_types": ["mamba2", "bmojo", "sliding_attention"], "num_key_value_heads": 2},
    "refresh-1": {"span_refresh_tokens": 1},
    "odd-sizes": {"span_refresh_tokens": 6, "span_block_tokens": 5, "window_tokens": 13},
    "qk-norm": {"qk_norm": True},
    "no-convolution": {"kv_conv_size": 0},
    "bf16-store": {"storage_dtype": "bfloat16"},
    "landmark-keys": {"landmark_keys": 2, "num_key_value_heads": 2},
    "landmark-keys-no-innovation": {"landmark_keys": 4, "fading": "none", "eidetic_tokens": 0},
}
MARKS = {37, 81, 101}
TOKENS = 120
FAR = 250


def each_variant(function):
    return pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)(function)


def stream(model, x, cuts, *, dtype=torch.float64):
    cache = TieredCache(model.config, dtype=dtype, batch_size=x.shape[0])
    for mark in MARKS:
        cache.mark(mark)
    logits = [
        model(x[:, a:b], past_key_values=cache).logits for a, b in zip([0, *cuts], [*cuts, x.shape[1]], strict=True)
    ]
    return torch.cat(logits, dim=1), cache


def tokens(seed=0, batch=1, count=TOKENS):
    return torch.randint(0, 256, (batch, count), generator=torch.Generator().manual_seed(seed))


@each_variant
@torch.inference_mode()
def test_any_split_gives_the_logits_of_the_whole(overrides):
    model, x = tiny_model(dtype=torch.float64, **overrides), tokens(batch=2)
    whole = model(x, marks=MARKS).logits
    for cuts in ([], [5, 6, 7, 50, 53, 90, 91, 92, 110], list(range(1, TOKENS))):
        logits, _ = stream(model, x, cuts)
        assert (logits - whole).abs().max() < 1e-9


@each_variant
@torch.inference_mode()
def test_no_output_depends_on_a_later_token_and_later_ones_do(overrides):
    model, x = tiny_model(dtype=torch.float64, **overrides), tokens()
    whole = model(x, marks=MARKS).logits
    for at in (0, 40, 99, 100):
        changed = x.clone()
        changed[:, at] = (changed[:, at] + 1) % 256
        difference = (model(changed, marks=MARKS).logits - whole).abs().amax(-1)[0]
        assert difference[:at].max() == 0 if at else True
        assert difference[at:].max() > 1e-3


class NotingSelector(HostSpanSelector):
    """Notes what was chosen at every boundary."""

    def __init__(self):
        super().__init__()
        self.noted = {}

    def select(self, layer, queries, boundaries, visible, k):
        ids, scores = super().select(layer, queries, boundaries, visible, k)
        for row, boundary in enumerate(boundaries.tolist()):
            if visible[row]:
                self.noted[layer, boundary] = ids[0, row].tolist(), scores[0, row]
        return ids, scores


@pytest.mark.parametrize("seed", range(4))
@torch.inference_mode()
def test_float32_splits_agree_and_selections_differ_only_where_scores_tie(seed):
    model, x = tiny_model(seed), tokens(seed, count=FAR)
    runs = []
    for cuts in ([], [5, 6, 7, 50, 53, 90, 91, 92, 130, 200], list(range(1, FAR))):
        selector = NotingSelector()
        cache = TieredCache(model.config, selector=selector)
        logits = [model(x[:, a:b], past_key_values=cache).logits for a, b in zip([0, *cuts], [*cuts, FAR], strict=True)]
        runs.append((torch.cat(logits, dim=1), selector.noted))
    (whole, chosen), *others = runs
    for logits, noted in others:
        assert noted.keys() == chosen.keys()
        differing = sorted((at, layer) for layer, at in chosen if noted[layer, at][0] != chosen[layer, at][0])
        for at, layer in differing:
            torch.testing.assert_close(noted[layer, at][1], chosen[layer, at][1], rtol=1e-5, atol=0)
        assert len(differing) <= 2, f"{len(differing)} of {len(chosen)} selections differ"
        agreed = differing[0][0] if differing else FAR
        assert (logits - whole)[:, :agreed].abs().max() <= 1e-4 * whole.abs().max()


@each_variant
@torch.inference_mode()
def test_device_bytes_do_not_grow_and_do_not_depend_on_the_split(overrides):
    model, x = tiny_model(**overrides), tokens(count=400)
    sizes = set()
    for cuts in ([], [64, 65, 66, 140], list(range(1, 90))):
        _, cache = stream(model, x[:, :150], cuts, dtype=torch.float32)
        sizes.add(cache.device_bytes())
        for start in range(150, 400, 50):
            model(x[:, start : start + 50], past_key_values=cache)
            sizes.add(cache.device_bytes())
    assert len(sizes) == 1


@torch.inference_mode()
def test_device_bytes_are_equal_at_10k_and_at_200k_tokens():
    sizes = {"window_tokens": 64, "span_block_tokens": 64, "span_refresh_tokens": 64, "memory_layers": [1]}
    model, x = tiny_model(num_hidden_layers=2, layer_types=["mamba2", "bmojo"], **sizes), tokens(count=512)
    cache, seen = TieredCache(model.config), {}
    for position in range(512, 200_193, 512):
        model(x, past_key_values=cache, logits_to_keep=1)
        seen[position] = cache.device_bytes()
    assert cache.position >= 200_000
    assert set(seen.values()) == {seen[10_240]}


@torch.inference_mode()
def test_every_past_position_is_in_the_window_or_in_exactly_one_sealed_block():
    settings = tiny_config(window_tokens=13, span_block_tokens=5, span_refresh_tokens=6).memory_settings()
    boundary, sealed = -1, 0
    for start, count in [(0, 1), (1, 30), (31, 1), (32, 64), (96, 7)]:
        plan = make_plan(settings, start, count, {40, 41}, boundary, torch.device("cpu"))
        assert plan.sealed_from == sealed
        for t in range(count):
            lo = int(plan.lo_token[t])
            # blocks before lo are whole and visible at the group's boundary, and the window still holds W tokens of it
            assert lo % 5 == 0
            assert plan.visible[plan.group[t]] * 5 == lo
            assert start + t - lo + 1 <= settings.ring_tokens
            assert lo <= max(0, plan.boundaries[plan.group[t]] - 13 + 1)
        boundary, sealed = plan.boundaries[-1], plan.sealed_to


@torch.inference_mode()
def test_a_mark_refreshes_the_span_at_its_token():
    model, x = tiny_model(dtype=torch.float64), tokens()
    plain = model(x).logits
    changed = []
    for mark in (61, 73, 101, 114):
        difference = (plain - model(x, marks={mark}).logits).abs().amax(-1)[0]
        assert difference[:mark].max() == 0
        changed.append(float(difference[mark]) > 0)
    # a new query may choose the blocks that were there already, but not every time
    assert any(changed)


def test_what_is_chosen_at_a_mark_serves_as_many_tokens_as_any_other_choice():
    settings, device = tiny_config(span_refresh_tokens=4).memory_settings(), torch.device("cpu")
    whole = make_plan(settings, 0, 20, {6, 7, 13}, -1, device).boundaries
    assert whole == (0, 4, 6, 7, 11, 13, 17)
    boundary, seen = -1, []
    for start in range(20):
        plan = make_plan(settings, start, 1, {6, 7, 13}, boundary, device)
        boundary = plan.boundaries[-1]
        seen += [] if plan.carried else [boundary]
    assert tuple(seen) == whole
