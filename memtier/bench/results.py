"""docs/results.md: every table made from the CSV files of docs/results and kernels/benchmarks/results, each with the
command that makes them again."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

from memtier.bench.facts import CONDITIONS, summarise
from memtier.bench.length import MODES, table
from memtier.bench.rows import Row, read_rows

__all__ = ["results_page"]


def results_page(docs: Path) -> str:
    """The page, as Markdown.

    Args:
        docs: the folder docs of a checkout.
    """
    results = docs / "results"
    parts = [
        "# Results",
        "Every table is made from the CSV file named under it by `python -P docs/generate.py`; the command beside it "
        "measures again. What was tried and failed is in the [worklog](worklog.md).",
        *_facts(read_rows(results / "facts.csv")),
        *_length(read_rows(results / "length.csv")),
        *_recall(read_rows(results / "recall" / "cpu_summary.csv"), results / "recall"),
        *_durability(read_rows(results / "durability.csv")),
        *_models(read_rows(results / "models.csv")),
        *_kernels(docs.parent / "kernels" / "benchmarks" / "results"),
    ]
    return "\n\n".join(parts) + "\n"


def _facts(rows: list[Row]) -> Iterator[str]:
    if not rows:
        return
    yield "## Facts, told early in a long text and asked for at its end"
    yield (
        "200 facts (a name and a code of four digits, neither seen in training) stand in the first tenth of the text; "
        "16 are asked for, greedily. `plain` is one wording for all, `trained` those of training, `unseen` wordings "
        "that training did not use. `oracle` adds the block with the answer to the choice; `pasted` puts what `recall` "
        "finds into the window. Means over seeds, lowest and highest in brackets; *hit*: the block with the code is "
        "among the chosen."
    )
    found: dict[tuple[str, ...], dict[str, dict[str, object]]] = {}
    for entry in summarise(rows):
        key = tuple(str(entry[k]) for k in ("model", "text", "bytes", "facts", "wording"))
        found.setdefault(key, {})[entry["condition"]] = entry
    lines = []
    for (model, text, size, facts, wording), by in found.items():
        on = by["on"]
        lines.append([
            model, f"{text}, {int(size):,} bytes", facts, wording, str(on["seeds"]),
            *(_spread(by[condition]) for condition in CONDITIONS), _percent(on["block_hit"]),
            f"{on['late_over_fresh_bits']:.3f}",
        ])  # fmt: skip
    header = ["model", "text", "facts", "wording", "seeds", *CONDITIONS, "hit", "bits late / fresh"]
    yield _table(header, lines)
    yield "`memtier bench facts --bytes BYTES --wordings plain,trained,unseen [--file TEXT]` (results/facts.csv)"


def _length(rows: list[Row]) -> Iterator[str]:
    if not rows:
        return
    yield "## Bits per byte by position"
    yield (
        "The last 4,096 bytes of each stretch, read in one session a mode; `fresh`: the same bytes in sessions that "
        "know the kilobyte before alone. The last line of a text is all of it. nano was trained on sequences of at "
        "most 2,048 bytes, and never on these texts."
    )
    curve = table(rows)
    modes = [mode for mode in MODES if any(mode in entry for entry in curve)]
    lines = [
        [entry["model"], entry["text"], f"{entry['from']:,}", f"{entry['to']:,}"]
        + [f"{entry[mode]:.3f}" if mode in entry else "" for mode in modes]
        for entry in curve
    ]
    yield _table(["model", "text", "from", "to", *modes], lines)
    yield "`memtier bench length --file TEXT` (results/length.csv)"


def _durability(rows: list[Row]) -> Iterator[str]:
    if not rows:
        return
    yield "## What it costs that memory survives"
    yield (
        "Seconds: the median of five, the least and the most, or of one. `text`: a session that read so many tokens of "
        "CPython's manual. `random numbers`: one of so many tokens whose blocks hold random numbers instead of what a "
        "model made of a text; its journal, segments, index and snapshots were written by the session itself, step by "
        "step. A fork is open when the call returns. Other programs ran on the machine."
    )
    names = ["model", "of", "tokens", "what", "seconds", "least", "most"]
    yield _table(names, [[f"{int(row[n]):,}" if n == "tokens" else row[n] for n in names] for row in rows])
    yield "`memtier bench durability --random-tokens 1000000` (results/durability.csv)"


def _recall(rows: list[Row], folder: Path) -> Iterator[str]:
    if not rows:
        return
    yield "## Associative recall from outside the window, at equal bytes of memory"
    yield (
        "T 256, 8 pairs, a gap of at least layers * W between pairs and questions; every model has 2 layers of width "
        "32 and reads the same steps. Means over seeds, lowest and highest in brackets."
    )
    lines = [
        [
            row["variant"], row["rule"], row["eidetic_tokens"], f"{row['task']}, fillers {row['fillers']}",
            f"{int(row['memory_bytes']):,}", row["seeds"], _range(row), row["block_hit"],
            f"{row['long_accuracy']} at {int(row['long_tokens']):,}" if row["long_accuracy"] else "",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["model", "rule", "M", "task", "bytes", "seeds", "accuracy", "block hit", "accuracy at length"]
    yield _table(header, lines)
    for name, what in (("cpu_models.png", "accuracy by model"), ("cpu_slots.png", "accuracy by eidetic slots")):
        if (folder / name).exists():
            yield f"![{what}](results/recall/{name})"
    yield "`memtier bench recall --grid cpu --plots` (results/recall/cpu.csv)"


def _models(rows: list[Row]) -> Iterator[str]:
    if not rows:
        return
    yield "## Stock models, beside transformers' own caches"
    yield (
        "Random weights, 4 layers of width 512 with 8 query and 8 KV heads, a window of 512 tokens and a span of 4 "
        "blocks; float32 on one CPU thread, all readers by turns. Tokens a second, and our speed over that of the full "
        "cache. Medians over runs, lowest and highest in brackets; fewer tokens than the window: the stream never left "
        "it."
    )
    lines = []
    for family, tokens in sorted({(row["family"], int(row["tokens"])) for row in rows}):
        mine = [row for row in rows if (row["family"], row["tokens"]) == (family, str(tokens))]
        decode, full, sliding = (_median(mine, f"{reader}_decode") for reader in ("memtier", "full", "sliding"))
        prefill, full_prefill = (_median(mine, f"{reader}_prefill") for reader in ("memtier", "full"))
        lines.append([
            family, f"{tokens:,}", str(len(mine)), decode, full, sliding, _ratio(mine, "decode_over_full"),
            prefill, full_prefill, _ratio(mine, "prefill_over_full"),
            _median(mine, "memtier_bytes"), _median(mine, "full_bytes"),
        ])  # fmt: skip
    header = [
        "model", "tokens", "runs", "decode", "full", "sliding", "decode over full", "prefill", "full",
        "prefill over full", "bytes", "full",
    ]  # fmt: skip
    yield _table(header, lines)
    where = ", ".join(
        dict.fromkeys(f"{row['processor']}, torch {row['torch']}, commit {row['commit']}" for row in rows)
    )
    yield f"On {where}."
    yield "`memtier bench models --json --out docs/results/models.csv`, once a run (results/models.csv)"


def _kernels(folder: Path) -> Iterator[str]:
    yield "## Operations against their peers"
    for device in ("cpu", "cuda"):
        rows = [row for row in read_rows(folder / f"{device}.csv") if not row["case"].startswith("check ")]
        if not rows:
            continue
        where = f"{rows[0]['device']}, {rows[0]['versions']}, commit {rows[0]['commit']}"
        yield f"On {device} ({where}):"
        lines = [
            [row["case"], row["candidate"], row["median_ms"] or row["status"], row["times_memtier"], row["demand"]]
            for row in rows
        ]
        yield _table(["case", "candidate", "median ms", "times ours", "wanted"], lines)
        yield f"`memtier bench kernels --device {device}` (kernels/benchmarks/results/{device}.csv)"


def _median(rows: list[Row], column: str) -> str:
    return f"{statistics.median(float(row[column]) for row in rows):,.0f}"


def _ratio(rows: list[Row], column: str) -> str:
    found = [float(row[column]) for row in rows]
    return f"{statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f})"


def _spread(entry: dict[str, object]) -> str:
    return f"{_percent(entry['right'])} ({_percent(entry['lowest'])}-{_percent(entry['highest'])})"


def _percent(share: object) -> str:
    return "" if share is None else f"{100 * float(str(share)):.0f} %"


def _range(row: Row) -> str:
    return row["accuracy"] if row["seeds"] == "1" else f"{row['accuracy']} ({row['lowest']}-{row['highest']})"


def _table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)
