"""A run resumes to the bit, refuses another plan, stops on time, and reads under drawn sizes of the span."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from memtier.cli import app
from memtier.errors import ConfigError, IncompatibleMemoryError, ModelError
from memtier.models.bmojo import BMojoForCausalLM
from memtier.testing import tiny_config, tiny_model
from memtier.training.__main__ import main
from memtier.training.corpus import Corpus
from memtier.training.course import Lesson, SpanDraw
from memtier.training.fit import CHECKPOINT_NAME, LOG_NAME, FitRow, fit
from memtier.training.fit_settings import FitSettings, Precision
from memtier.training.golden import golden_text
from memtier.training.objective import NO_TARGET
from memtier.training.text import TextCourse, TextLessons, held_out, text_ids

TEXT = b"The miller rose early, and the river ran under the wheel as it had always run.\n" * 40
SPAN = SpanDraw(refresh_tokens=(2, 4, 8), blocks=(0, 1, 3))
LESSONS = TextLessons(sequence_tokens=64, batch_tokens=128, span=SPAN)
SETTINGS = FitSettings(
    steps=6, learning_rate=1e-2, precision="float32", log_every_steps=2, checkpoint_every_seconds=0.0
)  # fmt: skip
SHORT = replace(SETTINGS, steps=2)
VARIANTS = [
    pytest.param(SETTINGS, id="whole"),
    pytest.param(replace(SETTINGS, piece_tokens=24, gradient_checkpointing=True), id="pieces-checkpointed"),
    pytest.param(replace(SETTINGS, precision="bfloat16", piece_tokens=40), id="bfloat16-pieces"),
]


def course(settings: FitSettings = SETTINGS, seed: int = 5, lessons: TextLessons = LESSONS) -> TextCourse:
    text = text_ids(Corpus.from_bytes(TEXT[:-400], TEXT[-400:]), None, 260)
    return TextCourse(text, lessons, tiny_config().memory_settings(), steps=settings.steps, seed=seed)


def new_model() -> BMojoForCausalLM:
    return tiny_model(initializer_range=0.1)


def rows(folder: Path) -> list[dict[str, str]]:
    clocks = ("seconds", "tokens_per_second")
    with (folder / LOG_NAME).open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in clocks} for row in csv.DictReader(file)]


class Stopped(Exception):
    pass


def stop_at(step: int) -> Any:
    def stop(row: FitRow) -> None:
        if row.step == step:
            raise Stopped

    return stop


@pytest.mark.parametrize("settings", VARIANTS)
def test_a_resumed_run_equals_the_uninterrupted_one_to_the_bit(settings: FitSettings, tmp_path: Path) -> None:
    whole, resumed = new_model(), new_model()
    report = fit(whole, course(settings), settings, out=tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(new_model(), course(settings), settings, out=tmp_path / "parts", on_row=stop_at(4))
    again = fit(resumed, course(settings), settings, out=tmp_path / "parts")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    assert (report.loss, report.tokens, report.step) == (again.loss, again.tokens, again.step)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_loss_falls(precision: Precision, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=12, precision=precision, gradient_checkpointing=True)
    model = new_model().eval()
    fit(model, course(settings), settings, out=tmp_path)
    log = rows(tmp_path)
    assert float(log[-1]["loss"]) < float(log[0]["loss"]) - 0.3
    assert log[-1]["skipped_steps"] == "0"
    assert not model.training
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_sizes_of_the_span_are_drawn_anew_each_step_and_repeat_with_the_seed() -> None:
    memory = tiny_config().memory_settings()
    drawn = [(SPAN.draw(memory, 0, i).span_refresh_tokens, SPAN.draw(memory, 0, i).span_blocks) for i in range(60)]
    assert {r for r, _ in drawn} == {2, 4, 8}
    assert {k for _, k in drawn} == {0, 1, 3}
    assert drawn != [
        (SPAN.draw(memory, 1, i).span_refresh_tokens, SPAN.draw(memory, 1, i).span_blocks) for i in range(60)
    ]
    assert SpanDraw().draw(memory, 0, 0) == memory
    assert course().lesson(3).memory == course().lesson(3).memory


def test_what_a_lesson_draws_is_what_the_model_reads_under(monkeypatch: pytest.MonkeyPatch) -> None:
    from memtier.models.bmojo import modeling_bmojo

    seen, original = [], modeling_bmojo.make_plan

    def note(settings: Any, *rest: Any) -> Any:
        seen.append(settings)
        return original(settings, *rest)

    monkeypatch.setattr(modeling_bmojo, "make_plan", note)
    fit(new_model(), course(), SETTINGS)
    assert seen == [course().lesson(step).memory for step in range(SETTINGS.steps)]
    assert len(set(seen)) > 1


def test_lessons_are_functions_of_seed_and_step_and_targets_follow_tokens() -> None:
    lesson, again, other = course().lesson(2), course().lesson(2), course(seed=6).lesson(2)
    assert np.array_equal(lesson.tokens, again.tokens) and not np.array_equal(lesson.tokens, other.tokens)
    assert lesson.tokens.shape == (2, 64) and (lesson.tokens[:, 0] == 256).all()
    assert np.array_equal(lesson.tokens[:, 1:], lesson.targets[:, :-1])
    text = bytes(lesson.targets[0].astype(np.uint8))
    assert text in TEXT


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"settings": replace(SHORT, learning_rate=1e-3)}, "learning_rate"),
        ({"settings": replace(SHORT, piece_tokens=16)}, "piece_tokens"),
        ({"seed": 6}, "seed"),
        ({"lessons": replace(LESSONS, span=SpanDraw())}, "span"),
    ],
    ids=["rate", "pieces", "seed", "span"],
)
def test_a_checkpoint_of_another_plan_is_refused_by_name(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    fit(new_model(), course(SHORT), SHORT, out=tmp_path)
    settings = changes.pop("settings", SHORT)
    with pytest.raises(ConfigError, match=word):
        fit(new_model(), course(settings, **changes), settings, out=tmp_path)
    fit(new_model(), course(settings, **changes), settings, out=tmp_path, resume=False)


def test_a_checkpoint_of_other_frozen_weights_or_of_another_model_is_refused(tmp_path: Path) -> None:
    def half_frozen(seed: int) -> BMojoForCausalLM:
        model = tiny_model(seed, initializer_range=0.1)
        model.model.embed_tokens.requires_grad_(False)
        return model

    fit(half_frozen(0), course(SHORT), SHORT, out=tmp_path)
    with pytest.raises(ConfigError, match="frozen_weights"):
        fit(half_frozen(1), course(SHORT), SHORT, out=tmp_path)
    with pytest.raises(IncompatibleMemoryError, match="another model"):
        fit(tiny_model(hidden_size=24), course(SHORT), SHORT, out=tmp_path)


def test_frozen_weights_do_not_move_and_are_not_in_the_checkpoint(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = new_model()
    model.model.embed_tokens.requires_grad_(False)
    before = model.model.embed_tokens.weight.clone()
    fit(model, course(), SETTINGS, out=tmp_path)
    assert torch.equal(before, model.model.embed_tokens.weight)
    with safe_open(str(tmp_path / CHECKPOINT_NAME), framework="pt") as file:
        names = set(file.keys())
    assert "model.model.norm.weight" in names and not any("embed_tokens" in name for name in names)


def test_a_run_out_of_time_stops_with_a_checkpoint_and_keeps_its_plan(tmp_path: Path) -> None:
    whole, parts = new_model(), new_model()
    fit(whole, course(), SETTINGS)
    report = fit(parts, course(), replace(SETTINGS, checkpoint_every_seconds=1e9), out=tmp_path, minutes=0.0)
    assert (report.step, report.finished) == (2, False)
    assert fit(parts, course(), SETTINGS, out=tmp_path).finished
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]), name


def test_a_rate_that_breaks_training_is_an_error() -> None:
    settings = replace(SETTINGS, learning_rate=1e30, steps=14)
    with pytest.raises(ModelError, match="learning_rate"):
        fit(new_model(), course(settings), settings)


def test_dense_far_attention_in_pieces_is_refused() -> None:
    settings = replace(SETTINGS, piece_tokens=24)
    with pytest.raises(ConfigError, match="dense_until"):
        fit(new_model(), course(settings, lessons=replace(LESSONS, dense_until=0.5)), settings)


@pytest.mark.parametrize("piece", [None, 16])
def test_a_piece_without_targets_is_no_nan(piece: int | None) -> None:
    class Last:
        identity: ClassVar = {"recipe": "last"}

        def lesson(self, step: int) -> Lesson:
            made = course().lesson(step)
            targets = made.targets.copy()
            targets[:, :40] = NO_TARGET
            return replace(made, targets=targets)

    settings = replace(SHORT, piece_tokens=piece)
    report = fit(new_model(), Last(), settings)
    assert report.skipped_steps == 0 and report.loss > 0


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"piece_tokens": 0}, {"warmup_share": 1.0}, {"precision": "float8"}],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FitSettings(**wrong)
    with pytest.raises(ConfigError, match="span_refresh_tokens"):
        SpanDraw(refresh_tokens=(0,))


def test_held_out_text_is_read_as_a_session_reads_it() -> None:
    model = new_model()
    text = text_ids(Corpus.from_bytes(TEXT[:-400], TEXT[-400:]), None, 260)
    told = held_out(model, text, sequence_tokens=1000, sequences=1)
    assert told.sequence_tokens == 399
    tokens = torch.from_numpy(np.concatenate([[256], text.held_out[:399]]).astype(np.int64))[None]
    with torch.inference_mode():
        loss = model(tokens, labels=tokens).lm_loss
    assert told.bits_per_byte == pytest.approx(float(loss) / np.log(2), rel=1e-5)


def test_the_commands_train_stop_and_go_on(tmp_path: Path) -> None:
    corpus = golden_text(tmp_path / "text")
    sizes = {"hidden_size": 16, "head_dim": 8, "ssm_head_dim": 8, "num_hidden_layers": 1, "window_tokens": 16}
    lm = ["train", "lm", str(corpus), "--out", str(tmp_path / "lm"), "--steps", "2", "--log-every", "1", "--json"]
    lm += ["--sequence-tokens", "96", "--batch-tokens", "96", "--piece-tokens", "48", "--span-blocks", "1,2"]
    for name, value in sizes.items():
        lm += ["--config", f"{name}={value}"]
    stopped = CliRunner().invoke(app, [*lm, "--minutes", "0"])
    assert stopped.exit_code == 0, stopped.output
    assert json.loads(stopped.stdout)["finished"] is False
    assert not (tmp_path / "lm" / "model.safetensors").exists()
    report = json.loads(CliRunner().invoke(app, lm).stdout)
    assert report["finished"] and report["step"] == 2 and report["held_out"]["bits_per_byte"] > 0
    assert (tmp_path / "lm" / "tokenizer.json").exists()
    assert BMojoForCausalLM.from_pretrained(str(tmp_path / "lm")).config.hidden_size == 16

    on = ["--model", str(tmp_path / "lm"), "--out", str(tmp_path / "on")]
    further = CliRunner().invoke(app, [*lm[:3], *on, *lm[5:16]])
    assert further.exit_code == 0, further.output

    recall = ["train", "recall", "--out", str(tmp_path / "recall"), "--pairs", "2", "--tokens", "44", "--gap", "20"]
    recall += ["--vocabulary", "20", "--width", "8", "--steps", "3", "--batch-tokens", "128", "--eidetic-tokens", "4"]
    told = CliRunner().invoke(app, [*recall, "--json"])
    assert told.exit_code == 0, told.output
    assert 0.0 <= json.loads(told.stdout)["accuracy"] <= 1.0
    assert json.loads((tmp_path / "recall" / "training.json").read_text())["cell"]["pairs"] == 2
    pieces = [*recall, "--out", str(tmp_path / "pieces"), "--variant", "bmojo_span", "--piece-tokens", "16"]
    assert "dense_until" in str(CliRunner().invoke(app, pieces).exception)
    assert CliRunner().invoke(app, [*pieces, "--dense-until", "0", "--no-resume"]).exit_code == 0
    wrong = CliRunner().invoke(app, ["train", "lm", str(corpus), "--out", str(tmp_path), "--span-blocks", "x"])
    assert isinstance(wrong.exception, ConfigError)


def test_the_module_runs_every_recipe_without_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = golden_text(tmp_path / "text")

    def run(*arguments: str, **settings: Any) -> Any:
        pairs = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        assert main([*arguments, "--quiet", "--device", "cpu", *pairs]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    tiny = {"hidden_size": 16, "head_dim": 8, "ssm_head_dim": 8, "num_hidden_layers": 1, "window_tokens": 16}
    config = [part for name, value in tiny.items() for part in ("--config", f"{name}={value}")]
    sizes = {"steps": 1, "sequence_tokens": 96, "batch_tokens": 96}
    report = run("lm", str(corpus), "--out", str(tmp_path / "lm"), *config, **sizes, blocks=(1, 2))
    assert report["finished"]
    report = run(
        "hylora", report["folder"], str(corpus), "--out", str(tmp_path / "a"), **sizes, rank=2, piece_tokens=48
    )
    assert report["after"]["sequence_tokens"] == 96
    report = run("recall", "--out", str(tmp_path / "r"), pairs=2, tokens=44, gap=20, vocabulary=20, width=8, steps=1)
    assert report["step"] == 1
    again = ["recall", "--out", str(tmp_path / "shown"), "--device", "cpu", "--set", "steps=2", "--set", "width=8"]
    assert main([*again, "--set", "batch_tokens=256"]) == 0
    assert "step 2 of 2" in capsys.readouterr().err
    assert main(["recall", "--out", str(tmp_path / "r"), "--set", "wings=2"]) == 1
    assert "wings" in capsys.readouterr().err
