"""`memtier bench`: what memtier costs on this machine."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from memtier.cli_options import (
    DEFAULT_HOT_BYTES,
    Device,
    HotBytes,
    Json,
    Model,
    OptionalStore,
    Threads,
    kept_or_temporary,
)
from memtier.errors import ConfigError

if TYPE_CHECKING:
    from memtier.training.wordings import Wording

__all__ = ["bench"]

bench = typer.Typer(help="Measure what memtier costs on this machine.", no_args_is_help=True, rich_markup_mode=None)


@bench.command("stream")
def bench_stream(
    hot_bytes: HotBytes = DEFAULT_HOT_BYTES,
    late_tokens: Annotated[int, typer.Option(help="Where the late cost is measured.")] = 200_000,
    file: Annotated[Path | None, typer.Option(help="Text to stream (default: CPython's own manual).")] = None,
    store: OptionalStore = None,
    model: Model = "nano",
    device: Device = "auto",
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Cost of a token early and late in a session: time, resident memory, disk."""
    from memtier.bench.stream import StreamOptions, run_stream
    from memtier.console import emit_json, progress, show_values

    options = StreamOptions(
        hot_bytes=hot_bytes,
        late_tokens=late_tokens,
        file=file,
        model=model,
        device=device,
        threads=threads,
        command=shlex.join(["memtier", *sys.argv[1:]]),
    )
    with kept_or_temporary(store) as folder, progress() as on_progress:
        report = run_stream(folder, options, on_progress)
    emit_json(report) if as_json else show_values("bench stream", report)


@bench.command("decode")
def bench_decode(
    sessions: Annotated[str, typer.Option(help="How many sessions answer at once, one measurement each.")] = "1,2,4,8",
    tokens: Annotated[int, typer.Option(help="Tokens that a session samples in a round.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds; every number is their median.")] = 5,
    context_bytes: Annotated[int, typer.Option(help="Text that a session has read before.")] = 4096,
    file: Annotated[Path | None, typer.Option(help="Text to read (default: CPython's own manual).")] = None,
    store: OptionalStore = None,
    model: Model = "nano",
    device: Device = "auto",
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Tokens a second that sessions sample: retrieval on and off, one session and several at once."""
    from memtier.bench.decode import DecodeOptions, run_decode
    from memtier.console import emit_json, progress, show_values

    try:
        counts = tuple(int(count) for count in sessions.split(","))
    except ValueError as error:
        raise ConfigError(f"--sessions is {sessions!r}; give counts such as 1,2,4,8.") from error
    command = shlex.join(["memtier", *sys.argv[1:]])
    options = DecodeOptions(counts, tokens, rounds, context_bytes, file, model, device, threads, command)
    with kept_or_temporary(store) as folder, progress() as on_progress:
        report = run_decode(folder, options, on_progress)
    emit_json(report) if as_json else show_values("bench decode", report)


@bench.command("recall")
def bench_recall(
    grid: Annotated[str, typer.Option(help="cpu: 40 runs of at most 150 s on one core; gpu: the full grid.")] = "cpu",
    cells: Annotated[int | None, typer.Option(help="Runs to do now; 0 only reports (default: all).")] = None,
    minutes: Annotated[float | None, typer.Option(help="Begin no further run after so long.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder (default: docs/results/recall of a clone).")] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Draw PNG files too (needs memtier[plots]).")] = False,
    threads: Threads = 1,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Associative recall from outside the window: B'MOJO and its rivals at equal bytes of memory.

    Every finished run is a row of a CSV file; a later call goes on with the runs that are missing.
    """
    from memtier.bench.recall import RecallOptions, run_recall_bench
    from memtier.console import emit_json, progress, show_recall_bench

    command = shlex.join(["memtier", *sys.argv[1:]])
    options = RecallOptions(grid, cells, minutes, out, plots, device, threads, command)
    with progress() as on_progress:
        report = run_recall_bench(options, on_progress)
    (emit_json if as_json else show_recall_bench)(report)


@bench.command("durability")
def bench_durability(
    lengths: Annotated[str, typer.Option(help="Tokens at which the session is opened.")] = "8192,32768,131072",
    distances: Annotated[str, typer.Option(help="How far back what is forgotten lies.")] = "1000,16000,100000",
    random_tokens: Annotated[
        int | None, typer.Option(help="Open and fork a session of so many tokens, too: its blocks are random numbers.")
    ] = None,
    snapshot_every_tokens: Annotated[int, typer.Option(help="Tokens between two snapshots.")] = 32_768,
    repeat: Annotated[int, typer.Option(help="Times are medians of so many.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="CSV file (default: docs/results/durability.csv of a clone).")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Text to read (default: CPython's own manual).")] = None,
    store: OptionalStore = None,
    model: Model = "nano",
    device: Device = "auto",
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """What it costs that memory survives: commits a second, opening, forks, checkpoints, moving, forgetting."""
    from memtier.bench.durability import DurabilityOptions, run_durability
    from memtier.console import emit_json, progress, show_values

    options = DurabilityOptions(
        lengths=_counts("--lengths", lengths),
        distances=_counts("--distances", distances),
        random_tokens=random_tokens,
        out=out,
        snapshot_every_tokens=snapshot_every_tokens,
        repeat=repeat,
        file=file,
        model=model,
        device=device,
        threads=threads,
        command=shlex.join(["memtier", *sys.argv[1:]]),
    )
    with kept_or_temporary(store) as folder, progress() as on_progress:
        report = run_durability(folder, options, on_progress)
    emit_json(report) if as_json else show_values("bench durability", report)


def _counts(option: str, given: str) -> tuple[int, ...]:
    try:
        return tuple(int(count) for count in given.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} is {given!r}; give counts such as 1000,2000.") from error


@bench.command("kernels")
def bench_kernels(
    only: Annotated[str, typer.Option(help="Cases whose name holds this text.")] = "",
    repeat: Annotated[int, typer.Option(help="Whole passes over the cases.")] = 1,
    seconds: Annotated[float, typer.Option(help="Time to spend on a candidate in a pass.")] = 2.0,
    threads: Annotated[int | None, typer.Option(help="CPU threads (default: torch's own choice).")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV file (default: kernels/benchmarks/results/DEVICE.csv).")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time every operation against its peers, in one run; needs a clone of the project.

    An operation that disagrees with its float64 reference is not timed, and the exit code is 1.
    """
    from memtier.bench.kernels import KernelOptions, run_kernels
    from memtier.console import emit_json, progress, show_kernels

    options = KernelOptions(device, only, repeat, seconds, threads, out, shlex.join(["memtier", *sys.argv[1:]]))
    with progress() as on_progress:
        report = run_kernels(options, on_progress)
    (emit_json if as_json else show_kernels)(report)
    if report["failed"]:
        raise typer.Exit(1)


@bench.command("facts")
def bench_facts(
    size_bytes: Annotated[int, typer.Option("--bytes", help="How much text to stream.")] = 200_000,
    facts: Annotated[int, typer.Option(help="Facts told in its first tenth; 16 are asked for.")] = 200,
    seeds: Annotated[int, typer.Option(help="Exams, each with facts of its own.")] = 5,
    wordings: Annotated[
        str, typer.Option(help="plain: one wording; trained: those of training; unseen: others. Several by commas.")
    ] = "plain",
    file: Annotated[Path | None, typer.Option(help="Text to stream (default: CPython's own manual).")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV file (default: docs/results/facts.csv of a clone).")] = None,
    model: Model = "nano",
    device: Device = "auto",
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Facts told early in a long text, asked for at its end: retrieval against its controls, with seeds.

    Every finished exam is in a CSV file; a later call goes on with those that are missing.
    """
    from memtier.bench.facts import FactsOptions, run_facts
    from memtier.console import emit_json, progress, show_facts

    command = shlex.join(["memtier", *sys.argv[1:]])
    chosen = cast("tuple[Wording, ...]", tuple(wordings.split(",")))
    options = FactsOptions(size_bytes, facts, seeds, chosen, file, model, device, threads, out, command)
    with progress() as on_progress:
        report = run_facts(options, on_progress)
    (emit_json if as_json else show_facts)(report)


@bench.command("models")
def bench_models(
    families: Annotated[str, typer.Option(help="Of llama, qwen3, mistral, granite.")] = "llama,qwen3",
    contexts: Annotated[str, typer.Option(help="Lengths at which decoding is measured.")] = "1024,4096,16384",
    width: Annotated[int, typer.Option(help="Of the model, with random weights.")] = 512,
    layers: Annotated[int, typer.Option(help="How many.")] = 4,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int, typer.Option(help="Key/value heads.")] = 8,
    window_tokens: Annotated[int, typer.Option(help="Of memtier and of the sliding cache.")] = 512,
    rounds: Annotated[int, typer.Option(help="Decoding is measured so often; medians.")] = 3,
    out: Annotated[Path | None, typer.Option(help="CSV file to which this run is added.")] = None,
    device: Device = "cpu",
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Stock models read with memory, and with transformers' own full and sliding caches: speed and memory."""
    from memtier.bench.models import ModelsOptions, run_models
    from memtier.console import emit_json, progress, show_values

    command = shlex.join(["memtier", *sys.argv[1:]])
    options = ModelsOptions(
        families=tuple(families.split(",")), contexts=_counts("--contexts", contexts), width=width, layers=layers,
        heads=heads, kv_heads=kv_heads, window_tokens=window_tokens, rounds=rounds, device=device, threads=threads,
        out=out, command=command,
    )  # fmt: skip
    with progress() as on_progress:
        report = run_models(options, on_progress)
    emit_json(report) if as_json else show_values("bench models", report)


@bench.command("length")
def bench_length(
    size_bytes: Annotated[int | None, typer.Option("--bytes", help="How much text to read (default: all).")] = None,
    modes: Annotated[str, typer.Option(help="Retrieval modes, and `fresh`: the same text in short sessions.")] = (
        "on,off,random,recent,fresh"
    ),
    file: Annotated[Path | None, typer.Option(help="Text to read (default: CPython's own manual).")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV file (default: docs/results/length.csv of a clone).")] = None,
    model: Model = "nano",
    device: Device = "auto",
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Bits per byte by position, far beyond the trained length, for each way to retrieve."""
    from memtier.bench.length import LengthOptions, run_length
    from memtier.console import emit_json, progress, show_length

    command = shlex.join(["memtier", *sys.argv[1:]])
    options = LengthOptions(size_bytes, tuple(modes.split(",")), file, model, device, threads, out, command)
    with progress() as on_progress:
        report = run_length(options, on_progress)
    (emit_json if as_json else show_length)(report)
