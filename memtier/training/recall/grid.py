"""The cells of the recall suite, and a run through them that can be stopped and gone on with.

    cpu   MQAR at T 256 with 8 pairs, three seeds: at most 40 runs of 150 seconds on one core
    gpu   the sizes of the Zoology paper (Arora et al. 2024, figure 2): T 64 to 1,024, 4 to 256 pairs, a vocabulary of
          8,192, widths 64 to 512, four learning rates; the gap is added to T

A finished cell is a row of a CSV file; a later run skips what is there. Cells come by priority, so that a run that is
stopped early has answered the first questions.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path

from memtier.errors import ConfigError, CorruptMemoryError
from memtier.models.bmojo import BMojoConfig
from memtier.training.recall.models import ModelSize, Variant, recall_config
from memtier.training.recall.tasks import Fillers, RecallTask, TaskName
from memtier.training.recall.train import Recipe, RunResult, run_recall

__all__ = ["GRIDS", "Cell", "cpu_grid", "gpu_grid", "read_rows", "run_grid"]

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Cell:
    """One run: a model, a task, a seed. `priority` orders the runs, lowest first; it is not part of the key."""

    variant: Variant
    eidetic_tokens: int
    rule: str = "innovation"
    task: TaskName = "mqar"
    fillers: Fillers = "zero"
    pairs: int = 8
    tokens: int = 256
    gap: int = 168
    vocabulary: int = 256
    width: int = 32
    heads: int = 1
    learning_rate: float = 6e-3
    steps: int = 500
    batch_tokens: int = 2048
    long_tokens: int = 0
    seed: int = 0
    priority: int = field(default=0, compare=False)

    @property
    def key(self) -> str:
        """What tells this cell from all others, as text."""
        return "/".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self) if f.name != "priority")

    def parts(self) -> tuple[BMojoConfig, RecallTask, Recipe]:
        """The model, the task and how it is trained."""
        config = recall_config(
            self.variant, ModelSize(width=self.width, heads=self.heads), vocabulary=self.vocabulary,
            eidetic_tokens=self.eidetic_tokens, rule=self.rule,
        )  # fmt: skip
        task = RecallTask(self.task, self.pairs, self.tokens, self.gap, self.vocabulary, self.fillers)
        return config, task, Recipe(self.steps, self.batch_tokens, self.learning_rate)

    def run(self, device: str, on_progress: Callable[[int, int], None] | None = None) -> RunResult:
        """Train and ask; see `run_recall`."""
        return run_recall(
            *self.parts(), seed=self.seed, device=device, long_tokens=self.long_tokens, on_progress=on_progress
        )


def cpu_grid() -> list[Cell]:
    """40 cells. The gap is longer than layers * W of every model, the enlarged windows of the rivals included."""
    cells: list[Cell] = []

    def add(priority: int, cell: Cell, seeds: int = 3) -> None:
        cells.extend(replace(cell, seed=seed, priority=priority + 10 * seed) for seed in range(seeds))

    n = 8
    # the claim: M = 2n and 4n, and what carries the bytes of M = 4n otherwise
    add(0, Cell("bmojo", 2 * n))
    add(0, Cell("bmojo", 4 * n))
    add(1, Cell("bmojo", 4 * n, rule="random"))
    add(1, Cell("bmojo", 2 * n, rule="random"))
    add(1, Cell("mamba2", 4 * n))
    add(1, Cell("bmojo_f", 4 * n))
    add(1, Cell("window", 4 * n))
    add(2, Cell("span", 0, long_tokens=4096))
    # the curve over M
    add(3, Cell("bmojo", n // 2), seeds=2)
    add(3, Cell("bmojo", n))
    # one seed each
    add(4, Cell("gated_deltanet", 4 * n), seeds=1)
    add(4, Cell("hybrid", 4 * n), seeds=1)
    add(4, Cell("bmojo", 4 * n, rule="recent"), seeds=1)
    add(4, Cell("bmojo", 4 * n, rule="lowest"), seeds=1)
    # the pairs come first: the oldest are the very tokens that are asked for
    add(4, Cell("bmojo", 2 * n, rule="oldest"), seeds=1)
    add(4, Cell("bmojo", 4 * n, rule="cosine"), seeds=1)
    add(4, Cell("bmojo", 4 * n, fillers="random"), seeds=1)
    add(4, Cell("bmojo_span", 4 * n, long_tokens=4096), seeds=1)
    add(5, Cell("bmojo", 8 * n), seeds=1)
    add(5, Cell("bmojo", 4 * n, task="noisy_recall"), seeds=1)
    add(5, Cell("bmojo", 4 * n, task="selective_copy"), seeds=1)
    return _ordered(cells)


def gpu_grid() -> list[Cell]:
    """The full grid: not run yet by this project."""
    cells: list[Cell] = []
    sizes = ((64, 4), (64, 16), (128, 8), (128, 32), (256, 16), (256, 64), (512, 64), (512, 128), (1024, 256))
    variants: tuple[tuple[Variant, str], ...] = (
        ("bmojo", "innovation"), ("bmojo", "random"), ("mamba2", "innovation"), ("gated_deltanet", "innovation"),
        ("window", "innovation"), ("hybrid", "innovation"), ("bmojo_f", "innovation"), ("span", "innovation"),
    )  # fmt: skip
    for size_rank, (tokens, pairs) in enumerate(sizes):
        for width in (64, 128, 256, 512):
            for rate_rank, rate in enumerate((1e-3, 1e-4 * 10 ** (2 / 3), 1e-2, 1e-4)):
                for variant, rule in variants:
                    cell = Cell(
                        variant, 4 * pairs, rule, pairs=pairs, vocabulary=8192, width=width, heads=width // 64,
                        learning_rate=round(rate, 7), steps=12_500, batch_tokens=65_536,
                        # small and the most likely rate first
                        priority=100 * rate_rank + 10 * size_rank + width // 64,
                    )  # fmt: skip
                    gap = _reach(width, cell.heads, cell.vocabulary, cell.eidetic_tokens)
                    cells.append(replace(cell, gap=gap, tokens=tokens + gap))
    return _ordered(cells)


@cache
def _reach(width: int, heads: int, vocabulary: int, slots: int) -> int:
    """layers * W of the window model of that size, rounded up to a multiple of 64: the widest of all."""
    size = ModelSize(width=width, heads=heads)
    window = recall_config("window", size, vocabulary=vocabulary, eidetic_tokens=slots)
    return -(-size.layers * window.window_tokens // 64) * 64


GRIDS: dict[str, Callable[[], list[Cell]]] = {"cpu": cpu_grid, "gpu": gpu_grid}


def run_grid(
    cells: Iterable[Cell],
    out: Path,
    *,
    device: str,
    most_cells: int | None = None,
    minutes: float | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> tuple[int, int]:
    """Run the cells that the CSV file `out` lacks, in their order, and write a row for each.

    Args:
        most_cells, minutes: begin no further cell after so many, or so long.
        on_progress: called with the name of the present cell, and steps done and in all of the cells to be run.

    Returns:
        Cells run now, and cells still to be run.
    """
    cells = list(cells)
    done = {row["key"] for row in read_rows(out)}
    waiting = [cell for cell in cells if cell.key not in done]
    todo = waiting if most_cells is None else waiting[:most_cells]
    begun, ran = time.monotonic(), 0
    total, before = sum(cell.steps for cell in todo), 0
    for cell in todo:
        if minutes is not None and time.monotonic() - begun >= 60.0 * minutes:
            break
        name = f"{cell.variant} M {cell.eidetic_tokens} {cell.rule}, seed {cell.seed}"

        def show(step: int, steps: int, name: str = name, before: int = before) -> None:
            if on_progress is not None:
                on_progress(name, before + step, total)

        result = cell.run(device, show)
        _append(out, {"key": cell.key, **asdict(cell), "device": device, **asdict(result)})
        before, ran = before + cell.steps, ran + 1
    return ran, len(waiting) - ran


def read_rows(path: Path) -> list[Row]:
    """The finished cells.

    Raises:
        CorruptMemoryError: the file is not one of this suite.
    """
    if not path.exists():
        return []
    # a row that a crash cut short has no end of line; it is run again
    whole = path.read_text().rpartition("\n")[0]
    reader = csv.DictReader(whole.splitlines())
    rows = list(reader)
    if reader.fieldnames != _columns():
        raise CorruptMemoryError(
            f"{path} has columns {reader.fieldnames}; {_columns()} were expected. Move it away, or give another --out."
        )
    return rows


def _columns() -> list[str]:
    return ["key", *(f.name for f in fields(Cell)), "device", *(f.name for f in fields(RunResult))]


def _append(path: Path, row: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a+", newline="") as file:
        file.seek(0)
        file.truncate(len((file.read().rpartition("\n")[0] + "\n").encode()) if not fresh else 0)
        writer = csv.DictWriter(file, _columns(), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in row.items()})
        file.flush()
        os.fsync(file.fileno())


def _ordered(cells: list[Cell]) -> list[Cell]:
    """By priority; equals in the order of the list."""
    keys = [cell.key for cell in cells]
    if len(set(keys)) != len(keys):
        raise ConfigError("two cells of a grid have one key.")
    return sorted(cells, key=lambda cell: cell.priority)
