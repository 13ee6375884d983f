"""Options that several commands share."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

Store = Annotated[Path, typer.Option(help="Folder that holds the sessions.")]
OptionalStore = Annotated[Path | None, typer.Option(help="Keep the store in this folder (default: a temporary one).")]
Tenant = Annotated[str, typer.Option(help="Whose sessions: tenants never see each other's.")]
Model = Annotated[str, typer.Option(help="'nano', or a Hugging Face id or folder of a causal language model.")]
Adapter = Annotated[Path | None, typer.Option(help="Folder of the adapter that the session reads with.")]
Device = Annotated[str, typer.Option(help="'auto', 'cpu' or 'cuda'.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else there.")]
HotBytes = Annotated[int, typer.Option(help="Host memory for blocks, in bytes.")]
Threads = Annotated[int, typer.Option(help="CPU threads to compute on; nano is too small to gain from more.")]
SessionArgument = Annotated[str, typer.Argument(help="Id of the session.")]

DEFAULT_STORE = Path("memory")
DEFAULT_HOT_BYTES = 64 * 2**20


@contextmanager
def kept_or_temporary(store: Path | None) -> Iterator[Path]:
    """The folder that was asked for, or one that is removed afterwards."""
    if store is not None:
        yield store
        return
    with tempfile.TemporaryDirectory(prefix="memtier-") as folder:
        yield Path(folder) / "store"
