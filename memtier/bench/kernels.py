"""`memtier bench kernels`: the operations and their peers, timed in one run by `kernels/benchmarks` of a checkout."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import memtier_kernels
from memtier.bench.demo import OnProgress
from memtier.bench.machine import describe_machine
from memtier.errors import ConfigError

__all__ = ["KernelOptions", "run_kernels"]


@dataclass(frozen=True, slots=True)
class KernelOptions:
    """What to time, and how long; see `kernels/benchmarks/run.py`. `command` is what the user typed."""

    device: str = "auto"
    only: str = ""
    repeat: int = 1
    seconds: float = 2.0
    threads: int | None = None
    out: Path | None = None
    command: str = "memtier bench kernels --json"


def run_kernels(options: KernelOptions, on_progress: OnProgress) -> dict[str, Any]:
    """Time the cases, write the CSV, and return all of it, ready for JSON; `failed` counts ops whose checks are red.

    Raises:
        ConfigError: this is not a checkout, which alone holds the benchmarks; or no case has such a name.
    """
    folder = Path(memtier_kernels.__file__).parents[1] / "benchmarks"
    if not (folder / "run.py").exists():
        raise ConfigError(
            f"the kernel benchmarks are not packaged, and {folder} is not there. Run this from a clone of the project."
        )
    if options.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device is {options.device!r}; it must be 'auto', 'cpu' or 'cuda'.")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    run = _load(folder / "run.py")
    rows = run.run(
        device, only=options.only, repeat=options.repeat, seconds=options.seconds, threads=options.threads,
        on_progress=on_progress,
    )  # fmt: skip
    if not rows:
        raise ConfigError(f"no case for {device} has {options.only!r} in its name. See kernels/benchmarks/cases.py.")
    out = options.out or folder / "results" / f"{device}.csv"
    run.write(rows, out)
    return {
        "command": options.command,
        "machine": describe_machine(),
        "written_to": str(out),
        "failed": sum(row["status"].startswith("failed") for row in rows),
        "rows": rows,
    }


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("memtier_benchmark_run", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
