"""`memtier bench facts`: the exam of the model that ships. Facts told early in a long text, asked for at its end.

Every question is put under six conditions, each from a copy of the same session:

    on       retrieval as it is used
    off      no retrieval                                       \\
    random   blocks by a hash                                    > controls
    recent   the newest blocks                                  /
    oracle   as on, with the blocks of the sentence added to the choice at the question: what the reader makes of a
             perfect choice
    pasted   no retrieval; what `recall` finds for the name is put into the window before the question

Names and codes were never trained on. An answer is greedy, and right if its first four digits are the code. Finished
runs are rows of a CSV file; a later call goes on with what is missing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import memtier
from memtier.bench.demo import OnProgress, choose_questions, first_code, tail_of
from memtier.bench.machine import describe_machine, use_threads
from memtier.bench.rows import Row, holds, read_rows, results_folder, write_rows
from memtier.bench.text import load_text, plant
from memtier.errors import ConfigError
from memtier.retriever import StorageSelector
from memtier.training.facts import Fact, make_facts
from memtier.training.wordings import WORDINGS, Wording

__all__ = ["CONDITIONS", "FactsOptions", "run_facts", "summarise"]

CONDITIONS = ("on", "off", "random", "recent", "oracle", "pasted")
COLUMNS = (
    "model", "text", "bytes", "facts", "wording", "seed", "condition", "asked", "right", "blocks", "block_hit",
    "late_bits", "fresh_bits", "commit", "torch",
)  # fmt: skip
PLANTED = (0.0, 0.1)
SESSION = "facts"


@dataclass(frozen=True, slots=True)
class FactsOptions:
    """What is told, how, and how often.

    Args:
        seeds: the exam is held with seeds 0 to seeds - 1; each has facts of its own.
        wordings: any of `memtier.training.wordings.WORDINGS`.
        out: CSV file; None for docs/results/facts.csv of the checkout.
        command: what the user typed.
    """

    size_bytes: int = 200_000
    facts: int = 200
    seeds: int = 5
    wordings: tuple[Wording, ...] = ("plain",)
    file: Path | None = None
    model: str = "nano"
    device: str = "auto"
    threads: int = 1
    out: Path | None = None
    command: str = "memtier bench facts --json"


def run_facts(options: FactsOptions, on_progress: OnProgress) -> dict[str, Any]:
    """Hold the exams that are not in the CSV file yet, and report all of this kind that are.

    Raises:
        ConfigError: an option that cannot work, or a text that is too short.
    """
    if options.seeds < 1 or options.facts < 1:
        raise ConfigError(f"--seeds is {options.seeds} and --facts is {options.facts}; each must be at least 1.")
    if unknown := [w for w in options.wordings if w not in WORDINGS] or not options.wordings:
        raise ConfigError(f"--wordings holds {unknown!r}; use some of {', '.join(WORDINGS)}.")
    path = options.out or results_folder() / "facts.csv"
    text = load_text(options.file, options.size_bytes)
    use_threads(options.threads)
    machine = describe_machine()
    done = read_rows(path)
    exams: list[tuple[Wording, int]] = [
        (wording, seed) for wording in options.wordings for seed in range(options.seeds)
    ]
    for number, (wording, seed) in enumerate(exams):
        shared = _identity(options, wording) | {"seed": str(seed)}
        if not any(holds(row, shared) for row in done):
            stage = f"exam {number + 1} of {len(exams)}"
            found = _exam(text, options, wording, seed, lambda _, d, t, s=stage: on_progress(s, d, t))
            known = {"commit": machine["commit"], "torch": torch.__version__}
            done += [{k: str(v) for k, v in (shared | row | known).items()} for row in found]
            write_rows(done, COLUMNS, path)
    kinds = [_identity(options, wording) for wording in options.wordings]
    mine = [row for row in done if any(holds(row, kind) for kind in kinds)]
    return {"command": options.command, "machine": machine, "written_to": str(path), "summary": summarise(mine)}


def summarise(rows: list[Row]) -> list[dict[str, Any]]:
    """One entry for each kind of exam and condition: seeds, share of right answers, the worst and the best seed."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(
            tuple(row[k] for k in ("model", "text", "bytes", "facts", "wording", "condition")), []
        ).append(row)
    summary = []
    for key, members in groups.items():
        shares = [int(r["right"]) / int(r["asked"]) for r in members]
        hits = [float(r["block_hit"]) for r in members if r["block_hit"]]
        summary.append({
            **dict(zip(("model", "text", "bytes", "facts", "wording", "condition"), key, strict=True)),
            "seeds": len(members), "asked": sum(int(r["asked"]) for r in members),
            "right": sum(shares) / len(shares), "lowest": min(shares), "highest": max(shares),
            "block_hit": sum(hits) / len(hits) if hits else None,
            "late_over_fresh_bits": sum(float(r["late_bits"]) / float(r["fresh_bits"]) for r in members) / len(members),
        })  # fmt: skip
    return summary


def _identity(options: FactsOptions, wording: Wording) -> dict[str, str]:
    name = "CPython's manual" if options.file is None else options.file.name
    return {
        "model": options.model, "text": name, "bytes": str(options.size_bytes), "facts": str(options.facts),
        "wording": wording,
    }  # fmt: skip


def _exam(
    text: str, options: FactsOptions, wording: Wording, seed: int, on_progress: OnProgress
) -> list[dict[str, Any]]:
    """The rows of one exam: one for each condition."""
    facts = make_facts(options.facts, seed)
    planted = plant(text, facts, seed, between=PLANTED, wording=wording)
    questions = choose_questions(facts, seed, wording)
    tail = tail_of(planted)
    head = planted[: len(planted) - len(tail)]
    total = len(planted.encode())
    with (
        tempfile.TemporaryDirectory() as folder,
        memtier.open_sync(folder, model=options.model, device=options.device) as runtime,
    ):
        session = runtime.session(SESSION)
        session.observe(head, on_progress=lambda read, *_: on_progress("", read, total))
        late = session.observe(tail).bits_per_byte
        fresh = runtime.session("fresh").observe(tail).bits_per_byte
        # a session begins with one token that stands for no byte
        begins = session.position - total
        results = {condition: _Result() for condition in CONDITIONS}
        for fact, question in questions:
            start = begins + _byte_of(planted, fact)
            place = range(start, start + len(fact.code))
            for condition, result in results.items():
                right, hit = _ask(session, fact, question, condition, place)
                result.right, result.hits = result.right + right, result.hits + hit
        blocks = session.inspect().storage.blocks
    return [
        {
            "condition": condition, "asked": len(questions), "right": result.right, "blocks": blocks,
            "block_hit": f"{result.hits / len(questions):.4f}" if condition in ("on", "random", "recent") else "",
            "late_bits": f"{late:.4f}", "fresh_bits": f"{fresh:.4f}",
        }
        for condition, result in results.items()
    ]  # fmt: skip


@dataclass(slots=True)
class _Result:
    right: int = 0
    hits: int = 0


def _ask(session: Any, fact: Fact, question: str, condition: str, place: range) -> tuple[bool, bool]:
    """Whether the answer is right, and whether the blocks that hold the code, at tokens `place`, were chosen."""
    prompt, mode = question, condition
    if condition == "pasted":
        found = session.recall(fact.name, k=1)
        prompt, mode = "\n" + "".join(hit.text for hit in found) + question, "off"
    elif condition == "oracle":
        mode = "on"
    mark = session.position + len(prompt.encode()) - 1
    with _watched(mark, place, force=condition == "oracle") as choice:
        answer = "".join(session.generate(prompt, max_new_tokens=8, remember=False, retrieval=mode))
    return first_code(answer) == fact.answer, choice.hit


def _byte_of(text: str, fact: Fact) -> int:
    """Where the code of a planted fact stands, in bytes."""
    at = -1
    while (at := text.index(fact.name, at + 1)) >= 0:
        line_end = text.index("\n", at)
        code = text.find(fact.code, at, line_end)
        if code >= 0:
            return len(text[:code].encode())
    raise AssertionError(f"{fact} was not planted")


@dataclass(slots=True)
class _Choice:
    hit: bool = False


@contextmanager
def _watched(mark: int, place: range, *, force: bool) -> Iterator[_Choice]:
    """Note whether a memory layer chooses every block of `place` at boundary `mark`; with `force`, see that it does:
    they take the places of the worst."""
    noted = _Choice()
    select = StorageSelector.select

    def watch(
        self: StorageSelector,
        layer: int,
        queries: torch.Tensor,
        boundaries: torch.Tensor,
        visible: torch.Tensor,
        k: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids, scores = select(self, layer, queries, boundaries, visible, k)
        size = self.storage.settings.span_block_tokens
        gold = sorted({token // size for token in place})
        for row in (boundaries == mark).nonzero().flatten().tolist():
            if force:
                ids[0, row], scores[0, row] = _with(gold, ids[0, row], scores[0, row])
            noted.hit |= set(gold) <= set(ids[0, row].tolist())
        return ids, scores

    StorageSelector.select = watch  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield noted
    finally:
        StorageSelector.select = select


def _with(gold: list[int], ids: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A choice (k,) that holds `gold`, ascending, and otherwise the best of `ids`."""
    others = sorted(
        ((score, i) for i, score in zip(ids.tolist(), scores.tolist(), strict=True) if i >= 0 and i not in gold),
        reverse=True,
    )[: len(ids) - len(gold)]  # fmt: skip
    best = max((score for score, _ in others), default=0.0)
    chosen = sorted([(block, best) for block in gold] + [(i, score) for score, i in others])
    chosen += [(-1, float("-inf"))] * (len(ids) - len(chosen))
    return torch.tensor([i for i, _ in chosen]), torch.tensor([score for _, score in chosen])
