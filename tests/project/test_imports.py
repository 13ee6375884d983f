"""The import rule of docs/architecture.md, read off the syntax trees; nothing is imported here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LEVELS = (
    "errors",
    "blocks",
    "layers",
    "cache",
    "decode_cache",
    "models",
    "arguments",
    "config reports text threads turn_lock chat_template",
    "tiers",
    "retriever generation folder history",
    "reader retention writing listing recovery",
    "updater",
    "batching replay",
    "feed timeline",
    "lines recall chat",
    "views",
    "parts",
    "forgetting open_session",
    "session",
    "open_sessions",
    "runtime",
    "sync",
)
"""Parts of memtier, lowest first: a part imports itself and parts of lower levels, never a neighbour."""

TRAINING_MAY_USE = {"models", "cache", "layers", "blocks", "errors"}
ABOVE_THE_RUNTIME = {
    "cli",
    "cli_bench",
    "cli_memory",
    "cli_options",
    "cli_session",
    "cli_train",
    "console",
    "peek",
    "bench",
    "huggingface",
    "testing",
}
"""May import anything. `memtier` itself may too: it resolves its names lazily, and a test sees that it does no work."""

LEAVES_MAY_BE_USED_BY = {
    "memtier_kernels": {"layers", "cache", "models", "tiers", "retriever", "training", *ABOVE_THE_RUNTIME},
    "memtier_backends": {
        "tiers",
        "folder",
        "history",
        "updater",
        "writing",
        "replay",
        "timeline",
        "recall",
        "listing",
        "recovery",
        "parts",
        "forgetting",
        "session",
        "open_sessions",
        "runtime",
        *ABOVE_THE_RUNTIME,
    },
}
BARE = {"errors", "blocks", "layers", "cache", "decode_cache", "models", "training"}
"""Parts that run on a bare GPU image: no pydantic, no lancedb, no anyio."""


def python_files() -> list[Path]:
    folders = ("memtier", "kernels/memtier_kernels", "backends/memtier_backends")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports when it runs, with its line; `from a import b` counts as `a.b`."""
    tree = ast.parse(path.read_text(), str(path))
    # What stands under `if TYPE_CHECKING:` is never imported.
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write the whole name"
            for name in node.names:
                yield node.lineno, f"{node.module}.{name.name}"


def part_of(path: Path) -> str:
    """`memtier/layers/mixer.py` -> "layers"; a leaf's file -> the leaf's name; `memtier/__init__.py` -> "memtier"."""
    relative = path.relative_to(ROOT)
    if relative.parts[0] != "memtier":
        return relative.parts[1]
    name = relative.parts[1].removesuffix(".py")
    return "memtier" if name == "__init__" else name


def below(part: str) -> set[str]:
    """The parts that a part may import."""
    if part == "training":
        return TRAINING_MAY_USE
    level = next(i for i, parts in enumerate(LEVELS) if part in parts.split())
    return set(" ".join(LEVELS[:level]).split())


def refusal(path: Path, module: str) -> str | None:
    """Why this file may not import this module, or None if it may."""
    part = part_of(path)
    root, _, rest = module.partition(".")
    target = rest.partition(".")[0]
    if part.startswith("memtier_"):
        return leaf_refusal(path, part, root, target)
    if root == "memtier":
        if part in ABOVE_THE_RUNTIME or part == "memtier":
            return None
        allowed = below(part)
        if target not in {part, *allowed}:
            return f"{part} may import of memtier only: {' '.join(sorted(allowed)) or 'nothing'}"
    if root in LEAVES_MAY_BE_USED_BY and part not in LEAVES_MAY_BE_USED_BY[root]:
        return f"{part} may not use {root}"
    return library_refusal(path, part, root)


def leaf_refusal(path: Path, part: str, root: str, target: str) -> str | None:
    if root == "memtier" and target != "errors":
        return "a leaf imports memtier.errors only"
    if root.startswith("memtier_") and root != part:
        return "leaves never import each other"
    if part == "memtier_backends" and root == "torch":
        return "backends do without torch"
    return library_refusal(path, part, root)


def library_refusal(path: Path, part: str, root: str) -> str | None:
    relative = path.relative_to(ROOT).as_posix()
    if root == "asyncio":
        return "anyio only"
    if root == "transformers" and not (
        part in {"models", "cache", "generation", "huggingface", "training"} or relative == "memtier/tiers/weights.py"
    ):
        return "transformers stays in models/, cache.py, generation.py, huggingface.py, tiers/weights.py, training/"
    if root == "lancedb" and path.name != "index_lance.py":
        return "lancedb stays in index_lance.py"
    if root == "triton" and not path.name.startswith("triton"):
        return "triton stays in files whose name begins with it"
    if root in {"pydantic", "lancedb", "anyio"} and part in {*BARE, "memtier_kernels"}:
        return f"{part} must run without {root}"
    return None


@pytest.mark.parametrize("path", python_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_only_what_its_part_may(path: Path) -> None:
    refused = [
        f"{path.relative_to(ROOT)}:{line}: imports {module}: {reason}"
        for line, module in imported(path)
        if (reason := refusal(path, module))
    ]
    assert not refused, "\n".join(refused)


def test_every_part_of_memtier_has_its_place_in_the_rule() -> None:
    parts = {part_of(path) for path in (ROOT / "memtier").rglob("*.py")}
    assert parts <= {"memtier", "training", *" ".join(LEVELS).split(), *ABOVE_THE_RUNTIME}


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("memtier/layers/x.py", "memtier.session"),
        ("memtier/training/x.py", "pydantic"),
        ("memtier/session.py", "transformers"),
        ("memtier/runtime.py", "asyncio.Event"),
        ("memtier/config.py", "memtier_backends.base"),
        ("kernels/memtier_kernels/x.py", "memtier.blocks"),
        ("kernels/memtier_kernels/ssd/reference.py", "triton"),
        ("backends/memtier_backends/x.py", "memtier_kernels"),
        ("backends/memtier_backends/x.py", "torch"),
        ("backends/memtier_backends/x.py", "lancedb"),
    ],
)
def test_the_rule_refuses_what_it_is_there_for(file: str, module: str) -> None:
    assert refusal(ROOT / file, module)
