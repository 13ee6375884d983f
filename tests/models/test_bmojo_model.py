"""B'MOJO as a Hugging Face citizen: auto classes, files, generate, training."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from memtier.cache import TieredCache
from memtier.errors import ConfigError, ModelError
from memtier.models.bmojo import BMojoConfig, BMojoForCausalLM
from memtier.testing import tiny_config, tiny_model


def tokens(batch=2, count=90, seed=0):
    return torch.randint(0, 256, (batch, count), generator=torch.Generator().manual_seed(seed))


def test_a_saved_model_comes_back_through_the_auto_classes(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BMojoConfig)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, BMojoForCausalLM)
    assert (tmp_path / "model.safetensors").exists()
    with torch.inference_mode():
        torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits)


@torch.inference_mode()
def test_generate_with_a_tiered_cache_is_the_greedy_walk():
    model, x = tiny_model(), tokens(1, 50)
    walked = x
    for _ in range(20):
        walked = torch.cat([walked, model(walked).logits[:, -1:].argmax(-1)], dim=1)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(x, **options), walked)
    cache = TieredCache(model.config)
    assert torch.equal(model.generate(x, past_key_values=cache, **options), walked)
    assert cache.position == 69


@torch.inference_mode()
def test_beam_search_reorders_every_memory():
    model, x = tiny_model(dtype=torch.float64), tokens(1, 50)
    options = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(x, **options), model.generate(x, use_cache=False, **options))


@pytest.mark.parametrize("far", ["span", "dense", "batch"])
def test_every_weight_gets_a_gradient_and_checkpointing_changes_none(far):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(sink_tokens=2, qk_norm=True).train()
        if checkpointing:
            # the name of transformers >= 5.20, or the one before it
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        x = tokens()
        loss = model(x, labels=x, far_attention=far).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    missing = [name for name, grad in gradients[0].items() if grad is None or not bool(grad.abs().sum() > 0)]
    assert missing == []
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], msg=name)


@torch.inference_mode()
def test_blocks_of_the_whole_batch_compete_and_the_future_stays_hidden():
    model, x = tiny_model(dtype=torch.float64), tokens(3, 90)
    alone = [model(row[None], far_attention="batch").logits for row in x]
    torch.testing.assert_close(torch.cat(alone), model(x).logits)

    crowded = model(x, far_attention="batch").logits
    other, later = x.clone(), x.clone()
    other[1] = (other[1] + 7) % 256
    later[0, 60:] = (later[0, 60:] + 7) % 256
    assert not torch.equal(model(other, far_attention="batch").logits[0], crowded[0])
    torch.testing.assert_close(model(other).logits[0], model(x).logits[0])
    torch.testing.assert_close(model(later, far_attention="batch").logits[0, :60], crowded[0, :60])


@torch.inference_mode()
def test_the_newest_blocks_of_a_batch_are_those_of_the_own_sequence():
    # at a share that hardly anything reaches
    sizes = {"landmark_keys": 2, "span_blocks": 1}
    model, x = tiny_model(recency_share=0.999, dtype=torch.float64, **sizes), tokens(3, 90)
    alone = torch.cat([model(row[None], far_attention="span").logits for row in x])
    torch.testing.assert_close(model(x, far_attention="batch").logits, alone)
    model.config.recency_share = 0.0
    assert not torch.allclose(model(x, far_attention="batch").logits, alone)


@torch.inference_mode()
def test_blocks_of_the_batch_are_chosen_as_if_they_were_of_one_store():
    # all of K blocks fit: what is read is every sealed block of the others, whichever row they are of
    model, x = tiny_model(dtype=torch.float64, span_blocks=64, far_positions="none"), tokens(3, 90)
    crowded = model(x, far_attention="batch").logits
    turned = model(x[[0, 2, 1]], far_attention="batch").logits
    torch.testing.assert_close(turned[0], crowded[0])


def test_blocks_of_other_sequences_need_positions_of_their_own():
    model, x = tiny_model(far_positions="true", rope_theta=1e4), tokens()
    with pytest.raises(ModelError, match="compact"):
        model(x, far_attention="batch")


def test_dense_far_attention_teaches_landmarks():
    model, x = tiny_model().train(), tokens()
    out = model(x, labels=x, far_attention="dense")
    assert out.span_loss is not None
    assert float(out.span_loss) > 0
    assert model(x, labels=x).span_loss is None
    weight = model.model.layers[1].mixer.k_proj.weight
    with_loss = torch.autograd.grad(out.loss, weight)[0]
    model.config.span_loss_weight = 0.0
    without = torch.autograd.grad(model(x, labels=x, far_attention="dense").loss, weight)[0]
    assert (with_loss - without).abs().max() > 0


def test_loss_weights_choose_what_counts():
    model, x = tiny_model(innovation_loss_weight=0.0), tokens()
    weights = torch.zeros(x.shape)
    weights[:, 40] = 1.0
    loss = model(x, labels=x, loss_weights=weights).loss
    logits = model(x).logits[:, 39].float()
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, x[:, 40]))


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ({"layer_types": ["bmojo"]}, "layer_types"),
        ({"layer_types": ["bmojo", "bmojo", "mamba3"]}, "layer_types"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_key_value_heads"),
        ({"window_tokens": 0}, "window_tokens"),
        ({"eidetic_tokens": -1}, "eidetic_tokens"),
        ({"sink_tokens": 99}, "sink_tokens"),
        ({"memory_layers": [0]}, "memory_layers"),
        ({"memory_layers": [2, 1]}, "memory_layers"),
        ({"far_positions": "near"}, "far_positions"),
        ({"storage_dtype": "int8"}, "storage_dtype"),
        ({"ssm_head_dim": 7}, "ssm_head_dim"),
        ({"fading": "mamba3"}, "fading"),
        ({"head_dim": 7}, "head_dim"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused_by_name(overrides, word):
    with pytest.raises(ConfigError, match=word):
        tiny_config(**overrides)
