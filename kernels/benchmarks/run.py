"""Time the operations and their peers in one run, and write the numbers as CSV.

    python kernels/benchmarks/run.py --device cuda --repeat 2      (or: memtier bench kernels --device cuda)

An op is checked against its float64 reference before it is timed, and is not timed where it fails. Candidates of a case
are timed by turns, so that a machine whose speed drifts slows all of them. Without the device the cases are written
down as "not measured". Needs torch (and transformers for the CPU's Mamba-2 case), nothing else of memtier's.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from memtier_kernels.testing import compare, make_inputs

HERE = Path(__file__).parent
COLUMNS = (
    "case", "op", "candidate", "status", "pass", "median_ms", "low_ms", "high_ms", "times_memtier", "tflops",
    "gigabytes_per_second", "gigapairs_per_second", "sizes", "demand", "device", "dtype", "versions", "commit", "date",
)  # fmt: skip
ERROR_LIMIT = {"float32": 1e-5, "bfloat16": 2e-2}


def main(arguments: list[str] | None = None) -> int:
    """Run as a program; the exit code is 1 if an op failed its checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--repeat", type=int, default=1, help="whole passes over the cases")
    parser.add_argument("--seconds", type=float, default=2.0, help="time to spend on a candidate in a pass")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads")
    parser.add_argument("--out", type=Path, default=None, help="CSV file (default: results/DEVICE.csv)")
    asked = parser.parse_args(arguments)
    rows = run(
        asked.device, only=asked.only, repeat=asked.repeat, seconds=asked.seconds, threads=asked.threads,
        on_row=lambda row: print(_line(row), file=sys.stderr),
    )  # fmt: skip
    write(rows, asked.out or HERE / "results" / f"{asked.device}.csv")
    return int(any(row["status"].startswith("failed") for row in rows))


def run(
    device: str, *, only: str = "", repeat: int = 1, seconds: float = 2.0, threads: int | None = None,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for every candidate of every case, and for the errors of every op; keys are `COLUMNS`."""
    if threads is not None:
        torch.set_num_threads(threads)
    where, rows, red = _where(device), [], set()

    def note(**values: Any) -> None:
        rows.append({**dict.fromkeys(COLUMNS, ""), **where, **values})
        on_row(rows[-1])

    cases = [case for case in _cases().CASES if case.device == device and only in case.name]
    if device == "cuda" and not torch.cuda.is_available():
        for case in cases:
            note(case=case.name, op=case.op, status="not measured", sizes=json.dumps(case.sizes), demand=case.demand)
        return rows
    ops = list(dict.fromkeys(case.op for case in cases))
    for done, op in enumerate(ops):
        on_progress("checks", done, len(ops))
        for name, status in _checks(op, device):
            note(case=name, op=op, candidate="memtier", status=status)
            if status.startswith("failed"):
                red.add(op)
    on_progress("checks", len(ops), len(ops))
    for number in range(repeat):
        for done, case in enumerate(cases, number * len(cases)):
            on_progress("cases", done, repeat * len(cases))
            shared = {"case": case.name, "op": case.op, "sizes": json.dumps(case.sizes), "demand": case.demand}
            if case.op in red:
                note(**shared, candidate="memtier", status="failed: not timed, its checks are red")
                continue
            for values in _time(case, seconds):
                note(**shared, **{"pass": number + 1}, **values)
    on_progress("cases", repeat * len(cases), repeat * len(cases))
    return rows


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Write rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _cases() -> Any:
    spec = importlib.util.spec_from_file_location("memtier_benchmark_cases", HERE / "cases.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _checks(op: str, device: str) -> Iterator[tuple[str, str]]:
    """Errors of the implementation that will be timed: name and status."""
    impl = "triton" if device == "cuda" else "reference"
    for sizes in _cases().CHECKS[op]:
        for dtype in ("float32", "bfloat16") if device == "cuda" else ("float32",):
            arguments = make_inputs(op, seed=1, dtype=getattr(torch, dtype), device=device, **sizes)
            errors = compare(op, arguments, impl=impl)
            name, worst = max(errors.items(), key=lambda item: item[1])
            # choices of whole numbers may differ where scores are equal but for rounding
            verdict = "passed" if worst < ERROR_LIMIT[dtype] else "failed"
            yield f"check {op} {dtype} {json.dumps(sizes)}", f"{verdict}: {name} {worst:.1e}"


def _time(case: Any, seconds: float) -> Iterator[dict[str, Any]]:
    try:
        candidates = case.build(**case.sizes)
    except torch.OutOfMemoryError as error:
        yield {"candidate": "memtier", "status": f"not measured: {error}"}
        return
    runnable: dict[str, Callable[[], Any]] = {}
    for name, call in candidates.items():
        if isinstance(call, str):
            yield {"candidate": name, "status": call}
            continue
        try:
            with torch.set_grad_enabled(case.device == "cuda"):
                call()
            runnable[name] = call
        except (RuntimeError, torch.OutOfMemoryError) as error:
            if name == "memtier":
                raise
            yield {"candidate": name, "status": f"refused: {str(error).splitlines()[0][:200]}"}
    if case.same:
        _same(case, runnable)
    times = _by_turns(runnable, seconds, case.device)
    ours = statistics.median(times["memtier"])
    for name, measured in times.items():
        median = statistics.median(measured)
        ordered = sorted(measured)
        pairs = case.peer_pairs.get(name, case.work.get("pairs"))
        yield {
            "candidate": name, "status": "measured", "median_ms": f"{median:.4g}",
            "low_ms": f"{ordered[len(ordered) // 10]:.4g}", "high_ms": f"{ordered[-1 - len(ordered) // 10]:.4g}",
            "times_memtier": f"{median / ours:.3g}",
            "tflops": _rate(case.work.get("flops") if name not in case.peer_pairs else None, median, 1e12),
            "gigabytes_per_second": _rate(case.work.get("bytes"), median, 1e9),
            "gigapairs_per_second": _rate(pairs, median, 1e9),
        }  # fmt: skip


def _rate(amount: float | None, milliseconds: float, unit: float) -> str:
    return "" if amount is None else f"{amount / (milliseconds * 1e-3) / unit:.4g}"


@torch.no_grad()
def _same(case: Any, candidates: dict[str, Callable[[], Any]]) -> None:
    """Peers compute what ours does, or the comparison says nothing."""
    wanted = candidates["memtier"]()
    for name, call in candidates.items():
        if name != "memtier":
            torch.testing.assert_close(
                call(), wanted, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{case.name}, {n}: {m}"
            )


def _by_turns(candidates: dict[str, Callable[[], Any]], seconds: float, device: str) -> dict[str, list[float]]:
    """Milliseconds of single calls; at least five each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    spent = dict.fromkeys(candidates, 0.0)
    with torch.set_grad_enabled(device == "cuda"):
        while any(len(times[name]) < 5 or spent[name] < seconds for name in candidates):
            for name, call in candidates.items():
                if len(times[name]) >= 5 and spent[name] >= seconds:
                    continue
                took = _cuda_ms(call) if device == "cuda" else _cpu_ms(call)
                times[name].append(took)
                spent[name] += took * 1e-3
    return times


def _cpu_ms(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def _cuda_ms(call: Callable[[], Any]) -> float:
    """One call after the level-2 cache was filled with something else."""
    torch.empty(256 * 2**20, dtype=torch.int8, device="cuda").zero_()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    call()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended)


def _where(device: str) -> dict[str, str]:
    import triton

    gpu = device == "cuda" and torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else "no GPU" if device == "cuda" else _processor()
    versions = f"python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}"
    commit = subprocess.run(
        ["git", "-C", str(HERE), "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": name if gpu or device == "cuda" else f"{name}, {torch.get_num_threads()} threads",
        "dtype": "bfloat16" if device == "cuda" else "float32",
        "versions": versions, "commit": commit or "unknown", "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _line(row: dict[str, Any]) -> str:
    if row["status"] != "measured":
        return f"{row['case']}: {row['candidate']} {row['status']}"
    return f"{row['case']}: {row['candidate']} {row['median_ms']} ms ({row['times_memtier']} of memtier)"


if __name__ == "__main__":
    sys.exit(main())
