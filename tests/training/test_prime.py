"""Priming: an attention model becomes a hybrid that begins where it was, learns, resumes, and opens in the runtime."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3Config
from typer.testing import CliRunner

import memtier
from memtier.cli import app
from memtier.errors import ConfigError
from memtier.layers.bmojo import BMojoMixer
from memtier.models.bmojo import BMojoForCausalLM
from memtier.models.primed import plain_copy, primed_model, primed_sizes
from memtier.training.corpus import load_corpus
from memtier.training.fit_settings import FitSettings
from memtier.training.golden import golden_text
from memtier.training.prime import Prime, prime, train_prime
from memtier.training.prime_choice import choose_layers, replacement_losses
from memtier.training.text import TextIds, TextLessons, text_ids

SIZES: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 256, "eos_token_id": 257, "head_dim": 8,
}  # fmt: skip
MEMORY = {"window_tokens": 8, "span_block_tokens": 4, "span_refresh_tokens": 4, "span_blocks": 2}
SETTINGS = FitSettings(
    steps=2, learning_rate=1e-3, precision="float32", log_every_steps=1, checkpoint_every_seconds=0.0
)  # fmt: skip
RECIPE = Prime("0,2", sizes=MEMORY, align_steps=2)


def source(config: type = LlamaConfig, **overrides: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config(**SIZES | overrides)).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_text(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    source().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(corpus: Path) -> TextIds:
    return text_ids(load_corpus(corpus), None, 260)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config])
@torch.no_grad()
def test_inside_its_window_the_copy_of_an_attention_model_gives_its_logits(config: type) -> None:
    model = source(config)
    x = torch.randint(0, 260, (2, 64), generator=torch.Generator().manual_seed(0))
    wanted, got = model(x).logits, plain_copy(model)(x).logits
    assert (wanted - got).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("fading", ["grouped_mamba2", "grouped_gated_deltanet"])
@torch.no_grad()
def test_a_hybrid_begins_with_the_attention_of_its_source(fading: str) -> None:
    torch.manual_seed(0)
    model = source(Qwen3Config)
    sizes = primed_sizes(64, (1,), MEMORY)
    hybrid = primed_model(plain_copy(model), [0, 2], fading, sizes)
    assert hybrid.config.layer_types == ["bmojo", "sliding_attention", "bmojo"]
    assert sizes.memory_layers == (1,) and sizes.eidetic_tokens == 2
    x = torch.randint(0, 260, (2, 8))
    wanted = model(x).logits
    assert (wanted - hybrid(x).logits).abs().max() < 1e-4 * wanted.abs().max()
    mixer = hybrid.model.layers[2].mixer
    assert isinstance(mixer, BMojoMixer)
    q, k, v, o = (getattr(mixer, f"{name}_proj").weight for name in "qkvo")
    fresh: Any = mixer.fading
    gate = 0.5 * (o.T + v.view(2, 1, 8, 32).expand(2, 2, 8, 32).reshape(32, 32))
    if fading == "grouped_mamba2":
        assert torch.equal(fresh.in_proj.weight[:-4], torch.cat([gate, v, k, q]))
        assert torch.equal(fresh.out_proj.weight, o)
        assert mixer.k_norm is not None and torch.equal(fresh.B_norm.weight, mixer.k_norm.weight)
    else:
        for name, weight in {"q": q, "k": k, "v": v, "o": o, "g": gate}.items():
            assert torch.equal(getattr(fresh, f"{name}_proj").weight, weight)


@pytest.mark.parametrize(
    ("trained", "window", "blocks"), [(64, 16, 1), (512, 128, 4), (8192, 2048, 16), (131072, 2048, 16)]
)
def test_default_sizes_fit_the_trained_context(trained: int, window: int, blocks: int) -> None:
    sizes = primed_sizes(trained, (1,), {})
    assert (sizes.window_tokens, sizes.span_blocks) == (window, blocks)
    assert sizes.memory_layers == (1,)
    assert 4 * sizes.window_tokens <= trained


@torch.no_grad()
def test_the_layers_that_lose_least_by_a_window_are_converted(text: TextIds) -> None:
    model = source()
    # layer 1 adds next to nothing, so it can be replaced by anything
    model.model.layers[1].self_attn.o_proj.weight.mul_(1e-6)
    plain = plain_copy(model)
    whole, losses = replacement_losses(plain, text, window_tokens=8, tokens=64)
    assert abs(losses[1] - whole) < 1e-5 < min(abs(losses[0] - whole), abs(losses[2] - whole))
    # a window as long as the sequence replaces nothing
    assert replacement_losses(plain, text, window_tokens=64, tokens=64)[1] == pytest.approx([whole] * 3, abs=1e-5)
    chosen = choose_layers(plain, text, "best:2", window_tokens=8, tokens=64)
    assert chosen.layers == tuple(sorted(sorted(range(3), key=lambda i: chosen.losses[i])[:2]))
    for wrong in ("3", "0,0", "best:4", "best:1,2", "some"):
        with pytest.raises(ConfigError, match="convert is"):
            choose_layers(plain, text, wrong, window_tokens=8, tokens=64)


def run(saved: Path, corpus: Path, out: Path, **options: Any) -> Any:
    given = {"recipe": RECIPE, "settings": SETTINGS, "lessons": TextLessons(batch_tokens=256), **options}
    return train_prime(corpus, out, model=saved, seed=3, device="cpu", show_progress=False, **given)


def test_a_resumed_run_writes_the_same_model_and_a_session_opens_it(saved: Path, corpus: Path, tmp_path: Path) -> None:
    report = run(saved, corpus, tmp_path / "whole")
    assert report.layers == (0, 2) and report.step == 4
    assert report.source is not None and report.inside is not None and report.beyond is not None
    assert report.beyond.sequence_tokens > report.inside.sequence_tokens == 32
    assert json.loads((tmp_path / "whole" / "training.json").read_text())["conversion"]["convert"] == "0,2"
    for _ in range(2):
        assert not run(saved, corpus, tmp_path / "parts", minutes=0.0).finished
        assert not (tmp_path / "parts" / "config.json").exists()
    assert run(saved, corpus, tmp_path / "parts").loss == report.loss
    one, two = (BMojoForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    with memtier.open_sync(tmp_path / "store", model=str(tmp_path / "whole")) as runtime:
        session = runtime.session("alice")
        assert session.observe(list(range(100))).position == 100
        assert {layer.kind for layer in session.inspect().state.layers} == {"bmojo"}
    other = replace(RECIPE, align_learning_rate=1.0)
    with pytest.raises(ConfigError, match="learning_rate"):
        run(saved, corpus, tmp_path / "whole", recipe=other)


def test_alignment_trains_what_is_new_and_brings_it_nearer_to_the_source(
    saved: Path, corpus: Path, tmp_path: Path
) -> None:
    recipe = Prime("0,2", sizes=MEMORY, align_steps=12, align_learning_rate=3e-3)
    report = run(saved, corpus, tmp_path, recipe=recipe, settings=SETTINGS)
    rows = (tmp_path / "align" / "log.csv").read_text().splitlines()
    column = rows[0].split(",").index("loss")
    errors = [float(row.split(",")[column]) for row in rows[1:]]
    assert len(errors) == 12 and report.alignment < 0.9 * errors[0]


@pytest.mark.parametrize(
    ("make", "recipe", "reason"),
    [
        (lambda: source(Qwen2Config), RECIPE, "k_proj.bias"),
        (lambda: source(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}), RECIPE, "rotary"),
        (lambda: source(hidden_act="gelu"), RECIPE, "hidden_act"),
        (lambda: source(), Prime("0", sizes={**MEMORY, "window_tokens": 32}), "spread over"),
        (lambda: source(), Prime("0", sizes={**MEMORY, "windows": 32}), "fields of MemorySettings"),
        (lambda: source(), Prime("0", sizes=MEMORY, sequence_tokens=24), "under four windows"),
    ],
    ids=["biases", "scaled positions", "another activation", "too wide", "no such size", "too short"],
)
def test_what_cannot_be_primed_is_refused_with_its_reason(
    make: Any, recipe: Prime, reason: str, text: TextIds, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        prime(make(), text, tmp_path / "out", recipe=recipe)


def test_a_model_that_hides_what_it_does_is_tried_and_refused() -> None:
    model = source()
    assert isinstance(model, LlamaForCausalLM)
    model.model.layers[1].self_attn.scaling *= 2.0
    with pytest.raises(ConfigError, match="other logits"):
        plain_copy(model)


def test_the_command_primes_a_model(saved: Path, corpus: Path, tmp_path: Path) -> None:
    given = [
        "train", "prime", str(corpus), "--from", str(saved), "--convert", "best:1", "--out", str(tmp_path / "out"),
        "--align-steps", "1", "--steps", "1", "--batch-tokens", "64", "--log-every", "1", "--device", "cpu", "--json",
        *(part for name, value in MEMORY.items() for part in ("--memory", f"{name}={value}")),
    ]  # fmt: skip
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["finished"] and len(report["choice"]["losses"]) == 3
