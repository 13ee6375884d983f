"""Hybrids of transformers read with memory: equal to themselves inside the window, to a dense formula beyond it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM

from memtier.cache import TieredCache
from memtier.errors import ConfigError, ModelError
from memtier.layers.host_selector import HostSpanSelector
from memtier.models.stock import HybridReader, is_hybrid

W, S, R, K, SINKS = 24, 4, 4, 3, 2
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 8}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
GRANITE = {
    **MAMBA, "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 2, "num_experts_per_tok": 1,
    "shared_intermediate_size": 16,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba2": ("Mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8}),
    "bamba": ("Bamba", {**MAMBA, "attn_layer_indices": [1]}),
    "falcon-h1": ("FalconH1", {**MAMBA, "mamba_d_ssm": 64, "num_hidden_layers": 2}),
    "granite-hybrid": ("GraniteMoeHybrid", {**GRANITE, "position_embedding_type": "rope"}),
    "granite-hybrid-unrotated": ("GraniteMoeHybrid", GRANITE),
    "jamba": (
        "Jamba",
        {"attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4, **EXPERTS},
    ),
    "zamba2": (
        "Zamba2",
        {"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_ngroups": 2, "chunk_size": 8, "num_mem_blocks": 1,
         "layers_block_type": ["mamba", "hybrid", "hybrid"], "use_mem_rope": True, "adapter_rank": 4},
    ),
    "nemotron-h": (
        "NemotronH",
        {"layers_block_type": ["mamba", "attention", "mlp", "mamba"], "mamba_num_heads": 8, "mamba_head_dim": 8,
         "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8, "head_dim": 8},
    ),
    "qwen3-next": (
        "Qwen3Next",
        {**LINEAR, **EXPERTS, "head_dim": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8}),
    "olmo-hybrid": ("OlmoHybrid", {**LINEAR, "linear_num_key_heads": 4}),
}  # fmt: skip
# these read a token by itself without a limit that counts in a text; without it they can be read
LIMITED = ("zamba2", "nemotron-h")
DEFAULT = ("mamba2", "falcon-h1", "jamba", "qwen3-next", "lfm2")


def make_model(name: str, *, limit: bool = False, seed: int = 0) -> Any:
    family, overrides = MODELS[name]
    sizes = {k: v for k, v in SIZES.items() if not (name == "nemotron-h" and k == "num_hidden_layers")}
    config = getattr(transformers, f"{family}Config")(**{**sizes, **overrides})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            # biases, norms and decays away from where a mistake would not show
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    for module in model.modules():
        if hasattr(module, "time_step_limit") and not limit:
            module.time_step_limit = (0.0, float("inf"))
    return model


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=() if n in DEFAULT else pytest.mark.slow) for n in MODELS]
)
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


def settings(reader: HybridReader, **overrides: Any) -> Any:
    able = tuple(i for i, attends in enumerate(reader.layout.attends) if attends)
    sizes = {
        "window_tokens": W, "sink_tokens": SINKS, "span_block_tokens": S, "span_refresh_tokens": R, "span_blocks": K,
        "memory_layers": able, "storage_dtype": "float32",
    }  # fmt: skip
    return replace(reader.layout.memory_settings(), **{**sizes, **overrides})


def tokens(count: int, seed: int = 0, rows: int = 1) -> torch.Tensor:
    return torch.randint(1, 64, (rows, count), generator=torch.Generator().manual_seed(seed))


def read(reader: HybridReader, x: torch.Tensor, pieces: list[int]) -> tuple[torch.Tensor, TieredCache]:
    cache = TieredCache(reader.layout, settings=settings(reader), batch_size=x.shape[0], dtype=reader.layout.dtype)
    return torch.cat([reader(piece, cache).logits for piece in x.split(pieces, dim=1)], dim=1), cache


@torch.no_grad()
def test_inside_the_window_the_logits_are_those_of_transformers(model: Any) -> None:
    assert is_hybrid(model)
    reader, x = HybridReader(model), tokens(W, rows=2)
    wanted = model(x, use_cache=False).logits
    for pieces in ([W], [7, 1, 16], [1] * W):
        got, _ = read(reader, x, pieces)
        assert (got - wanted).abs().max() < 1e-4 * max(1.0, float(wanted.abs().max())), pieces


def dense_attention(model: Any) -> Any:
    """One softmax over sinks, span and window, written out query by query; every layer remembers."""
    rotaries = [m for m in model.modules() if hasattr(m, "rope_type")]
    far = SINKS + K * S

    def turn(x: torch.Tensor, position: int) -> torch.Tensor:
        if not rotaries:
            return x
        cos, sin = (t[0, 0] for t in rotaries[0](torch.zeros(1), torch.tensor([[position]])))
        size = cos.shape[-1]
        left, right = x[..., :size].chunk(2, dim=-1)
        return torch.cat([x[..., :size] * cos + torch.cat([-right, left], dim=-1) * sin, x[..., size:]], dim=-1)

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any) -> Any:
        assert mask is None
        q, k, v = query[0], key[0], value[0]
        shared, out = q.shape[0] // k.shape[0], torch.zeros_like(q)
        for i in range(q.shape[1]):
            boundary = i // R * R
            low = max(0, boundary - W + 1) // S * S
            seen = [(j, j - low + far) for j in range(low, i + 1)] + [(j, j) for j in range(min(SINKS, low))]
            if low:
                asked = q[:, max(0, boundary - R + 1) : boundary + 1].sum(1).unflatten(0, (-1, shared)).sum(1)
                score = (k[:, :low].unflatten(1, (-1, S)).mean(2) * asked[:, None]).sum((0, 2))
                for n, b in enumerate(sorted(score.topk(min(K, score.numel())).indices.tolist())):
                    seen += [(b * S + o, SINKS + n * S + o) for o in range(S) if b * S + o >= SINKS]
            keys = torch.stack([turn(k[:, j], place) for j, place in seen], 1).repeat_interleave(shared, 0)
            weight = (keys * turn(q[:, i], i - low + far)[:, None]).sum(-1).mul(scaling).softmax(-1)
            values = v[:, [j for j, _ in seen]].repeat_interleave(shared, 0)
            out[:, i] = (weight[..., None] * values).sum(1)
        return out.transpose(0, 1)[None], None

    return attention


@torch.no_grad()
def test_beyond_the_window_the_logits_are_those_of_the_dense_formula(model: Any) -> None:
    x, reader = tokens(90, seed=1), HybridReader(model)
    got, _ = read(reader, x, [5, 40, 1, 1, 30, 13])
    if not any(reader.layout.attends):
        wanted = model(x, use_cache=False).logits
    else:
        AttentionInterface.register("dense-formula-of-a-hybrid", dense_attention(model))
        before = model.config._attn_implementation
        model.set_attn_implementation("dense-formula-of-a-hybrid")
        try:
            wanted = model(x, position_ids=torch.zeros_like(x), use_cache=False).logits
        finally:
            model.set_attn_implementation(before)
    assert (got - wanted).abs().max() < 1e-4 * max(1.0, float(wanted.abs().max()))


RESTORED = ("falcon-h1", "jamba", "qwen3-next", "lfm2")


@torch.no_grad()
def test_a_saved_state_goes_on_in_a_new_process_with_equal_logits(tmp_path: Path) -> None:
    wanted = {}
    for name in RESTORED:
        reader, x, selector = HybridReader(make_model(name)), tokens(140, seed=3), HostSpanSelector()
        cache = TieredCache(reader.layout, settings=settings(reader), selector=selector)
        reader(x[:, :100], cache)
        held = cache.device_bytes()
        saved = {key: value.clone() for key, value in cache.state_dict().items()}
        torch.save((saved, cache.take_sealed(), x), tmp_path / f"{name}.pt")
        wanted[name] = reader(x[:, 100:], cache).logits
        assert cache.device_bytes() == held
    script = f"import runpy; runpy.run_path({__file__!r})['go_on']({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", script], check=True)
    for name in RESTORED:
        assert torch.equal(torch.load(tmp_path / f"{name}-logits.pt"), wanted[name]), name


@torch.no_grad()
def go_on(folder: str) -> None:
    """What a new process does with the saved states. Run by the test above."""
    for name in RESTORED:
        saved, blocks, x = torch.load(Path(folder) / f"{name}.pt", weights_only=False)
        reader, selector = HybridReader(make_model(name)), HostSpanSelector()
        used = settings(reader)
        for place, layer in enumerate(used.memory_layers):
            keys, values, marks = (
                torch.stack([getattr(block, part)[place] for block in blocks])[None]
                for part in ("keys", "values", "landmarks")
            )
            selector.append(layer, 0, keys, values, marks)
        cache = TieredCache(reader.layout, settings=used, selector=selector)
        cache.load_state_dict(saved)
        torch.save(reader(x[:, 100:], cache).logits, Path(folder) / f"{name}-logits.pt")


@torch.no_grad()
def test_a_model_that_forgets_its_state_in_a_text_is_read_token_by_token() -> None:
    model = make_model("jamba")
    assert HybridReader(model).stepwise
    # why: transformers' own second step begins anew, and says nothing
    x = tokens(24)
    first = model(x[:, :12], use_cache=True)
    second = model(x[:, 12:], past_key_values=first.past_key_values, use_cache=True).logits
    assert (second - model(x, use_cache=False).logits[:, 12:]).abs().max() > 1e-3
    assert not HybridReader(make_model("bamba")).stepwise


@pytest.mark.parametrize("name", LIMITED)
def test_a_model_that_reads_one_token_in_another_way_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="time_step_limit"):
        HybridReader(make_model(name, limit=True))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("MiniMax", {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, "num_local_experts": 2}),
        ("RecurrentGemma", {"lru_width": 32, "block_types": ["recurrent", "attention"]}),
    ],
    ids=["MiniMax", "RecurrentGemma"],
)
def test_a_model_with_a_cache_of_its_own_is_refused(family: str, overrides: dict[str, Any]) -> None:
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "num_hidden_layers": 2, **overrides})
    with pytest.raises(ConfigError, match="cache"):
        HybridReader(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["falcon-h1", "jamba", "lfm2"])
@torch.no_grad()
def test_a_hybrid_in_16_bits_is_read_too(name: str, dtype: torch.dtype) -> None:
    model = torch.nn.Module.to(make_model(name), dtype)
    logits, cache = read(HybridReader(model), tokens(60), [50, 1, 9])
    assert logits.dtype == dtype and bool(logits.isfinite().all())
    kinds = {key.rpartition(".")[2]: value.dtype for key, value in cache.state_dict().items()}
    assert kinds["conv"] == kinds["keys"] == dtype and kinds["ssm"] == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hybrid_that_changes_its_keys_after_the_rotation_is_refused(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.lfm2 import modeling_lfm2

    turn = modeling_lfm2.apply_rotary_pos_emb

    def turn_and_more(q: Any, k: Any, *rest: Any) -> Any:
        q, k = turn(q, k, *rest)
        return q, k * torch.linspace(0.97, 1.03, k.shape[-1]).to(k.dtype)

    monkeypatch.setattr(modeling_lfm2, "apply_rotary_pos_emb", turn_and_more)
    with pytest.raises(ConfigError, match="rotated at attention"):
        HybridReader(torch.nn.Module.to(make_model("lfm2"), dtype))


@torch.no_grad()
def test_the_model_is_as_it_was_and_a_failed_step_changes_no_state() -> None:
    model = make_model("qwen3-next").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    reader = HybridReader(model)
    assert model.training and model.config._attn_implementation == implementation
    x = tokens(30)
    model.eval()
    _, cache = read(reader, x, [30])
    kept = {name: value.clone() for name, value in cache.state_dict().items()}
    model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="non-finite"):
        reader(x, cache)
    assert all(torch.equal(kept[name], value) for name, value in cache.state_dict().items())
    model.lm_head.weight[0, 0] = before["lm_head.weight"][0, 0]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
