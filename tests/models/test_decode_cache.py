"""A token of several sessions read in one batch gives each what it would give alone."""

import pytest
import torch

from memtier.cache import TieredCache
from memtier.decode_cache import DecodeCache
from memtier.layers.host_selector import HostSpanSelector
from memtier.layers.records import flatten
from memtier.testing import tiny_model

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
    "odd-sizes": {"span_refresh_tokens": 6, "span_block_tokens": 5, "window_tokens": 13},
    "qk-norm": {"qk_norm": True},
    "no-convolution": {"kv_conv_size": 0},
    "bf16-store": {"storage_dtype": "bfloat16"},
    "landmark-keys": {"landmark_keys": 2, "num_key_value_heads": 2},
    "gated-deltanet": {"layer_types": ["gated_deltanet", "bmojo", "bmojo"], "fading": "gated_deltanet"},
    "predictor-convolution": {"innovation_predictor": "conv"},
}
HISTORIES = (1, 7, 34, 61, 150)
"""Tokens read before: less than a window, and more; boundaries fall at different steps."""


def begun(model, history, seed):
    """A session's cache with something in it, and the tokens that it is given next."""
    x = torch.randint(0, 256, (1, history + 28), generator=torch.Generator().manual_seed(seed))
    cache = TieredCache(model.config, dtype=model.dtype, selector=HostSpanSelector())
    cache.mark(history + 9)
    model(x[:, :history], past_key_values=cache)
    return cache, x[0, history:].tolist()


def decode(model, caches, tokens):
    batch = DecodeCache(caches)
    logits = model(torch.tensor(tokens)[:, None], past_key_values=batch, logits_to_keep=1).logits[:, 0]
    batch.commit()
    return logits


def alone(model, cache, token):
    return model(torch.tensor([[token]]), past_key_values=cache).logits[0, 0]


def bytes_of(cache):
    return {name: tensor.clone() for name, tensor in cache.state_dict().items()}


def pointers(states):
    tensors = [tensor for state in states for _, tensor in flatten(state, numbers=False)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
@torch.inference_mode()
def test_rows_of_a_batch_give_what_they_give_alone(overrides):
    model = tiny_model(dtype=torch.float64, **overrides)
    rows = [begun(model, history, seed) for seed, history in enumerate(HISTORIES)]
    plain = [begun(model, history, seed) for seed, history in enumerate(HISTORIES)]
    sizes = set()
    for step in range(28):
        # rows join and leave; each stands somewhere else, and what it chooses it chooses alone
        here = [i for i in range(len(rows)) if (step + i) % 7]
        together = [i for i in here if not rows[i][0].chooses_next]
        sizes.add(len(together))
        seen = {i: alone(model, rows[i][0], rows[i][1][step]) for i in here if i not in together}
        if together:
            logits = decode(model, [rows[i][0] for i in together], [rows[i][1][step] for i in together])
            seen.update(zip(together, logits, strict=True))
        for i in here:
            wanted = alone(model, plain[i][0], plain[i][1][step])
            assert (seen[i] - wanted).abs().max() < 1e-9, f"row {i} at step {step}"
    assert {1, 2, 3} <= sizes
    for (one, _), (two, _) in zip(rows, plain, strict=True):
        assert one.position == two.position
        assert one.boundary == two.boundary
        wanted = bytes_of(two)
        for name, tensor in bytes_of(one).items():
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def model():
    return tiny_model(dtype=torch.float64)


@torch.inference_mode()
def three(model):
    rows = [begun(model, 61, seed) for seed in range(3)]
    return [cache for cache, _ in rows], [tokens for _, tokens in rows]


@torch.inference_mode()
def test_states_stay_stacked_while_the_same_sessions_go_on(model):
    caches, _ = three(model)
    decode(model, caches, [1, 2, 3])
    stacked = caches[0].held[0]
    assert all(cache.held[0] is stacked for cache in caches)
    assert DecodeCache(caches).states is stacked
    assert DecodeCache(caches[:2]).states is not stacked
    assert DecodeCache(caches[::-1]).states is not stacked


@torch.inference_mode()
def test_a_row_that_is_looked_at_owns_its_memory_and_leaves_the_batch(model):
    caches, _ = three(model)
    own = [cache.device_bytes() for cache in caches]
    decode(model, caches, [1, 2, 3])
    shared = pointers(caches[0].held[0])
    assert [cache.device_bytes() for cache in caches] == own
    looked = caches[1].states
    assert caches[1].held == (looked, None)
    assert not shared & pointers(looked)
    assert [cache.device_bytes() for cache in caches] == own


@torch.inference_mode()
def test_a_step_that_is_not_committed_leaves_every_row_as_it_was(model):
    caches, _ = three(model)
    decode(model, caches, [1, 2, 3])
    before = [bytes_of(cache) for cache in caches]
    model(torch.tensor([[4], [5], [6]]), past_key_values=DecodeCache(caches), logits_to_keep=1)
    for cache, held in zip(caches, before, strict=True):
        after = bytes_of(cache)
        assert all(torch.equal(tensor, after[name]) for name, tensor in held.items())


@torch.inference_mode()
def test_what_a_token_brings_besides_itself_is_told_beforehand(model):
    cache, tokens = begun(model, 61, 0)
    told = []
    for token in tokens[:12]:
        told.append(cache.chooses_next)
        alone(model, cache, token)
    # boundaries every 4 tokens from 64 on, and a mark at 70, from which they count anew
    assert [61 + i for i, chooses in enumerate(told) if chooses] == [64, 68, 70]
