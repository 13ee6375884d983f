"""Recurrent layers with the heads of grouped attention: equal to their formulas, however they are cut."""

import pytest
import torch
import torch.nn.functional as F

from memtier.layers.grouped import GroupedGatedDeltaNet, GroupedMamba2

E, H, G, D, WIDTH = 20, 6, 2, 4, 4
SIZES = {"heads": H, "groups": G, "head_dim": D, "conv_size": WIDTH, "chunk_tokens": 5}


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def convolved(past, weight, bias=None):
    """silu of the newest output of a depthwise convolution over `past` (n, C)."""
    window = F.pad(past, (0, 0, WIDTH, 0))[-WIDTH:]
    out = (window * weight.squeeze(1).T).sum(0)
    return F.silu(out if bias is None else out + bias)


def mamba2_by_the_book(layer, h):
    """Dao and Gu 2024, one token and one head at a time; keys and values of head i are those of group i // (H / G)."""
    past, outputs, states = [], [], [torch.zeros(D, D, dtype=h.dtype) for _ in range(H)]
    for x_t in h:
        z, x, B, C, dt = layer.in_proj(x_t).split([H * D, G * D, G * D, H * D, H])
        if layer.B_norm is not None:
            B = rms(B.view(G, D), layer.B_norm.weight, 1e-6).flatten()
            C = rms(C.view(H, D), layer.C_norm.weight, 1e-6).flatten()
        past.append(torch.cat([x, B, C]))
        x, B, C = convolved(torch.stack(past), layer.conv1d.weight, layer.conv1d.bias).split([G * D, G * D, H * D])
        heads = []
        for i in range(H):
            step = F.softplus(dt[i] + layer.dt_bias[i])
            group = slice(i // (H // G) * D, (i // (H // G) + 1) * D)
            own = slice(i * D, (i + 1) * D)
            states[i] = (-step * layer.A_log[i].exp()).exp() * states[i] + step * torch.outer(x[group], B[group])
            y = states[i] @ C[own] + layer.D[i] * x[group]
            heads.append(rms(y * F.silu(z[own]), layer.norm.weight[own], 1e-5))
        outputs.append(layer.out_proj(torch.cat(heads)))
    return torch.stack(outputs)


def deltanet_by_the_book(layer, h):
    """Yang et al. 2024, likewise."""
    past, outputs, states = [], [], [torch.zeros(D, D, dtype=h.dtype) for _ in range(H)]
    weight = torch.cat([c.weight for c in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d)])
    for x_t in h:
        past.append(torch.cat([layer.q_proj(x_t), layer.k_proj(x_t), layer.v_proj(x_t)]))
        q, k, v = convolved(torch.stack(past), weight).split([H * D, G * D, G * D])
        beta, step, gate = (
            layer.b_proj(x_t).sigmoid(),
            F.softplus(layer.gk_proj(x_t) + layer.dt_bias),
            layer.g_proj(x_t),
        )
        heads = []
        for i in range(H):
            group = slice(i // (H // G) * D, (i // (H // G) + 1) * D)
            own = slice(i * D, (i + 1) * D)
            query, key = (x / (x.square().sum() + 1e-6).sqrt() for x in (q[own], k[group]))
            states[i] = (-layer.A_log[i].exp() * step[i]).exp() * states[i]
            states[i] = states[i] + beta[i] * torch.outer(v[group] - states[i] @ key, key)
            y = states[i] @ (query * D**-0.5)
            heads.append(rms(y, layer.o_norm.weight, 1e-5) * F.silu(gate[own]))
        outputs.append(layer.o_proj(torch.cat(heads)))
    return torch.stack(outputs)


LAYERS = {
    "mamba2": (lambda: GroupedMamba2(E, qk_norm=False, **SIZES), mamba2_by_the_book),
    "mamba2-normed": (lambda: GroupedMamba2(E, qk_norm=True, **SIZES), mamba2_by_the_book),
    "gated-deltanet": (lambda: GroupedGatedDeltaNet(E, **SIZES), deltanet_by_the_book),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    make, formula = LAYERS[request.param]
    torch.manual_seed(0)
    made = make().double()
    for parameter in made.parameters():
        # away from 0 and 1, where a mistake would not show
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made, formula


@torch.no_grad()
def test_a_layer_is_its_formula(layer):
    made, formula = layer
    h = torch.randn(2, 17, E, dtype=torch.float64)
    y, state = made(h, None)
    for row in range(2):
        assert (y[row] - formula(made, h[row])).abs().max() < 1e-10
    assert state.log_decay_tokens == 17 and (state.log_decay < 0).all()


@pytest.mark.parametrize("pieces", [[1] * 17, [2, 9, 1, 5]], ids=["token by token", "split"])
@torch.no_grad()
def test_a_layer_goes_on_from_its_state(layer, pieces):
    made, _ = layer
    h = torch.randn(2, 17, E, dtype=torch.float64)
    whole, end = made(h, None)
    state, parts = made.empty_state(2, h.device, h.dtype), []
    for piece in h.split(pieces, dim=1):
        part, state = made(piece, state)
        parts.append(part)
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-10
    assert (state.ssm - end.ssm).abs().max() < 1e-10
    assert (state.conv - end.conv).abs().max() < 1e-10
