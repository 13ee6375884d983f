"""Fading memories and rules of the eidetic choice: each causal, independent of the split, and what it says it is."""

import copy
import pickle

import pytest
import torch

from memtier.cache import TieredCache
from memtier.errors import ConfigError
from memtier.layers.bmojo import BMojoMixer
from memtier.layers.gated_deltanet import GatedDeltaNet
from memtier.layers.rules import EIDETIC_RULES, RuleByName, prediction_error
from memtier.models.bmojo import BMojoConfig
from memtier.testing import tiny_config, tiny_model

CHOICES = {
    **{rule: {"eidetic_rule": rule} for rule in EIDETIC_RULES if rule != "innovation"},
    "threshold-high": {"eidetic_rule": "threshold", "eidetic_threshold": 1.4},
    "conv-predictor": {"innovation_predictor": "conv"},
    "deltanet-fading": {"fading": "gated_deltanet"},
    "deltanet-layer": {"layer_types": ["gated_deltanet", "bmojo", "sliding_attention"]},
    "deltanet-groups": {"fading": "gated_deltanet", "ssm_groups": 2, "innovation_predictor": "conv"},
}
TOKENS = 100


def each_choice(function):
    return pytest.mark.parametrize("overrides", CHOICES.values(), ids=CHOICES)(function)


def tokens(batch=2, count=TOKENS, seed=0):
    return torch.randint(0, 256, (batch, count), generator=torch.Generator().manual_seed(seed))


@each_choice
@torch.inference_mode()
def test_any_split_gives_the_logits_of_the_whole(overrides):
    model, x = tiny_model(dtype=torch.float64, **overrides), tokens()
    whole = model(x, marks={37, 81}).logits
    for cuts in ([], [5, 6, 7, 50, 53, 90, 91, 92], list(range(1, TOKENS))):
        cache = TieredCache(model.config, dtype=torch.float64, batch_size=2)
        for mark in (37, 81):
            cache.mark(mark)
        parts = [
            model(x[:, a:b], past_key_values=cache).logits for a, b in zip([0, *cuts], [*cuts, TOKENS], strict=True)
        ]
        assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-9


@each_choice
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


@each_choice
@torch.inference_mode()
def test_a_saved_state_goes_on_exactly_and_keeps_its_size(overrides):
    model, x = tiny_model(dtype=torch.float64, **overrides), tokens(1)
    whole = model(x).logits
    cache = TieredCache(model.config, dtype=torch.float64)
    model(x[:, :70], past_key_values=cache)
    other = TieredCache(model.config, dtype=torch.float64, selector=cache.selector)
    other.load_state_dict({name: value.clone() for name, value in cache.state_dict().items()})
    size = other.device_bytes()
    rest = model(x[:, 70:], past_key_values=other).logits
    assert (rest - whole[:, 70:]).abs().max() < 1e-9
    assert other.device_bytes() == size


@pytest.mark.parametrize("overrides", [{"fading": "gated_deltanet"}, {"innovation_predictor": "conv"}], ids=str)
def test_every_weight_gets_a_gradient(overrides):
    model = tiny_model(**overrides).train()
    x = tokens()
    model(x, labels=x).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert missing == []


@torch.inference_mode()
def test_the_rules_keep_what_they_say():
    x, error = tokens(1), {}
    model = tiny_model()
    cache = TieredCache(model.config)
    for at in range(TOKENS):
        model(x[:, at : at + 1], past_key_values=cache)
        # the first layer with attention: what it reads does not depend on its own choice
        error[at] = float(cache.states[1].attention.innovation[0, -1])
    old = {p: e for p, e in error.items() if p < cache.window()[0]}

    def kept(rule, threshold=0.5):
        model = tiny_model(eidetic_rule=rule, eidetic_threshold=threshold)
        cache = TieredCache(model.config)
        model(x, past_key_values=cache)
        return set(cache.eidetic(1)[0].tolist())

    by_error = sorted(old, key=old.__getitem__)
    assert kept("innovation") == set(by_error[-6:])
    assert kept("lowest") == set(by_error[:6])
    assert kept("recent") == set(sorted(old)[-6:])
    middle = old[by_error[len(old) // 2]] - 1e-6
    assert kept("threshold", middle) == set(sorted(by_error[len(old) // 2 :])[-6:])
    assert kept("threshold", 99.0) == set()


def test_random_choices_differ_by_layer_and_row_and_are_spread_evenly():
    e, p = torch.zeros(4, 4000), torch.arange(4000).expand(4, -1)
    scores = [RuleByName("random", layer, 0.0)(e, p) for layer in (0, 1)]
    rows = [*scores[0], *scores[1]]
    for i, one in enumerate(rows):
        for other in rows[:i]:
            assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.08
        assert abs(float(one.mean()) / 2**24 - 0.5) < 0.02
        # not drawn to old or new positions
        assert abs(float(torch.corrcoef(torch.stack([one, p[0].float()]))[0, 1])) < 0.08


def test_the_cosine_rule_measures_the_angle_alone():
    h = torch.randn(2, 5, 8, dtype=torch.float64)
    assert prediction_error(h, 7 * h, "cosine").abs().max() < 1e-12
    assert (prediction_error(h, -h, "cosine") - 2).abs().max() < 1e-12
    assert prediction_error(h, 7 * h, "innovation").min() > 30


def test_a_mixer_can_be_copied_and_pickled():
    mixer = tiny_model(eidetic_rule="random").model.layers[1].mixer
    assert copy.deepcopy(mixer).rule == pickle.loads(pickle.dumps(mixer)).rule == mixer.rule


def test_a_saved_config_keeps_its_choices():
    chosen = {"eidetic_rule": "random", "innovation_predictor": "conv", "landmark_keys": 3, "query_kind": "mean"}
    again = BMojoConfig.from_dict(tiny_config(**chosen).to_dict())
    assert {name: getattr(again, name) for name in chosen} == chosen


def test_one_place_makes_every_mixer():
    config = tiny_config(layer_types=["gated_deltanet", "bmojo", "sliding_attention"], fading="gated_deltanet")
    kinds = [config.make_mixer(layer) for layer in range(3)]
    assert isinstance(kinds[0], GatedDeltaNet)
    assert isinstance(kinds[1], BMojoMixer) and isinstance(kinds[1].fading, GatedDeltaNet)
    assert isinstance(kinds[2], BMojoMixer) and kinds[2].fading is None


@pytest.mark.parametrize(
    ("overrides", "word"),
    [({"eidetic_rule": "eldest"}, "eidetic_rule"), ({"innovation_predictor": "mlp"}, "innovation_predictor")],
)
def test_an_unknown_choice_is_refused_by_name(overrides, word):
    with pytest.raises(ConfigError, match=word):
        tiny_config(**overrides)
