"""The loop learns, resumes exactly, refuses what it must, and nano's recipe writes a folder that loads."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from memtier.errors import ConfigError, CorruptMemoryError, IncompatibleMemoryError, ModelError
from memtier.models.bmojo import BMojoForCausalLM
from memtier.testing import tiny_config
from memtier.training.__main__ import main
from memtier.training.corpus import Corpus
from memtier.training.loop import CHECKPOINT_NAME, LOG_NAME, LoopSettings, train
from memtier.training.nano import NANO, export_nano, nano_config, train_nano
from memtier.training.recall_layer import recall_by_layer
from memtier.training.tasks import TaskMixer

TEXT = b"The miller rose early, and the river ran under the wheel as it had always run.\n" * 400
SETTINGS = LoopSettings(
    steps=12,
    batch_tokens=((1.0, 640),),
    sequence_tokens=((0.5, 160), (1.0, 192)),
    peak_learning_rate=((1.0, 1e-2),),
    warmup_steps=2,
    log_every_steps=4,
    checkpoint_every_seconds=0.0,
    precision="float32",
    far_tokens=24,
)


class Stub(torch.nn.Module):
    """A bigram model with the interface of the real one; it notes how far attention was asked for."""

    def __init__(self, loss_is_nan: bool = False) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(260, 260)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("lasting", torch.zeros(3))
        self.loss_is_nan, self.asked = loss_is_nan, []

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor, far_attention: str
    ) -> SimpleNamespace:
        self.asked.append((far_attention, input_ids.shape[1]))
        logits = self.table(input_ids) * self.scale
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        weights = loss_weights[:, 1:].flatten()
        loss = (loss * weights).sum() / weights.sum()
        return SimpleNamespace(loss=loss * torch.nan if self.loss_is_nan else loss, logits=logits)


@pytest.fixture(scope="module")
def mixer() -> TaskMixer:
    return TaskMixer(Corpus.from_bytes(TEXT[:-4000], TEXT[-4000:]), seed=5)


@pytest.fixture
def stub() -> Stub:
    torch.manual_seed(0)
    return Stub()


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / LOG_NAME).open(newline="") as file:
        return list(csv.DictReader(file))


def test_training_lowers_the_loss_and_logs_it(mixer: TaskMixer, stub: Stub, tmp_path: Path) -> None:
    report = train(stub, mixer, replace(SETTINGS, steps=40), tmp_path)
    log = rows(tmp_path)
    assert [int(r["step"]) for r in log] == list(range(4, 41, 4))
    assert float(log[-1]["loss"]) < float(log[0]["loss"])
    assert report.step == 40
    assert report.tokens == int(log[-1]["tokens"])
    assert not stub.training


def test_far_attention_is_dense_first_and_sequences_grow(mixer: TaskMixer, stub: Stub, tmp_path: Path) -> None:
    train(stub, mixer, replace(SETTINGS, far_attention=((0.25, ("dense",)), (1.0, ("span", "batch")))), tmp_path)
    assert (
        stub.asked
        == [("dense", 160)] * 3 + [("batch", 160), ("span", 160), ("batch", 160)] + [("span", 192), ("batch", 192)] * 3
    )


def test_a_resumed_run_ends_with_the_same_weights_and_log(mixer: TaskMixer, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(row: object) -> None:
        if getattr(row, "step", 0) == 8:
            raise Stopped

    torch.manual_seed(0)
    whole, parts = Stub(), Stub()
    parts.load_state_dict(whole.state_dict())
    train(whole, mixer, SETTINGS, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(parts, mixer, SETTINGS, tmp_path / "parts", on_row=stop)
    resumed = Stub()
    train(resumed, mixer, SETTINGS, tmp_path / "parts")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    measured = ("step", "tokens", "loss", "text_bpb", "answer_loss", "level_accuracy")
    assert [[r[m] for m in measured] for r in rows(tmp_path / "whole")] == [
        [r[m] for m in measured] for r in rows(tmp_path / "parts")
    ]


def test_without_resume_a_run_starts_afresh(mixer: TaskMixer, stub: Stub, tmp_path: Path) -> None:
    train(stub, mixer, SETTINGS, tmp_path)
    assert train(stub, mixer, SETTINGS, tmp_path).row is None
    train(stub, mixer, SETTINGS, tmp_path, resume=False)
    assert [int(r["step"]) for r in rows(tmp_path)] == [4, 8, 12]


def test_a_minutes_budget_ends(mixer: TaskMixer, stub: Stub, tmp_path: Path) -> None:
    report = train(stub, mixer, replace(SETTINGS, steps=None, minutes=0.002), tmp_path)
    assert report.seconds >= 0.12
    assert report.row is not None
    assert report.row.progress == 1.0


def test_a_loss_that_stays_nan_is_an_error(mixer: TaskMixer, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not finite"):
        train(Stub(loss_is_nan=True), mixer, SETTINGS, tmp_path)


def test_a_checkpoint_of_another_model_seed_or_format_is_refused(mixer: TaskMixer, stub: Stub, tmp_path: Path) -> None:
    train(stub, mixer, SETTINGS, tmp_path)
    with pytest.raises(ConfigError, match="seed"):
        train(stub, replace(mixer, seed=6), SETTINGS, tmp_path)
    with pytest.raises(IncompatibleMemoryError, match="another model"):
        train(torch.nn.Linear(2, 2), mixer, SETTINGS, tmp_path)
    (tmp_path / CHECKPOINT_NAME).write_bytes(b"not a checkpoint")
    with pytest.raises(CorruptMemoryError, match="safetensors"):
        train(stub, mixer, SETTINGS, tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"steps": 1, "minutes": 1.0},
        {"steps": 0},
        {"steps": 1, "sequence_tokens": ((0.5, 512),)},
        {"steps": 1, "far_attention": ((1.0, ("near",)),)},
        {"steps": 1, "far_attention": ((1.0, ()),)},
        {"steps": 1, "precision": "float8"},
    ],
    ids=[
        "no-budget",
        "two-budgets",
        "zero",
        "progress-ends-early",
        "unknown-attention",
        "no-attention",
        "unknown-precision",
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        LoopSettings(**wrong)


def test_nano_is_small_enough_to_ship() -> None:
    with torch.device("meta"):
        model = BMojoForCausalLM(nano_config())
    assert 1_000_000 < sum(p.numel() for p in model.parameters()) < 6_000_000


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text.txt").write_bytes(TEXT * 3)
    return folder


def test_the_recipe_writes_a_folder_that_loads(corpus_folder: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=4, sequence_tokens=((1.0, 192),), log_every_steps=2)
    config = tiny_config(initializer_range=0.02)
    out = tmp_path / "nano"
    report = train_nano(corpus_folder, out, seed=1, device="cpu", settings=settings, config=config, show_progress=True)
    assert report.evaluation.near_count + report.evaluation.far_count > 0
    assert report.evaluation.bits_per_byte > 0
    loaded = BMojoForCausalLM.from_pretrained(str(out))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert AutoTokenizer.from_pretrained(str(out)).encode("hi") == [104, 105]
    record = json.loads((out / "training.json").read_text())
    assert record["seed"] == 1
    assert record["corpus"][0]["name"] == "text.txt"

    again = export_nano(corpus_folder, out, tmp_path / "copy", device="cpu", config=config)
    assert again.steps == 4
    assert (tmp_path / "copy" / "model.safetensors").exists()


def test_of_several_memory_layers_the_one_that_recalls_is_kept(
    corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def recall(model: BMojoForCausalLM, corpus: Corpus, *, layers: list[int], seed: int) -> dict[int, float]:
        asked.append(layers)
        return dict.fromkeys(layers, 0.1) | {layers[-1]: 0.9}

    monkeypatch.setattr("memtier.training.nano.recall_by_layer", recall)
    settings = replace(SETTINGS, steps=4, sequence_tokens=((1.0, 192),), log_every_steps=2)
    config = tiny_config(
        initializer_range=0.02, memory_layers=[1, 3], layer_types=["mamba2", "bmojo"] * 2, num_hidden_layers=4
    )
    for out in (tmp_path / "nano", tmp_path / "nano"):
        train_nano(corpus_folder, out, device="cpu", settings=settings, config=config, show_progress=False)
        assert BMojoForCausalLM.from_pretrained(str(out)).config.memory_layers == [3]
    assert asked == [[1, 3]]
    export_nano(corpus_folder, tmp_path / "nano", tmp_path / "copy", device="cpu", config=config)
    assert BMojoForCausalLM.from_pretrained(str(tmp_path / "copy")).config.memory_layers == [3]


def test_recall_by_layer_is_that_of_models_with_one_memory_layer(mixer: TaskMixer) -> None:
    config = {"layer_types": ["mamba2", "bmojo"] * 2, "num_hidden_layers": 4, "window_tokens": 32, "hidden_size": 32}
    torch.manual_seed(3)
    both = BMojoForCausalLM(tiny_config(memory_layers=[1, 3], initializer_range=0.3, **config)).train()
    shares = recall_by_layer(both, mixer.corpus, layers=[1, 3], sequence_tokens=256, sequences=2)
    assert both.training
    for layer, share in shares.items():
        alone = BMojoForCausalLM(tiny_config(memory_layers=[layer], **config))
        alone.load_state_dict(both.state_dict())
        assert recall_by_layer(alone, mixer.corpus, layers=[layer], sequence_tokens=256, sequences=2) == {layer: share}
    assert len(set(shares.values())) == 2


def test_the_module_runs_from_the_command_line_and_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["nano", str(tmp_path / "absent"), "--out", str(tmp_path), "--steps", "1"]) == 1
    assert "not a folder" in capsys.readouterr().err
    assert NANO.minutes is not None
