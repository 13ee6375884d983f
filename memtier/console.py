"""What the command line shows: progress on standard error, results on standard output as tables or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from memtier.bench.demo import OnProgress
    from memtier.blocks import MemoryHit
    from memtier.recovery.reports import CheckpointInfo, SessionHealth
    from memtier.reports import MemoryReport, SessionInfo, TurnInfo

__all__ = [
    "emit_json",
    "progress",
    "reading_again",
    "show_checkpoints",
    "show_demo",
    "show_health",
    "show_hits",
    "show_memory",
    "show_sessions",
    "show_turns",
    "show_values",
    "size",
]

_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def emit_json(value: Any) -> None:
    """Print one JSON object on one line of standard output, and nothing else."""
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


@contextmanager
def progress() -> Iterator[OnProgress]:
    """A bar for each stage on standard error, where that is a terminal; call it with (stage, done, total)."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:>16}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    bars = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    tasks: dict[str, TaskID] = {}

    def update(stage: str, done: int, total: int) -> None:
        if not tasks:
            # not before: what has no stage to tell of leaves no empty line
            bars.start()
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage)
        bars.update(tasks[stage], completed=done, total=max(done, total))

    try:
        yield update
    finally:
        if tasks:
            bars.stop()


@contextmanager
def reading_again() -> Iterator[Callable[[int, int | None], None]]:
    """A bar on standard error for tokens that a session reads again, if there are any: give it as `on_progress`."""
    with progress() as on_progress:
        yield lambda done, total: on_progress("reading again", done, total or done)


def size(count: float) -> str:
    """1234567 -> "1.2 MB"."""
    unit = 0
    while count >= 1000 and unit + 1 < len(_UNITS):
        count, unit = count / 1000, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 else f"{count:.1f} {_UNITS[unit]}"


def show_values(title: str, values: dict[str, Any]) -> None:
    """Names and values, one a line."""
    _print(title, ("", ""), [(name, str(value)) for name, value in values.items()])


def show_hits(hits: Iterable[MemoryHit]) -> None:
    """What was recalled, best first, each with its provenance."""
    rows = [
        (
            f"{hit.score:.2f}",
            f"{hit.start:,}–{hit.end:,}",
            hit.tier,
            hit.role,
            hit.source or "",
            _when(hit.created_at),
            hit.text,
        )
        for hit in hits
    ]
    if not rows:
        Console().print("Nothing in this session matches.")
        return
    _print(None, ("score", "tokens", "tier", "role", "source", "when", "text"), rows)


def show_sessions(sessions: Iterable[SessionInfo]) -> None:
    """The sessions of a store."""
    rows = [
        (
            info.id,
            f"{info.position:,}",
            str(info.turns),
            f"{info.blocks:,}",
            size(info.bytes_on_disk),
            _when(info.updated_at),
        )
        for info in sessions
    ]
    if not rows:
        Console().print("This store holds no session.")
        return
    _print(None, ("session", "tokens", "turns", "blocks", "on disk", "last written"), rows)


def show_turns(turns: Iterable[TurnInfo]) -> None:
    """The turns of a session, oldest first; long ones cut."""
    rows = [
        (
            str(turn.turn),
            turn.role,
            f"{turn.start:,}–{turn.end:,}",
            _when(turn.created_at),
            turn.source or "",
            turn.text,
        )
        for turn in turns
    ]
    shown = [(*row[:-1], row[-1] if len(row[-1]) <= 200 else row[-1][:200] + "…") for row in rows]
    _print(None, ("turn", "role", "tokens", "when", "source", "text"), shown)


def show_health(sessions: Iterable[SessionHealth]) -> None:
    """What a look at the files of sessions found."""
    rows = [
        (health.id or health.folder, finding.what, "mended" if finding.mended else "", finding.problem)
        for health in sessions
        for finding in health.findings
    ]
    if not rows:
        Console().print("Every file is as it was written.")
        return
    _print(None, ("session", "what", "", "problem"), rows)


def show_checkpoints(checkpoints: Iterable[CheckpointInfo]) -> None:
    """The checkpoints of a session, oldest first."""
    _print(
        None,
        ("checkpoint", "tokens", "when"),
        [(info.name, f"{info.position:,}", _when(info.created_at)) for info in checkpoints],
    )


def show_memory(memory: MemoryReport) -> None:
    """The four tiers of a session: what they hold, not only how much."""
    weights, context, storage = memory.weights, memory.context, memory.storage
    title = f"session {memory.session!r} at token {memory.position:,}"
    where = f"{weights.dtype} on {weights.device}"
    rows = [
        ("weights", f"{weights.name}: {weights.parameters:,} parameters, {size(weights.bytes)}, {where}"),
        ("state", f"{size(memory.state.bytes)} in {len(memory.state.layers)} layers"),
        *(("", _state_line(layer)) for layer in memory.state.layers),
        ("context", f"window of tokens {context.window_start:,}–{context.window_end:,}: …{context.window_text[-300:]}"),
        *(
            (
                f"  layer {layer}",
                f"{len(tokens)} surprising tokens: " + " ".join(f"{t.text!r}@{t.position}" for t in tokens[:12]),
            )
            for layer, tokens in context.eidetic.items()
        ),
        ("storage", f"{storage.blocks:,} blocks, {storage.tokens:,} tokens, {size(storage.bytes_on_disk)} on disk"),
        ("", f"{storage.pending_blocks} blocks on their way to disk, {storage.lag_tokens} tokens not yet searchable"),
        *((f"  layer {chosen.layer}", _selection_line(chosen)) for chosen in storage.last_selection),
        *(
            (f"  layer {layer}", "attention: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
            for layer, shares in memory.attention_mass.items()
        ),
    ]
    _print(title, ("tier", "holds"), rows)


def show_demo(report: dict[str, Any]) -> None:
    """What the demo measured."""
    tiers, recall, surprise = report["tiers"], report["recall"], report["bits_per_byte"]
    weights, state, context, storage = (tiers[name] for name in ("weights", "state", "context", "storage"))
    _print(
        f"{report['tokens_streamed']:,} tokens streamed, {report['tokens_per_second']:,.0f} a second",
        ("tier", "size", "holds"),
        [
            (
                "weights",
                size(weights["bytes"]),
                f"{weights['name']}: {weights['parameters']:,} parameters in {weights['dtype']}",
            ),
            ("state", size(state["bytes"]), f"the fading memory of {state['layers']} layers"),
            (
                "context",
                size(context["bytes"]),
                f"{context['window_tokens']} window, {context['eidetic_tokens']} surprising tokens",
            ),
            (
                "storage",
                size(storage["bytes"]),
                f"{storage['blocks']:,} blocks of {storage['tokens']:,} tokens, on disk",
            ),
        ],
    )
    asked = f"{report['facts_asked']} of {report['facts_planted']} facts"
    _print(
        "measured",
        ("", ""),
        [
            ("device bytes at 25, 50, 75, 100 %", "  ".join(f"{count:,}" for count in report["device_bytes"])),
            ("bits per byte of the last text", f"{surprise['late']:.3f}"),
            ("the same text in a fresh session", f"{surprise['fresh']:.3f}"),
            *((f"{asked}, retrieval {mode}", f"{share:.0%} right") for mode, share in recall.items()),
            ("closed, opened again at token", f"{report['resumed_at']:,}"),
            ("and went on to token", f"{report['went_on_to']:,}"),
        ],
    )


def show_kernels(report: dict[str, Any]) -> None:
    """What each candidate of each case took."""
    rows = [
        (row["case"], row["candidate"], row["median_ms"], row["times_memtier"], row["status"])
        for row in report["rows"]
    ]  # fmt: skip
    _print(f"written to {report['written_to']}", ("case", "candidate", "ms", "times memtier", ""), rows)


def show_recall_bench(report: dict[str, Any]) -> None:
    """What each model of the recall grid can do."""
    rows = [
        (
            f"{row['variant']} {row['rule'] if row['rule'] != 'innovation' else ''}".strip(),
            row["eidetic_tokens"] if row["variant"].startswith("bmojo") and row["variant"] != "bmojo_f" else "",
            f"{row['task']} {row['fillers'] if row['fillers'] != 'zero' else ''}".strip(),
            size(int(row["memory_bytes"])),
            row["seeds"],
            row["accuracy"],
            row["lowest"],
            row["highest"],
            row["block_hit"],
            row["long_accuracy"],
        )
        for row in report["summary"]
    ]
    title = f"{report['cells'] - report['waiting']} of {report['cells']} runs; written to {report['written_to'][0]}"
    _print(title, ("model", "M", "task", "memory", "seeds", "accuracy", "low", "high", "hit", "long"), rows)


def show_facts(report: dict[str, Any]) -> None:
    """The exam of facts, one line a condition."""
    rows = [
        (
            row["wording"], f"{int(row['bytes']):,}", row["condition"], str(row["seeds"]), f"{row['right']:.0%}",
            f"{row['lowest']:.0%}", f"{row['highest']:.0%}",
            "" if row["block_hit"] is None else f"{row['block_hit']:.0%}", f"{row['late_over_fresh_bits']:.3f}",
        )
        for row in report["summary"]
    ]  # fmt: skip
    columns = ("wording", "bytes", "retrieval", "seeds", "right", "lowest", "highest", "hit", "late/fresh bits")
    _print(f"facts recalled; written to {report['written_to']}", columns, rows)


def show_length(report: dict[str, Any]) -> None:
    """Bits per byte, one line a stretch of text."""
    modes = [name for name in ("on", "off", "random", "recent", "fresh") if any(name in row for row in report["curve"])]
    rows = [
        (f"{row['from']:,}", f"{row['to']:,}", *(f"{row[mode]:.3f}" if mode in row else "" for mode in modes))
        for row in report["curve"]
    ]
    _print(f"bits per byte; written to {report['written_to']}", ("from", "to", *modes), rows)


def _state_line(layer: Any) -> str:
    half_life = "" if layer.half_life_tokens is None else f", half-life {layer.half_life_tokens:,.0f} tokens"
    return f"layer {layer.layer}: {layer.kind} {'×'.join(map(str, layer.shape))}, norm {layer.norm:.2f}{half_life}"


def _selection_line(chosen: Any) -> str:
    blocks = ", ".join(f"{block.start:,}–{block.end:,} ({block.attention_mass:.0%})" for block in chosen.blocks)
    return f"retrieved at token {chosen.boundary:,}: {blocks or 'nothing'}"


def _when(seconds: float | None) -> str:
    if seconds is None:
        return ""
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return str(seconds)  # no time that a calendar can show


def _print(title: str | None, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    table = Table(
        title=title and escape(title), title_justify="left", show_header=any(columns), show_edge=False, pad_edge=False
    )
    for name in columns:
        table.add_column(name)
    for row in rows:
        # What a session holds is data: brackets in it are no markup.
        table.add_row(*(escape(cell) for cell in row))
    console = Console()
    console.print(table)
    console.print()
