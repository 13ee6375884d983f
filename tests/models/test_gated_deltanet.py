"""Gated DeltaNet: chunks are the recurrence, the layer is transformers', and it goes on from a carried state."""

import pytest
import torch
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextGatedDeltaNet,
    torch_recurrent_gated_delta_rule,
)

from memtier.layers.gated_deltanet import GatedDeltaNet, gated_delta_rule, gated_delta_rule_recurrent

E = 24


def rule_inputs(tokens, dtype=torch.float64, groups=2, heads=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(2, tokens, *shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = normal(groups, 6), normal(groups, 6), normal(heads, 5)
    return q, k, v, -normal(heads).exp(), normal(heads).sigmoid()


@pytest.mark.parametrize("tokens", [1, 7, 16, 33])
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
def test_the_chunked_form_is_the_recurrence_with_every_gradient(tokens, carried):
    results = []
    for form in (gated_delta_rule_recurrent, lambda *x, state: gated_delta_rule(*x, state=state, chunk_tokens=8)):
        inputs = [x.requires_grad_() for x in rule_inputs(tokens)]
        generator = torch.Generator().manual_seed(9)
        state = torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64).requires_grad_() if carried else None
        y, last, log_decay = form(*inputs, state=state)
        weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        ((y * weights).sum() + last.square().sum()).backward()
        gradients = [x.grad for x in inputs] + ([state.grad] if state is not None else [])
        results.append([y, last, log_decay, *gradients])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-10


def test_long_slow_and_fast_decays_stay_finite_and_exact():
    q, k, v, decay, beta = rule_inputs(64)
    decay = torch.cat([decay[:, :20] * 60, decay[:, 20:40] * 1e-4, decay[:, 40:]], dim=1).requires_grad_()
    chunked, _, _ = gated_delta_rule(q, k, v, decay, beta, chunk_tokens=32)
    plain, _, _ = gated_delta_rule_recurrent(q, k, v, decay, beta)
    assert (chunked - plain).abs().max() < 1e-10
    (gradient,) = torch.autograd.grad(chunked.sum(), decay)
    assert bool(gradient.isfinite().all())


def test_the_rule_is_transformers_rule():
    q, k, v, decay, beta = rule_inputs(29, torch.float32)
    mine, state, _ = gated_delta_rule(q, k, v, decay, beta, chunk_tokens=8)
    theirs, last = torch_recurrent_gated_delta_rule(
        q, k, v, decay, beta, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    # theirs lies key by value
    torch.testing.assert_close(state, last.transpose(-1, -2), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_with_the_same_weights_the_layer_is_transformers_layer():
    config = Qwen3NextConfig(
        hidden_size=E, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=6,
        linear_value_head_dim=12, linear_conv_kernel_dim=4, num_hidden_layers=1, layer_types=["linear_attention"],
        hidden_act="silu", rms_norm_eps=1e-6,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = Qwen3NextGatedDeltaNet(config, 0).eval()
    mine = GatedDeltaNet(E, expand=2, head_dim=12, state_size=6, groups=2, conv_size=4, chunk_tokens=16, eps=1e-6)
    mine.load_state_dict(theirs.state_dict())
    h = torch.randn(2, 45, E)
    torch.testing.assert_close(mine.eval()(h, None)[0], theirs(h), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cuts", [[1, 2, 3], [17], list(range(1, 45))], ids=["few", "two", "each"])
@torch.inference_mode()
def test_any_split_goes_on_from_the_carried_state(cuts):
    torch.manual_seed(1)
    layer = GatedDeltaNet(E, expand=1, head_dim=6, state_size=5, groups=2, conv_size=4, chunk_tokens=8, eps=1e-6)
    layer, h = layer.double().eval(), torch.randn(2, 45, E, dtype=torch.float64)
    whole, last = layer(h, None)
    state, parts = layer.empty_state(2, h.device, h.dtype), []
    for start, end in zip([0, *cuts], [*cuts, 45], strict=True):
        part, state = layer(h[:, start:end], state)
        parts.append(part)
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-12
    assert (state.ssm - last.ssm).abs().max() < 1e-12
    assert (state.conv - last.conv).abs().max() < 1e-12
