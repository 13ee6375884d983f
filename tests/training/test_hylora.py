"""HyLoRA trains what it should and nothing else, writes an adapter that gives the same model back, and resumes."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from memtier.cli import app
from memtier.errors import ConfigError
from memtier.models.adapters import TENSORS_NAME, AdapterSet, read_adapter
from memtier.models.bmojo import BMojoForCausalLM
from memtier.testing import tiny_model
from memtier.training.course import SpanDraw
from memtier.training.fit_settings import FitSettings
from memtier.training.golden import golden_text
from memtier.training.hylora import HyLora, add_hylora, train_hylora
from memtier.training.text import TextLessons

pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]
SETTINGS = FitSettings(
    steps=4, learning_rate=1e-2, precision="float32", piece_tokens=64, log_every_steps=1, checkpoint_every_seconds=0.0
)  # fmt: skip
LESSONS = TextLessons(sequence_tokens=160, batch_tokens=160, span=SpanDraw(refresh_tokens=(2, 4, 8), blocks=(1, 2)))


def trained(model: BMojoForCausalLM) -> set[str]:
    """Kinds of tensors that require gradients: names without layer numbers."""
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    return {re.sub(r"(model\.layers\.\d+\.|\.default)", "", name) for name in names}


def low_rank(*modules: str) -> set[str]:
    return {f"{module}.lora_{factor}.weight" for module in modules for factor in "AB"}


ATTENTION = tuple(f"mixer.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
CONVOLUTIONS = {
    "mixer.k_conv",
    "mixer.v_conv",
    *(f"mixer.{part}conv1d.{name}" for part in ("", "fading.") for name in ("weight", "bias")),
}
MAMBA = low_rank(*ATTENTION, *(f"mixer.{p}{n}" for p in ("", "fading.") for n in ("in_proj", "out_proj")))


@pytest.mark.parametrize(
    ("adapter", "more"),
    [
        (HyLora(rank=2), set()),
        (HyLora(rank=2, embeddings=True), {"model.embed_tokens.weight"}),
        (
            HyLora(rank=2, norms=True),
            {"norm.weight", "mlp_norm.weight", "mixer.norm.weight", "mixer.fading.norm.weight", "model.norm.weight"}
            | {"mixer.q_norm.weight", "mixer.k_norm.weight"},
        ),
    ],
    ids=["plain", "embeddings", "norms"],
)
def test_projections_have_low_rank_and_convolutions_are_trained_whole(adapter: HyLora, more: set[str]) -> None:
    model = tiny_model(qk_norm=True)
    add_hylora(model, adapter)
    assert trained(model) == MAMBA | CONVOLUTIONS | more
    ranks = {min(p.shape) for name, p in model.named_parameters() if ".lora_" in name}
    assert ranks == {2}


def test_a_gated_deltanet_is_adapted_too() -> None:
    model = tiny_model(layer_types=["gated_deltanet", "bmojo", "bmojo"])
    add_hylora(model, HyLora(rank=2))
    assert low_rank("mixer.in_proj_qkvz", "mixer.in_proj_ba", "mixer.out_proj") < trained(model)
    with pytest.raises(ConfigError, match="carries adapters"):
        add_hylora(model, HyLora())


def test_an_untrained_adapter_changes_no_logit() -> None:
    torch.manual_seed(0)
    model, tokens = tiny_model(), torch.randint(0, 256, (2, 70))
    with torch.inference_mode():
        before = model(tokens).logits
    add_hylora(model, HyLora(rank=2, dropout=0.5))
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model(initializer_range=0.1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_text(tmp_path_factory.mktemp("corpus"))


def run(base: Path, corpus: Path, out: Path, **options: Any) -> Any:
    given = {"adapter": HyLora(rank=4, norms=True), "settings": SETTINGS, "lessons": LESSONS, **options}
    return train_hylora(base, corpus, out, seed=3, device="cpu", show_progress=False, **given)


def test_the_adapter_gives_the_trained_model_back_and_a_resumed_run_writes_the_same(
    base: Path, corpus: Path, tmp_path: Path
) -> None:
    report = run(base, corpus, tmp_path / "whole")
    assert report.after.bits_per_byte < report.before.bits_per_byte
    assert report.trained_parameters < report.parameters
    for _ in range(SETTINGS.steps - 1):
        assert not run(base, corpus, tmp_path / "parts", minutes=0.0).finished
        assert not (tmp_path / "parts" / TENSORS_NAME).exists()
    assert run(base, corpus, tmp_path / "parts").loss == report.loss
    one, two = (read_adapter(tmp_path / name) for name in ("whole", "parts"))
    assert one.digest == two.digest
    assert json.loads((tmp_path / "whole" / "training.json").read_text())["adapter"]["rank"] == 4

    model = BMojoForCausalLM.from_pretrained(str(base)).eval()
    tokens = torch.randint(0, 256, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(tokens).logits
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapters = AdapterSet(model)
    adapters.add(one)
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, before)
        adapters.use(one.digest)
        assert (model(tokens).logits - before).abs().max() > 1e-3
        adapters.use(None)
        assert torch.equal(model(tokens).logits, before)
    adapters.remove(one.digest)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in weights.items())


def test_a_checkpoint_of_another_base_is_refused(base: Path, corpus: Path, tmp_path: Path) -> None:
    run(base, corpus, tmp_path / "out", minutes=0.0)
    tiny_model(1, initializer_range=0.1).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match="frozen_weights"):
        run(tmp_path / "other", corpus, tmp_path / "out")


def test_the_command_writes_an_adapter(base: Path, corpus: Path, tmp_path: Path) -> None:
    arguments = ["train", "hylora", str(base), str(corpus), "--out", str(tmp_path), "--rank", "2", "--steps", "1"]
    sizes = ["--sequence-tokens", "96", "--batch-tokens", "96", "--piece-tokens", "48", "--span-refresh-tokens", "2,4"]
    result = CliRunner().invoke(app, [*arguments, *sizes, "--gradient-checkpointing", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["after"]["sequence_tokens"] == 96
    assert read_adapter(tmp_path).config.r == 2


def test_the_example_adapts_to_sequences_eight_times_longer(tmp_path: Path) -> None:
    example = runpy.run_path(str(ROOT / "examples/adapt_to_longer_sequences.py"))
    assert example["LONG"] == 8 * example["SHORT"]
    report = example["main"](tmp_path, steps=4, adapter_steps=2)
    assert report.after.sequence_tokens == example["LONG"]
    assert report.after.bits_per_byte < report.before.bits_per_byte


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"dropout": 1.0}], ids=str)
def test_an_adapter_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        HyLora(**wrong)


def test_without_peft_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"memtier\[train\]"):
        add_hylora(tiny_model(), HyLora())
