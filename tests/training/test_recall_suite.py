"""The recall suite: tasks as their papers define them, models of equal memory, a grid that can be gone on with."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from memtier.cache import TieredCache
from memtier.cli import app
from memtier.errors import ConfigError, CorruptMemoryError
from memtier.models.bmojo import BMojoForCausalLM
from memtier.training.recall import grid as grid_module
from memtier.training.recall.grid import Cell, cpu_grid, gpu_grid, read_rows, run_grid
from memtier.training.recall.models import RIVALS, VARIANTS, ModelSize, memory_bytes, recall_config
from memtier.training.recall.report import draw_plots, summarise
from memtier.training.recall.tasks import FILLER, RecallTask
from memtier.training.recall.train import Recipe, ask

TASKS = [
    RecallTask(name, pairs=5, tokens=90, gap=30, vocabulary=64, fillers=fillers)
    for name in ("mqar", "noisy_recall", "selective_copy")
    for fillers in ("zero", "random")
]


def each_task(function):
    return pytest.mark.parametrize("task", TASKS, ids=lambda t: f"{t.name}-{t.fillers}")(function)


@each_task
def test_a_batch_is_a_function_of_seed_and_step(task):
    one, again = task.batch(3, 7, 4), task.batch(3, 7, 4)
    others = [task.batch(4, 7, 4), task.batch(3, 8, 4), task.batch(3, 7, 4, held_out=True)]
    for name in ("tokens", "labels", "source"):
        assert np.array_equal(getattr(one, name), getattr(again, name))
    assert all(not np.array_equal(one.tokens, other.tokens) for other in others)


@each_task
def test_every_answer_stands_before_the_gap_and_is_asked_for_after_it(task):
    batch = task.batch(0, 0, 50)
    rows, asked = np.nonzero(batch.labels >= 0)
    source = batch.source[rows, asked]
    assert len(rows) == 50 * 5
    assert np.array_equal(batch.tokens[rows, source], batch.labels[rows, asked])
    assert source.max() < task.context_tokens
    assert asked.min() >= task.context_tokens + task.gap
    assert np.array_equal(batch.labels >= 0, batch.source >= 0)
    assert batch.tokens.min() >= 0
    assert batch.tokens.max() < task.vocabulary


@each_task
def test_fillers_are_of_their_kind_and_leave_the_rest_as_it_is(task):
    batch = task.batch(0, 0, 50)
    gap = batch.tokens[:, task.context_tokens : task.context_tokens + task.gap]
    plain = replace(task, fillers="zero").batch(0, 0, 50)
    if task.fillers == "zero":
        assert (gap == FILLER).all()
    else:
        assert (gap != FILLER).all()
        assert len(np.unique(gap)) > 15
    matters = plain.tokens != FILLER
    assert np.array_equal(batch.tokens[matters], plain.tokens[matters])
    assert np.array_equal(batch.labels, plain.labels)


def test_mqar_asks_each_key_once_near_more_often_than_far():
    task = RecallTask("mqar", pairs=8, tokens=256, gap=40, vocabulary=128)
    batch = task.batch(0, 0, 400)
    keys = batch.tokens[:, 0:16:2]
    assert all(len(set(row)) == 8 for row in keys.tolist())
    assert keys.max() < 64 <= batch.tokens[:, 1:16:2].min()
    asked = np.nonzero(batch.labels >= 0)[1].reshape(400, 8)
    assert all(
        sorted(batch.tokens[row, asked[row]]) == sorted(keys[row]) for row in range(400)
    )  # fmt: skip
    slots = (asked - 56) // 2
    space = 100
    # without replacement the first slot is taken almost always, a far one seldom; and each slot at most once a row
    law = np.bincount(slots.ravel(), minlength=space) / 400
    assert law[0] > 0.75 > law[1:4].mean() > law[10:30].mean() > law[60:].mean()
    assert law.max() <= 1.0


def test_noisy_recall_keeps_noise_in_a_vocabulary_of_its_own():
    task = RecallTask("noisy_recall", pairs=6, tokens=120, gap=20, vocabulary=62, noise=0.25)
    batch = task.batch(0, 0, 30)
    context = batch.tokens[:, : task.context_tokens].reshape(30, -1, 2)
    pairs = context[:, :, 0] < 41
    assert context.shape[1] == 8
    assert (pairs.sum(1) == 6).all()
    assert (context[pairs][:, 1] >= 21).all() and (context[pairs][:, 1] < 41).all()
    assert (context[~pairs] >= 41).all()
    # the value follows its key again where it is asked for
    rows, asked = np.nonzero(batch.labels >= 0)
    assert np.array_equal(batch.tokens[rows, asked + 1], batch.labels[rows, asked])


def test_selective_copying_asks_in_order_after_the_copy_token():
    task = RecallTask("selective_copy", pairs=4, tokens=60, gap=10, vocabulary=32)
    batch = task.batch(0, 0, 30)
    for row in range(30):
        context = batch.tokens[row, : task.context_tokens]
        assert batch.tokens[row, task.context_tokens + 10] == 31
        asked = np.nonzero(batch.labels[row] >= 0)[0]
        assert batch.labels[row, asked].tolist() == context[context != FILLER].tolist()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"name": "copying"}, "task"), ({"fillers": "ones"}, "fillers"), ({"tokens": 40}, "tokens"),
        ({"pairs": 0}, "pairs"), ({"vocabulary": 20}, "vocabulary"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_is_refused_by_name(changes, word):
    with pytest.raises(ConfigError, match=word):
        RecallTask(**({"name": "mqar", "pairs": 8, "tokens": 64, "gap": 30, "vocabulary": 64} | changes))


@pytest.mark.parametrize("slots", [16, 32])
def test_rivals_carry_as_many_bytes_as_bmojo_or_a_few_more(slots):
    size = ModelSize()
    wanted = memory_bytes(recall_config("bmojo", size, vocabulary=64, eidetic_tokens=slots))
    for variant in RIVALS:
        has = memory_bytes(recall_config(variant, size, vocabulary=64, eidetic_tokens=slots))
        assert wanted <= has <= 1.04 * wanted, variant
    assert memory_bytes(recall_config("span", size, vocabulary=64, eidetic_tokens=0)) < wanted


def test_the_bytes_are_those_of_every_tensor_that_is_carried():
    config = recall_config("bmojo", ModelSize(), vocabulary=64, eidetic_tokens=8)
    cache, counts = TieredCache(config), {"position", "boundary", "marks"}
    tensors = {k: v for k, v in cache.state_dict().items() if k not in counts and "log_decay_tokens" not in k}
    assert memory_bytes(config) == sum(t.numel() * t.element_size() for t in tensors.values())


def test_the_grids_keep_every_question_outside_every_window():
    small = [cell for cell in gpu_grid() if cell.width == 64 and cell.pairs <= 8]
    for cells in (cpu_grid(), small):
        assert len({cell.key for cell in cells}) == len(cells)
        assert [cell.priority for cell in cells] == sorted(cell.priority for cell in cells)
        for cell in {replace(c, seed=0, rule="innovation", learning_rate=1.0): c for c in cells}:
            size = ModelSize(width=cell.width, heads=cell.heads)
            config = recall_config(
                cell.variant, size, vocabulary=cell.vocabulary, eidetic_tokens=cell.eidetic_tokens
            )  # fmt: skip
            windows = [kind for kind in config.layer_types if kind in ("bmojo", "sliding_attention")]
            assert cell.gap >= len(windows) * config.window_tokens, cell.key
            RecallTask(cell.task, cell.pairs, cell.tokens, cell.gap, cell.vocabulary, cell.fillers)
    assert len(cpu_grid()) <= 40
    claim = [c for c in cpu_grid() if c.variant == "bmojo" and c.rule == "innovation" and c.eidetic_tokens in (16, 32)]
    assert {c.seed for c in claim if c.task == "mqar" and c.fillers == "zero"} == {0, 1, 2}


SMALL = Cell("bmojo", 4, pairs=2, tokens=44, gap=20, vocabulary=20, width=8, steps=3, batch_tokens=128)


def test_a_run_is_a_function_of_its_cell_and_its_loss_falls():
    cell = replace(SMALL, steps=40, width=16, learning_rate=1e-2, batch_tokens=512)
    one, again = cell.run("cpu"), cell.run("cpu")
    clocks = {"seconds", "wall_seconds"}
    assert {k: v for k, v in asdict(one).items() if k not in clocks and v == v} == {
        k: v for k, v in asdict(again).items() if k not in clocks and v == v
    }
    assert one.loss < np.log(20) - 0.2


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_and_is_asked(variant):
    long = 88 if "span" in variant else 0
    result = replace(SMALL, variant=variant, long_tokens=long).run("cpu")
    assert 0.0 <= result.accuracy <= 1.0
    assert np.isnan(result.long_accuracy) == (not long)
    assert np.isnan(result.block_hit) == ("span" not in variant)


def test_span_controls_find_what_they_should():
    config = recall_config("span", ModelSize(width=16, window_tokens=4), vocabulary=64, eidetic_tokens=0)
    torch.manual_seed(0)
    model = BMojoForCausalLM(config)
    task = RecallTask("mqar", pairs=8, tokens=400, gap=100, vocabulary=64)
    hits = {rule: ask(model, task, 16, span_rule=rule).block_hit for rule in ("on", "oracle", "recent", "random")}
    assert hits["oracle"] == 1.0
    assert hits["recent"] == 0.0
    # 4 of 29 to 100 blocks
    assert 0.02 < hits["random"] < 0.2


def test_asking_reads_in_steps_what_training_reads_at_once():
    config = recall_config("bmojo_span", ModelSize(width=16), vocabulary=64, eidetic_tokens=4)
    torch.manual_seed(0)
    model = BMojoForCausalLM(config)
    task = RecallTask("mqar", pairs=4, tokens=700, gap=100, vocabulary=64)
    batch = task.batch(0, 0, 8, held_out=True)
    with torch.inference_mode():
        logits = model.eval()(torch.from_numpy(batch.tokens)).logits
    at = torch.from_numpy(batch.labels >= 0)
    right = (logits[at].argmax(-1) == torch.from_numpy(batch.labels)[at]).float().mean()
    assert ask(model, task, 8).accuracy == pytest.approx(float(right))


def test_a_grid_goes_on_where_it_stopped(tmp_path):
    out = tmp_path / "rows.csv"
    cells = [replace(SMALL, seed=seed) for seed in range(3)]
    seen = []
    note = lambda name, done, total: seen.append((done, total))  # noqa: E731
    assert run_grid(cells, out, device="cpu", most_cells=1, on_progress=note) == (1, 2)
    assert seen[-1] == (3, 3)
    first = out.read_text()
    # a crash in the middle of a row
    out.write_text(first + first.splitlines()[1][:-3])
    assert run_grid(cells, out, device="cpu", minutes=0.0) == (0, 2)
    assert run_grid(cells, out, device="cpu") == (2, 0)
    assert [row["seed"] for row in read_rows(out)] == ["0", "1", "2"]
    assert run_grid(cells, out, device="cpu") == (0, 0)
    assert run_grid([replace(cells[0], steps=4)], out, device="cpu", most_cells=0) == (0, 1)


def test_a_file_of_something_else_is_refused(tmp_path):
    out = tmp_path / "rows.csv"
    out.write_text("a,b\n1,2\n")
    with pytest.raises(CorruptMemoryError, match="columns"):
        read_rows(out)


def rows_of(*accuracies, **changes):
    base = {"key": "", **{k: str(v) for k, v in asdict(replace(SMALL, **changes)).items()}}
    base |= {
        "memory_bytes": "1000",
        "block_hit": "nan",
        "long_accuracy": "nan",
        "long_block_hit": "nan",
        "seconds": "2",
    }
    return [{**base, "seed": str(i), "accuracy": str(a)} for i, a in enumerate(accuracies)]


def test_the_summary_is_mean_and_spread_over_seeds():
    rows = rows_of(0.9, 1.0, 0.8) + rows_of(0.1, rule="random")
    best, control = summarise(rows)
    assert (best["seeds"], best["accuracy"], best["lowest"], best["highest"]) == ("3", "0.900", "0.800", "1.000")
    assert (control["rule"], control["seeds"], control["block_hit"]) == ("random", "1", "")


def test_plots_are_drawn_into_files(tmp_path):
    pytest.importorskip("matplotlib")
    rows = rows_of(0.9, 1.0) + rows_of(0.5, eidetic_tokens=2) + rows_of(0.1, rule="random")
    for path in draw_plots(summarise(rows), tmp_path, "cpu"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_plots_without_matplotlib_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"memtier\[plots\]"):
        draw_plots([], tmp_path, "cpu")


def test_the_command_runs_the_missing_cells_and_reports_all(tmp_path, monkeypatch):
    monkeypatch.setitem(grid_module.GRIDS, "cpu", lambda: [SMALL, replace(SMALL, rule="random")])
    arguments = ["bench", "recall", "--out", str(tmp_path), "--json"]
    done = CliRunner().invoke(app, [*arguments, "--cells", "1"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["waiting"] == 1
    report = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert (report["ran"], report["waiting"], len(report["summary"])) == (1, 0, 2)
    with (tmp_path / "cpu_summary.csv").open() as file:
        assert [row["rule"] for row in csv.DictReader(file)] == [row["rule"] for row in report["summary"]]
    table = CliRunner().invoke(app, ["bench", "recall", "--out", str(tmp_path), "--cells", "0"])
    assert table.exit_code == 0
    assert "2 of 2 runs" in table.stdout
    assert CliRunner().invoke(app, ["bench", "recall", "--grid", "tpu"]).exit_code == 1


def test_a_rate_that_breaks_training_is_an_error_and_no_row(tmp_path):
    from memtier.errors import ModelError

    with pytest.raises(ModelError, match="learning_rate"):
        run_grid([replace(SMALL, learning_rate=1e30, steps=12)], tmp_path / "rows.csv", device="cpu")
    assert read_rows(tmp_path / "rows.csv") == []


def test_the_recipe_begins_short_and_ends_at_the_task():
    task, recipe = RecallTask("mqar", pairs=8, tokens=256, gap=168), Recipe(steps=100, short_share=0.75)
    assert [recipe.task_at(task, step).tokens for step in (0, 74, 75, 99)] == [48, 48, 256, 256]
    assert recipe.task_at(task, 0).gap == 16
    rates = [recipe.plan.rate(step) for step in range(100)]
    assert max(rates) == pytest.approx(recipe.learning_rate)
    assert rates[0] < rates[5] < rates[10] and rates[99] < 0.01 * recipe.learning_rate
