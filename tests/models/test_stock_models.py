"""Stock transformers models read with memory: equal to themselves inside the window, to a dense formula beyond it."""

import pytest
import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM

from memtier.blocks import MemorySettings
from memtier.cache import TieredCache
from memtier.errors import ConfigError, ModelError
from memtier.layers.attention import reach
from memtier.layers.host_selector import HostSpanSelector
from memtier.models.stock import StockReader

W, S, R, K, SINKS = 24, 4, 4, 3, 2
TRAINED = 64
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": TRAINED, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [4.0] * 4,
            "original_max_position_embeddings": TRAINED}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
MODELS = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-sliding": ("Mistral", {"sliding_window": 10}),
    "qwen2-alternating": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 10, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "granite": ("Granite", {"attention_multiplier": 0.2, "logits_scaling": 2.0}),
    "phi-partial": ("Phi", {"partial_rotary_factor": 0.5}),
    "smollm3-some-unrotated": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "mixtral": ("Mixtral", {"sliding_window": None, "num_local_experts": 2}),
    "olmo2": ("Olmo2", {}),
    "one-kv-head": ("Llama", {"num_key_value_heads": 1}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}}),
    "llama3": ("Llama", {"rope_parameters": {**LLAMA3, "rope_theta": 100.0}}),
    "yarn": ("Llama", {"rope_parameters": {**YARN, "rope_theta": 100.0}}),
    "dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}}),
    "longrope": ("Llama", {"rope_parameters": {**LONGROPE, "rope_theta": 100.0}}),
}


def make_model(name="Llama", dtype=torch.float32, seed=0, **overrides):
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            # biases and norms away from 0 and 1, where a mistake would not show
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return torch.nn.Module.to(model, dtype).eval()


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    name, overrides = MODELS[request.param]
    return make_model(name, **overrides)


def settings(reader, **overrides):
    able = tuple(i for i, w in enumerate(reader.layout.local_tokens) if w is None)
    sizes = {
        "window_tokens": W, "sink_tokens": SINKS, "eidetic_tokens": 0, "span_block_tokens": S,
        "span_refresh_tokens": R, "span_blocks": K, "memory_layers": able, "far_positions": "compact",
        "storage_dtype": "float64",
    }  # fmt: skip
    return MemorySettings(**{**sizes, **overrides})


def tokens(count, seed=0, rows=1):
    return torch.randint(1, 64, (rows, count), generator=torch.Generator().manual_seed(seed))


def read(reader, x, pieces, **options):
    """Logits of x (B, T), read in pieces of the given sizes."""
    cache = TieredCache(
        reader.layout, settings=settings(reader, **options), batch_size=x.shape[0], dtype=reader.layout.dtype
    )
    return torch.cat([reader(piece, cache).logits for piece in x.split(pieces, dim=1)], dim=1), cache


@pytest.mark.parametrize("pieces", [[W], [7, 1, 16], [1] * W], ids=["prefill", "split", "token by token"])
@torch.no_grad()
def test_inside_the_window_the_logits_are_those_of_transformers(model, pieces):
    x = tokens(W, rows=2)
    wanted = model(x, use_cache=False).logits
    got, _ = read(StockReader(model), x, pieces)
    assert (got - wanted).abs().max() < 1e-4 * max(1.0, float(wanted.abs().max()))


# beyond the window: one softmax over sinks, span and window, written out query by query


def turned(x, position, rotary):
    """x (..., D) as the model's own rotary module turns it at a position, but for its factor."""
    cos, sin = (
        (t / rotary.attention_scaling)[0, 0].to(x.dtype) for t in rotary(torch.zeros(1), torch.tensor([[position]]))
    )
    size = cos.shape[-1]
    part, rest = x[..., :size], x[..., size:]
    left, right = part.chunk(2, dim=-1)
    return torch.cat([part * cos + torch.cat([-right, left], dim=-1) * sin, rest], dim=-1)


def dense_attention(rotary, memory_layers):
    def attention(module, query, key, value, mask, scaling=None, sliding_window=None, **_):
        assert mask is None
        q, k, v = query[0], key[0], value[0]
        groups = q.shape[0] // k.shape[0]
        rotated = getattr(module, "use_rope", True)
        remembers = module.layer_idx in memory_layers
        far = SINKS + (K * S if remembers else 0)

        def turn(x, position):
            assert 0 <= position < TRAINED, "no position exceeds the trained context"
            return turned(x, position, rotary) if rotated else x

        out = torch.zeros_like(q)
        for i in range(q.shape[1]):
            boundary = i // R * R
            low = max(0, boundary - W + 1) // S * S
            seen = [(j, j - low + far) for j in range(low, i + 1)]
            if sliding_window is not None:
                seen = [(j, place) for j, place in seen if j > i - sliding_window]
            else:
                seen += [(j, j) for j in range(min(SINKS, low))]
            if remembers and low:
                asked = q[:, max(0, boundary - R + 1) : boundary + 1].sum(1).unflatten(0, (-1, groups)).sum(1)
                score = (k[:, :low].unflatten(1, (-1, S)).mean(2) * asked[:, None]).sum((0, 2))
                chosen = sorted(score.topk(min(K, score.numel())).indices.tolist())
                seen += [
                    (b * S + o, SINKS + n * S + o) for n, b in enumerate(chosen) for o in range(S) if b * S + o >= SINKS
                ]
            at = [j for j, _ in seen]
            keys = torch.stack([turn(k[:, j], place) for j, place in seen], 1).repeat_interleave(groups, 0)
            weight = (keys * turn(q[:, i], i - low + far)[:, None]).sum(-1).mul(scaling).softmax(-1)
            out[:, i] = (weight[..., None] * v[:, at].repeat_interleave(groups, 0)).sum(1)
        return out.transpose(0, 1)[None], None

    return attention


@torch.no_grad()
def test_beyond_the_window_the_logits_are_those_of_the_dense_formula(model):
    x = tokens(90, seed=1)
    reader = StockReader(model)
    used = settings(reader)
    assert reach(used) <= TRAINED
    got, _ = read(reader, x, [5, 40, 1, 1, 30, 13])
    rotary = next(m for m in model.modules() if hasattr(m, "rope_type"))
    AttentionInterface.register("dense-formula-of-a-test", dense_attention(rotary, used.memory_layers))
    before = model.config._attn_implementation
    model.set_attn_implementation("dense-formula-of-a-test")
    try:
        wanted = model(x, position_ids=torch.zeros_like(x), use_cache=False).logits
    finally:
        model.set_attn_implementation(before)
    assert (got - wanted).abs().max() < 1e-4 * max(1.0, float(wanted.abs().max()))


@torch.no_grad()
def test_any_split_gives_the_same_logits():
    reader = StockReader(make_model(dtype=torch.float64))
    x = tokens(120, rows=2)
    whole, _ = read(reader, x, [120])
    for pieces in ([1] * 120, [50, 3, 67], [31, 32, 57]):
        # not 1e-9: the norms of a Llama compute in float32 whatever the model's dtype
        assert (read(reader, x, pieces)[0] - whole).abs().max() < 1e-6


@torch.no_grad()
def test_the_span_changes_what_is_read_and_a_later_token_nothing_before_it():
    reader = StockReader(make_model(dtype=torch.float64))
    x = tokens(120)
    on, cache = read(reader, x, [120])
    off, _ = read(reader, x, [120], span_blocks=0)
    assert torch.equal(on[:, :W], off[:, :W])
    assert (on[:, -20:] - off[:, -20:]).abs().max() > 1e-3
    assert [s.layer for s in cache.last_selection()] == [0, 1]
    assert all(abs(sum(mass.values()) - 1) < 1e-9 and mass["span"] > 0 for mass in cache.attention_mass().values())
    other = x.clone()
    other[:, 100] = (other[:, 100] + 1) % 64
    assert torch.equal(read(reader, other, [120])[0][:, :100], on[:, :100])


@torch.no_grad()
def test_a_saved_state_goes_on_with_equal_logits_in_constant_memory():
    reader = StockReader(make_model())
    x, selector = tokens(400, seed=3), HostSpanSelector()
    used = settings(reader, storage_dtype="float16")
    cache = TieredCache(reader.layout, settings=used, selector=selector)
    reader(x[:, :150], cache)
    held = cache.device_bytes()
    saved = {name: value.clone() for name, value in cache.state_dict().items()}
    blocks = cache.take_sealed()
    assert [b.index for b in blocks] == list(range(len(blocks)))
    on = reader(x[:, 150:], cache).logits
    assert cache.device_bytes() == held
    # in a new process the blocks come from the store
    restored = HostSpanSelector()
    for layer in range(2):
        keys, values, marks = (
            torch.stack([getattr(b, name)[layer] for b in blocks])[None] for name in ("keys", "values", "landmarks")
        )
        restored.append(layer, 0, keys, values, marks)
    again = TieredCache(reader.layout, settings=used, selector=restored)
    again.load_state_dict(saved)
    assert torch.equal(reader(x[:, 150:], again).logits, on)


@torch.no_grad()
def test_the_model_is_as_it_was_between_two_steps():
    model = make_model()
    x = tokens(20)
    wanted = model(x).logits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementation, mode = model.config._attn_implementation, model.train().training
    reader = StockReader(model)
    assert model.training is mode
    read(reader, x, [20])
    assert model.config._attn_implementation == implementation
    assert torch.equal(model.eval()(x).logits, wanted)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi-partial", "smollm3-some-unrotated", "yarn", "linear"])
def test_a_model_in_16_bits_is_read_too(name, dtype):
    family, overrides = MODELS[name]
    reader = StockReader(make_model(family, dtype=dtype, **overrides))
    logits, cache = read(reader, tokens(60), [50, 1, 9], storage_dtype="bfloat16")
    assert logits.dtype == dtype
    assert cache.layer_state(0)["attention.keys"].dtype == dtype


def tiny(name, **overrides):
    return AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**{**SIZES, **overrides})).eval()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tiny("GPT2", n_embd=32, n_head=4, n_layer=2), "learned positions"),
        (lambda: tiny("Bloom", n_head=4), "attention interface"),
        (lambda: tiny("Gemma2", head_dim=8), "softcap"),
        (lambda: tiny("Cohere"), "pairs the channels"),
        (lambda: tiny("Gemma3Text", head_dim=8), "rotary positions of kind"),
        (lambda: make_model("HunYuanDenseV1", head_dim=8), "gives other logits"),
        (lambda: make_model("HunYuanDenseV1", head_dim=8, dtype=torch.bfloat16), "gives other logits"),
        (lambda: make_model("HunYuanDenseV1", head_dim=8, dtype=torch.float16), "gives other logits"),
        (lambda: tiny("Qwen2", layer_types=["chunked_attention", "full_attention"]), "chunked_attention"),
        (lambda: tiny("Mamba", state_size=4), "attention interface"),
    ],
    ids=["learned", "alibi", "softcap", "interleaved", "a rotary for each layer type", "a norm after it",
         "a norm after it, bfloat16", "a norm after it, float16", "chunked",
         "recurrent"],
)  # fmt: skip
def test_what_cannot_be_read_rightly_is_refused_with_its_reason(make, reason):
    with pytest.raises(ConfigError, match=reason):
        StockReader(make())


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"window_tokens": 60}, "distances up to 64"),
        ({"eidetic_tokens": 4}, "no fading memory"),
        ({"far_positions": "true"}, "must see no others"),
        ({"far_positions": "none"}, "must see no others"),
    ],
)
def test_sizes_that_the_model_was_not_trained_for_are_refused(overrides, reason):
    reader = StockReader(make_model())
    with pytest.raises(ConfigError, match=reason):
        read(reader, tokens(4), [4], **overrides)


def test_a_span_in_a_layer_with_a_small_sliding_window_is_refused():
    reader = StockReader(make_model("Mistral", sliding_window=10))
    assert reader.layout.memory_settings().memory_layers == ()
    with pytest.raises(ConfigError, match="sliding window of 10"):
        read(reader, tokens(4), [4], memory_layers=(0,))


@pytest.mark.parametrize("trained", [16, 100, 512, 4096, 131072])
def test_default_sizes_fit_the_trained_context(trained):
    layout = StockReader(make_model(max_position_embeddings=trained)).layout
    assert reach(layout.memory_settings()) <= trained
    layout.check(layout.memory_settings())


def test_the_attention_function_alone_is_refused():
    model = make_model(attn_implementation="memtier")
    with pytest.raises(ModelError, match="set_attn_implementation"):
        model(tokens(4))


def test_non_finite_weights_raise():
    model = make_model()
    reader = StockReader(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="non-finite"):
        read(reader, tokens(4), [4])
