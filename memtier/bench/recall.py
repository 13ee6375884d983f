"""`memtier bench recall`: models compared at equal bytes of memory on tasks whose answers lie outside the window."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memtier.bench.demo import OnProgress
from memtier.bench.machine import describe_machine
from memtier.bench.rows import results_folder
from memtier.errors import ConfigError

__all__ = ["RecallOptions", "run_recall_bench"]


@dataclass(frozen=True, slots=True)
class RecallOptions:
    """Which cells to run; see `memtier.training.recall.grid`.

    Args:
        grid: "cpu" or "gpu".
        cells, minutes: begin no further cell after so many, or so long; cells=0 only reports what is there.
        out: folder of the CSV files and plots; None for docs/results/recall of the checkout.
        command: what the user typed.
    """

    grid: str = "cpu"
    cells: int | None = None
    minutes: float | None = None
    out: Path | None = None
    plots: bool = False
    device: str = "auto"
    threads: int | None = 1
    command: str = "memtier bench recall --json"


def run_recall_bench(options: RecallOptions, on_progress: OnProgress) -> dict[str, Any]:
    """Run the cells that are not done yet and report all that are, ready for JSON.

    Raises:
        ConfigError: an option that cannot work; plots without matplotlib.
    """
    from memtier.training.recall.grid import GRIDS, read_rows, run_grid
    from memtier.training.recall.report import draw_plots, find_matplotlib, summarise, write_summary

    if options.grid not in GRIDS:
        raise ConfigError(f"--grid is {options.grid!r}; use one of {', '.join(GRIDS)}.")
    if (options.cells or 0) < 0 or (options.minutes or 0) < 0:
        raise ConfigError(f"--cells is {options.cells} and --minutes is {options.minutes}; neither may be negative.")
    if options.plots:
        # before hours of training, not after
        find_matplotlib()
    folder = options.out or results_folder() / "recall"
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    path = folder / f"{options.grid}.csv"
    cells = GRIDS[options.grid]()
    before = torch.get_num_threads()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        ran, waiting = run_grid(
            cells,
            path,
            device=device,
            most_cells=options.cells,
            minutes=options.minutes,
            on_progress=lambda _, done, total: on_progress("recall", done, total),
        )
    finally:
        torch.set_num_threads(before)
    keys = {cell.key for cell in cells}
    summary = summarise([row for row in read_rows(path) if row["key"] in keys])
    write_summary(summary, folder / f"{options.grid}_summary.csv")
    plots = draw_plots(summary, folder, options.grid) if options.plots else []
    return {
        "command": options.command,
        "machine": describe_machine(),
        "grid": options.grid,
        "cells": len(cells),
        "ran": ran,
        "waiting": waiting,
        "written_to": [str(path), str(folder / f"{options.grid}_summary.csv"), *map(str, plots)],
        "summary": summary,
    }
