"""What the B'MOJO layer becomes when memories are left out: exactly the layers it generalises.

Weights move by `load_state_dict` alone: the modules have the names of transformers' own.
"""

import pytest
import torch
from transformers import LlamaConfig, Mamba2Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from memtier.layers.bmojo import BMojoMixer
from memtier.layers.mamba2 import Mamba2
from memtier.layers.plan import make_plan
from memtier.layers.rotary import apply_rotary, rotary_table
from memtier.models.bmojo import BMojoConfig, BMojoForCausalLM

B, T, E, H, D = 2, 70, 32, 4, 8
THETA = 5_000.0


def bmojo_config(**overrides):
    sizes = {
        "hidden_size": E, "num_hidden_layers": 1, "layer_types": ["sliding_attention"], "num_attention_heads": H,
        "num_key_value_heads": 2, "head_dim": D, "intermediate_size": 48, "window_tokens": T, "eidetic_tokens": 0,
        "memory_layers": [], "rope_theta": THETA, "kv_conv_size": 0, "ssm_head_dim": 16, "ssm_state_size": 16,
        "ssm_chunk_size": 16,
    }  # fmt: skip
    return BMojoConfig(**{**sizes, **overrides})


def llama_config(kv_heads=2):
    return LlamaConfig(
        hidden_size=E, num_attention_heads=H, num_key_value_heads=kv_heads, head_dim=D, intermediate_size=48,
        max_position_embeddings=4 * T, num_hidden_layers=1, attn_implementation="eager", rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )  # fmt: skip


def mamba_config():
    return Mamba2Config(
        hidden_size=E, num_heads=4, head_dim=16, state_size=16, expand=2, n_groups=1, chunk_size=16, conv_kernel=4,
        layer_norm_epsilon=1e-6,
    )  # fmt: skip


def causal_mask(tokens, window=None):
    i = torch.arange(tokens)
    hidden = i[None, :] > i[:, None]
    if window is not None:
        hidden |= i[None, :] <= i[:, None] - window
    return torch.zeros(tokens, tokens).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]


def inputs(seed=0, tokens=T):
    return torch.randn(B, tokens, E, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def make_mixer(config, weights, *, fading=False):
    mixer = BMojoMixer(config, 0, fading=fading).eval()
    mixer.load_state_dict(weights, strict=not fading)
    return mixer


def read(mixer, config, h):
    plan = make_plan(config.memory_settings(), 0, h.shape[1], (), -1, h.device)
    return mixer(h, plan, None, None)[0]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [T, 13])
@torch.no_grad()
def test_without_memories_it_is_llamas_attention(kv_heads, window):
    torch.manual_seed(1)
    theirs = LlamaAttention(llama_config(kv_heads), 0).eval()
    config = bmojo_config(num_key_value_heads=kv_heads, window_tokens=window)
    mine = make_mixer(config, theirs.state_dict())
    h = inputs()
    place = LlamaRotaryEmbedding(llama_config(kv_heads))(h, torch.arange(T)[None])
    wanted, _ = theirs(h, position_embeddings=place, attention_mask=causal_mask(T, window))
    torch.testing.assert_close(read(mine, config, h), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_without_attention_it_is_mamba2():
    torch.manual_seed(2)
    theirs = Mamba2Mixer(mamba_config(), 0).eval()
    mine = Mamba2(E, expand=2, head_dim=16, state_size=16, groups=1, conv_size=4, chunk_tokens=16, eps=1e-6).eval()
    mine.load_state_dict(theirs.state_dict())
    h = inputs(1)
    torch.testing.assert_close(mine(h, None)[0], theirs(h), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_layers_by_turns_are_a_jamba_style_hybrid():
    """Mamba-2 and attention layers by turns, each followed by a gated MLP: a residual stack of transformers' parts."""
    torch.manual_seed(3)
    config = bmojo_config(num_hidden_layers=4, layer_types=["mamba2", "sliding_attention"] * 2)
    model = BMojoForCausalLM(config).eval()
    x = torch.randint(0, 256, (B, T))
    stream = model.model.embed_tokens(x)
    place = LlamaRotaryEmbedding(llama_config())(stream, torch.arange(T)[None])
    for block in model.model.layers:
        weights = block.state_dict()
        shell = LlamaDecoderLayer(llama_config(), 0).eval()
        named = {"input_layernorm": "norm", "post_attention_layernorm": "mlp_norm", "mlp": "mlp"}
        for part, ours in named.items():
            found = {n.removeprefix(f"{ours}."): v for n, v in weights.items() if n.startswith(f"{ours}.")}
            if part == "mlp":
                found["gate_proj.weight"], found["up_proj.weight"] = found.pop("gate_up_proj.weight").chunk(2)
            getattr(shell, part).load_state_dict(found)
        mixer_weights = {n.removeprefix("mixer."): v for n, v in weights.items() if n.startswith("mixer.")}
        h = shell.input_layernorm(stream)
        if isinstance(block.mixer, Mamba2):
            mixer = Mamba2Mixer(mamba_config(), 0).eval()
            mixer.load_state_dict(mixer_weights)
            mixed = mixer(h)
        else:
            shell.self_attn.load_state_dict(mixer_weights)
            mixed, _ = shell.self_attn(h, position_embeddings=place, attention_mask=causal_mask(T))
        stream = stream + mixed
        stream = stream + shell.mlp(shell.post_attention_layernorm(stream))
    wanted = model.lm_head(model.model.norm(stream))
    torch.testing.assert_close(model(x).logits, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [5, 16, 40])
def test_window_and_fading_alone_are_b_mojo_f(window):
    """Query i sees window keys in [i-W+1, i] and fading keys in [i-2W+1, i-W], in one softmax, in one line of rotary
    positions (Zancato et al. 2024, and the public code of its authors)."""
    torch.manual_seed(4)
    config = bmojo_config(layer_types=["bmojo"], window_tokens=window, num_key_value_heads=2)
    mixer = BMojoMixer(config, 0, fading=True).double().eval()
    h = inputs(2).double()
    f, _ = mixer.fading(h, None)

    def heads(x, projection):
        return projection(x).unflatten(2, (-1, D))

    cos, sin = rotary_table(torch.arange(T), torch.float64, size=D, theta=THETA)
    q = apply_rotary(heads(h, mixer.q_proj), cos, sin)
    keys, fading_keys = (apply_rotary(heads(x, mixer.k_proj), cos, sin).repeat_interleave(2, 2) for x in (h, f))
    values, fading_values = (heads(x, mixer.v_proj).repeat_interleave(2, 2) for x in (h, f))
    i = torch.arange(T)
    age = i[:, None] - i[None, :]
    seen = torch.cat([(age >= 0) & (age < window), (age >= window) & (age < 2 * window)], dim=1)
    scores = torch.einsum("bihd,bjhd->bhij", q, torch.cat([keys, fading_keys], dim=1)) * D**-0.5
    shares = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", shares, torch.cat([values, fading_values], dim=1)).flatten(2)
    torch.testing.assert_close(read(mixer, config, h), mixer.o_proj(out))
