"""The `memtier` command: thin, over the public API. Results go to standard output, everything else to standard error.

Exit codes: 0 done, 1 failed, 2 bad usage.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

import memtier
from memtier.cli_bench import bench
from memtier.cli_memory import memory
from memtier.cli_options import (
    DEFAULT_HOT_BYTES,
    DEFAULT_STORE,
    Adapter,
    Device,
    HotBytes,
    Json,
    Model,
    OptionalStore,
    SessionArgument,
    Store,
    Tenant,
    Threads,
    kept_or_temporary,
)
from memtier.cli_session import copy_of_session, existing_session, opened
from memtier.cli_train import train
from memtier.errors import ConfigError, MemtierError, StorageFullError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Memory for language models: sessions of any length that survive a restart.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(memory)
app.add_typer(bench, name="bench")
app.add_typer(train, name="train")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code; an error of ours is one line, not a traceback."""
    if not sys.stderr.isatty():
        # The libraries below draw their bars into logs and pipes too.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        app(args=arguments, prog_name="memtier")
    except ConfigError as error:
        _fail(error, 2)
    except MemtierError as error:
        _fail(error, 1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _fail(StorageFullError(f"no space left on the disk: {error}. Free some, then run the command again."), 1)


def _fail(error: Exception, code: int) -> None:
    print(f"memtier: {error}", file=sys.stderr)
    raise SystemExit(code)


def _version(wanted: bool) -> None:
    if wanted:
        print(importlib.metadata.version("memtier"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


@app.command()
def demo(
    file: Annotated[Path | None, typer.Option(help="Text to stream (default: CPython's own manual).")] = None,
    size_bytes: Annotated[int, typer.Option("--bytes", help="How much of the text.")] = 200_000,
    facts: Annotated[int, typer.Option(help="Facts planted near the beginning.")] = 200,
    seed: Annotated[int, typer.Option(help="Draws the facts and the questions.")] = 0,
    store: OptionalStore = None,
    tenant: Tenant = "default",
    model: Model = "nano",
    device: Device = "auto",
    hot_bytes: HotBytes = DEFAULT_HOT_BYTES,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Stream a long text, ask for facts from its beginning, with retrieval and without; close, reopen, go on."""
    from memtier.bench.demo import DemoOptions, run_demo
    from memtier.console import emit_json, progress, show_demo

    options = DemoOptions(size_bytes, facts, seed, file, model, device, tenant, hot_bytes, threads)
    with kept_or_temporary(store) as folder, progress() as on_progress:
        report = run_demo(folder, options, on_progress)
    (emit_json if as_json else show_demo)(report)


@app.command()
def stream(
    file: Annotated[Path, typer.Argument(help="UTF-8 text.")],
    session: Annotated[str | None, typer.Option(help="Id of the session (default: the file's name).")] = None,
    source: Annotated[str | None, typer.Option(help="Comes back with every hit (default: the file's path).")] = None,
    role: Annotated[str, typer.Option(help="Who speaks: comes back with every hit.")] = "user",
    store: Store = DEFAULT_STORE,
    tenant: Tenant = "default",
    model: Model = "nano",
    adapter: Adapter = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Read a file into a session; one that exists goes on where it was."""
    from memtier.bench.text import check_utf8
    from memtier.console import emit_json, progress, show_values

    total = check_utf8(file)
    with memtier.open_sync(store, model=model, tenant=tenant, device=device) as runtime, progress() as on_progress:
        reader = opened(runtime, session or file.stem, adapter)
        read = reader.observe(
            _pieces(file, lambda done: on_progress("streaming", done, total)), role=role, source=source or str(file)
        )
        on_progress("writing", 0, 1)
        reader.flush()
        on_progress("writing", 1, 1)
    report = {"session": reader.id, "bytes": total, **read.model_dump(mode="json")}
    emit_json(report) if as_json else show_values(str(file), report)


@app.command()
def chat(
    session: Annotated[str, typer.Option(help="Id of the session.")] = "chat",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens that hold this share.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    retrieval: Annotated[
        Literal["on", "off", "random", "recent"] | None, typer.Option(help="Overrides how storage is retrieved.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System message of a new session, for a model with a chat template.")
    ] = None,
    store: Store = DEFAULT_STORE,
    tenant: Tenant = "default",
    model: Model = "nano",
    adapter: Adapter = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Talk with a session, a line at a time, until the input ends (Ctrl-D). It remembers what was said.

    A model with a chat template is talked to in it; any other reads lines.
    """
    from memtier.console import emit_json

    with memtier.open_sync(store, model=model, tenant=tenant, device=device) as runtime:
        talker = opened(runtime, session, adapter)
        for line in _lines(f"{session}> "):
            choices = {"temperature": temperature, "top_p": top_p, "seed": seed, "retrieval": retrieval}
            if talker.has_chat_template:
                answer = talker.chat(
                    line, system=None if talker.position else system, max_new_tokens=max_new_tokens, **choices
                )
            else:
                answer = talker.generate(f"{line}\n", max_new_tokens=max_new_tokens, stop=("\n",), **choices)
            for piece in answer:
                if not as_json:
                    print(piece, end="", flush=True)
            if answer.finish_reason == "length" and not talker.has_chat_template:
                talker.observe("\n", role="assistant")
            if as_json:
                said = {"prompt": line, "text": answer.text, "finish_reason": answer.finish_reason}
                emit_json({**said, "position": talker.position})
            else:
                print(flush=True)


@app.command()
def recall(
    session: SessionArgument,
    text: Annotated[str, typer.Argument(help="What to look for.")],
    k: Annotated[int, typer.Option("-k", help="How many passages.")] = 5,
    store: Store = DEFAULT_STORE,
    tenant: Tenant = "default",
    model: Model = "nano",
    adapter: Adapter = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find passages of a session, each with its place, time and source."""
    from dataclasses import asdict

    from memtier.console import emit_json, show_hits

    with existing_session(store, tenant, session, model, adapter, device) as asked:
        hits = asked.recall(text, k=k)
    emit_json({"session": session, "hits": [asdict(hit) for hit in hits]}) if as_json else show_hits(hits)


@app.command()
def inspect(
    session: SessionArgument,
    store: Store = DEFAULT_STORE,
    tenant: Tenant = "default",
    model: Model = "nano",
    adapter: Adapter = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Look into the four tiers of a session, and change nothing."""
    from memtier.console import emit_json, show_memory

    with copy_of_session(store, tenant, session, model, adapter, device) as copy:
        memory = copy.inspect()
    emit_json(memory.model_dump(mode="json")) if as_json else show_memory(memory)


@app.command()
def sessions(store: Store = DEFAULT_STORE, tenant: Tenant = "default", as_json: Json = False) -> None:
    """List the sessions of a store, and change nothing."""
    from memtier.console import emit_json, show_sessions

    found = memtier.list_sessions(store, tenant)
    if as_json:
        emit_json({"store": str(store), "sessions": [info.model_dump(mode="json") for info in found]})
    else:
        show_sessions(found)


def _pieces(file: Path, on_bytes: Callable[[int], None]) -> Iterator[bytes]:
    """A file in pieces, so that it is never in memory whole."""
    done = 0
    with file.open("rb") as opened:
        while data := opened.read(1 << 16):
            yield data
            done += len(data)
            on_bytes(done)


def _lines(prompt: str) -> Iterator[str]:
    """Lines that are not empty, from the keyboard or from a pipe, until they end."""
    while True:
        if sys.stdin.isatty():
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")
