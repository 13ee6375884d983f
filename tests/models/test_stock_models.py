"""Stock transformers models read with memory: equal to themselves inside the window, to a dense formula beyond it."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

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
from memtier.models.stock.families import STOCK_FAMILIES, STOCK_SIZES, STOCK_TRAINED, tiny_stock_model

W, S, R, K, SINKS = 24, 4, 4, 3, 2
TRAINED = STOCK_TRAINED
FAMILIES = [
    pytest.param(name, marks=() if family.default else pytest.mark.slow) for name, family in STOCK_FAMILIES.items()
]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_stock_model(request.param)


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


def turned(x, places, module, rotary):
    """x (H, n, D) as the model's own functions turn it at places (n,), but for the model's factor."""
    kind = getattr(module.config, "layer_types", [None] * 99)[module.layer_idx]
    each = isinstance(rotary.rope_type, dict)
    prefix, options = (f"{kind}_", {"layer_type": kind}) if each else ("", {})
    factor, size = getattr(rotary, f"{prefix}attention_scaling"), 2 * getattr(rotary, f"{prefix}inv_freq").numel()
    cos, sin = (t / factor for t in rotary(x.new_zeros(1), places[None], **options))
    apply = sys.modules[type(module).__module__].apply_rotary_pos_emb
    part = apply(x[None, ..., :size], x[None, ..., :size], cos, sin)[0][0]
    return torch.cat([part, x[..., size:]], dim=-1)


def dense_attention(rotary, layout, memory_layers):
    def attention(module, query, key, value, mask, scaling=None, sliding_window=None, softcap=None, s_aux=None, **_):
        assert mask is None
        q, k, v = query[0], key[0], value[0]
        groups = q.shape[0] // k.shape[0]
        rotated = layout.rotaries[module.layer_idx] is not None
        remembers = module.layer_idx in memory_layers
        far = SINKS + (K * S if remembers else 0)

        def turn(x, places):
            assert 0 <= min(places) <= max(places) < TRAINED, "no position exceeds the trained context"
            return turned(x, torch.tensor(places), module, rotary) if rotated else x

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
            keys = turn(k[:, at], [place for _, place in seen]).repeat_interleave(groups, 0)
            scores = (keys * turn(q[:, i : i + 1], [i - low + far])).sum(-1).mul(scaling)
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            if s_aux is not None:
                scores = torch.cat([scores, s_aux[:, None]], dim=-1)
            weight = scores.softmax(-1)[:, : len(at)]
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
    AttentionInterface.register("dense-formula-of-a-test", dense_attention(rotary, reader.layout, used.memory_layers))
    before = model.config._attn_implementation
    model.set_attn_implementation("dense-formula-of-a-test")
    try:
        wanted = model(x, position_ids=torch.zeros_like(x), use_cache=False).logits
    finally:
        model.set_attn_implementation(before)
    assert (got - wanted).abs().max() < 1e-4 * max(1.0, float(wanted.abs().max()))


@torch.no_grad()
def test_any_split_gives_the_same_logits():
    reader = StockReader(tiny_stock_model("llama", dtype=torch.float64))
    x = tokens(120, rows=2)
    whole, _ = read(reader, x, [120])
    for pieces in ([1] * 120, [50, 3, 67], [31, 32, 57]):
        # not 1e-9: the norms of a Llama compute in float32 whatever the model's dtype
        assert (read(reader, x, pieces)[0] - whole).abs().max() < 1e-6


@torch.no_grad()
def test_the_span_changes_what_is_read_and_a_later_token_nothing_before_it():
    reader = StockReader(tiny_stock_model("llama", dtype=torch.float64))
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
    reader = StockReader(tiny_stock_model("llama"))
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
    model = tiny_stock_model("llama")
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
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi-partial", "smollm3", "llama-yarn", "gemma2", "gpt-oss"])
def test_a_model_in_16_bits_is_read_too(name, dtype):
    reader = StockReader(tiny_stock_model(name, dtype=dtype))
    logits, cache = read(reader, tokens(60), [50, 1, 9], storage_dtype="bfloat16")
    assert logits.dtype == dtype
    assert cache.layer_state(0)["attention.keys"].dtype == dtype


def tiny(name, dtype=torch.float32, **overrides):
    """A model that is not among those that are read, with norms that differ from 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**{**STOCK_SIZES, **overrides})
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return torch.nn.Module.to(model, dtype).eval()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: tiny("GPT2", n_embd=32, n_head=4, n_layer=2), "learned positions"),
        (lambda: tiny("Bloom", n_head=4), "attention interface"),
        (lambda: tiny("StableLm"), "attention interface"),
        (lambda: tiny("DiffLlama"), "attends twice"),
        (lambda: tiny("Nemotron"), "cannot be given a memory"),
        (lambda: tiny("Llama", rope_parameters={"rope_type": "proportional", "rope_theta": 1e4}), "of kind prop"),
        (lambda: tiny("HunYuanDenseV1", head_dim=8), "gives other logits"),
        (lambda: tiny("HunYuanDenseV1", head_dim=8, dtype=torch.bfloat16), "gives other logits"),
        (lambda: tiny("HunYuanDenseV1", head_dim=8, dtype=torch.float16), "gives other logits"),
        (lambda: tiny("Qwen2", layer_types=["chunked_attention", "full_attention"]), "chunked_attention"),
        (lambda: tiny("Mamba", state_size=4), "attention interface"),
    ],
    ids=["learned", "alibi", "no interface", "twice", "no arguments", "a rotary of another kind", "a norm after it",
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
    reader = StockReader(tiny_stock_model("llama"))
    with pytest.raises(ConfigError, match=reason):
        read(reader, tokens(4), [4], **overrides)


def test_a_span_in_a_layer_with_a_small_sliding_window_is_refused():
    reader = StockReader(tiny_stock_model("mistral-sliding"))
    assert reader.layout.memory_settings().memory_layers == ()
    with pytest.raises(ConfigError, match="sliding window of 10"):
        read(reader, tokens(4), [4], memory_layers=(0,))


@pytest.mark.parametrize("trained", [16, 100, 512, 4096, 131072])
def test_default_sizes_fit_the_trained_context(trained):
    layout = StockReader(tiny_stock_model("llama", max_position_embeddings=trained)).layout
    assert reach(layout.memory_settings()) <= trained
    layout.check(layout.memory_settings())


def test_the_attention_function_alone_is_refused():
    model = tiny_stock_model("llama", attn_implementation="memtier")
    with pytest.raises(ModelError, match="set_attn_implementation"):
        model(tokens(4))


def test_non_finite_weights_raise():
    model = tiny_stock_model("llama")
    reader = StockReader(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="non-finite"):
        read(reader, tokens(4), [4])


@torch.no_grad()
def test_states_restored_in_a_new_process_give_equal_logits(tmp_path):
    """All families in one process, since most of its time goes into imports."""
    names = [name for name, family in STOCK_FAMILIES.items() if family.default]
    assert len(names) >= 8
    wanted = {}
    for name in names:
        reader, x = StockReader(tiny_stock_model(name)), tokens(130, seed=4)
        used = settings(reader, storage_dtype="float16")
        cache = TieredCache(reader.layout, settings=used, selector=HostSpanSelector())
        reader(x[:, :90], cache)
        blocks = cache.take_sealed()
        stacked = {
            layer: [
                torch.stack([getattr(b, kind)[place] for b in blocks])[None] for kind in ("keys", "values", "landmarks")
            ]
            for place, layer in enumerate(used.memory_layers)
        }
        state = {key: value.clone() for key, value in cache.state_dict().items()}
        rest = {"settings": asdict(used), "blocks": stacked, "state": state, "tokens": x[:, 90:]}
        torch.save(rest, tmp_path / f"{name}.before")
        wanted[name] = reader(x[:, 90:], cache).logits
    script = Path(__file__).with_name("restored_process.py")
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=110)
    for name in names:
        assert torch.equal(torch.load(tmp_path / f"{name}.after"), wanted[name]), name


@pytest.mark.parametrize("name", ["llama", "qwen2-alternating", "smollm3", "gemma2", "gpt-oss"])
@torch.no_grad()
def test_decoding_carries_what_reading_at_once_carries(name):
    """Token by token goes by the fast lane between two choices; states, reports and saved tensors are the same."""
    reader, x = StockReader(tiny_stock_model(name)), tokens(70, rows=2)
    used = settings(reader)
    wanted, at_once = read(reader, x, [70])
    got, decoded = read(reader, x, [1] * 70)
    assert (got - wanted).abs().max() < 1e-4 * max(1.0, float(wanted.abs().max()))
    assert decoded.lane is not None, "the last token was read on the lane"
    for (name, one), other in zip(at_once.state_dict().items(), decoded.state_dict().values(), strict=True):
        if not name.endswith("mass"):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    # shares are those of the last step, so they are compared with one that read its last token off the lane
    off = TieredCache(reader.layout, settings=used, batch_size=2, dtype=reader.layout.dtype)
    reader(x[:, :69], off)
    reader(x[:, 69:], off, marks={0})
    assert off.lane is None
    for layer, shares in off.attention_mass().items():
        for source, share in shares.items():
            assert decoded.attention_mass()[layer][source] == pytest.approx(share, abs=1e-4)
    for one, other in zip(off.last_selection(), decoded.last_selection(), strict=True):
        assert one.block_ids == other.block_ids
        assert one.attention_mass == pytest.approx(other.attention_mass, abs=1e-4)
