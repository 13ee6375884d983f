"""Commands that keep, copy, move and mend sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import memtier
from memtier.cli_options import DEFAULT_STORE, Adapter, Device, Json, Model, SessionArgument, Store, Tenant

__all__ = ["memory"]

memory = typer.Typer(rich_markup_mode=None)

NameArgument = Annotated[str, typer.Argument(help="Name of the checkpoint.")]


@memory.command()
def history(
    session: SessionArgument,
    store: Store = DEFAULT_STORE,
    tenant: Tenant = "default",
    model: Model = "nano",
    adapter: Adapter = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """List the turns of a session: who spoke, when, which tokens, and what."""
    from memtier.console import emit_json, show_turns
    from memtier.peek import peek

    with (
        peek(store, tenant, session) as copy,
        memtier.open_sync(copy, model=model, tenant=tenant, device=device) as runtime,
    ):
        turns = runtime.session(session, adapter=adapter).history()
    if as_json:
        emit_json({"session": session, "turns": [turn.model_dump(mode="json") for turn in turns]})
    else:
        show_turns(turns)


@memory.command()
def checkpoint(
    session: SessionArgument,
    name: NameArgument,
    store: Store = DEFAULT_STORE,
    tenant: Tenant = "default",
    model: Model = "nano",
    adapter: Adapter = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Keep a session as it stands, under a name."""
    from memtier.peek import require_session

    require_session(store, tenant, session)
    with memtier.open_sync(store, model=model, tenant=tenant, device=device) as runtime:
        kept = runtime.session(session, adapter=adapter)
        kept.checkpoint(name)
        position = kept.position
    _tell({"session": session, "checkpoint": name, "position": position}, as_json)


@memory.command()
def checkpoints(
    session: SessionArgument, store: Store = DEFAULT_STORE, tenant: Tenant = "default", as_json: Json = False
) -> None:
    """List the checkpoints of a session, and change nothing."""
    from memtier.console import emit_json, show_checkpoints
    from memtier.peek import require_session
    from memtier.recovery.copies import checkpoints as listed

    found = listed(require_session(store, tenant, session))
    if as_json:
        emit_json({"session": session, "checkpoints": [info.model_dump(mode="json") for info in found]})
    else:
        show_checkpoints(found)


@memory.command()
def restore(
    session: SessionArgument,
    name: NameArgument,
    store: Store = DEFAULT_STORE,
    tenant: Tenant = "default",
    model: Model = "nano",
    adapter: Adapter = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Go back to a checkpoint. What came after it is gone, unless it is in another checkpoint or in a fork."""
    from memtier.peek import require_session

    require_session(store, tenant, session)
    with memtier.open_sync(store, model=model, tenant=tenant, device=device) as runtime:
        kept = runtime.session(session, adapter=adapter)
        before = kept.position
        kept.restore(name)
        position = kept.position
    _tell({"session": session, "checkpoint": name, "was_at": before, "position": position}, as_json)


@memory.command()
def fork(
    session: SessionArgument,
    new_session: Annotated[str, typer.Argument(help="Id of the new session.")],
    store: Store = DEFAULT_STORE,
    tenant: Tenant = "default",
    model: Model = "nano",
    adapter: Adapter = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Make a new session that begins as this one stands; its blocks are shared."""
    from memtier.peek import require_session

    require_session(store, tenant, session)
    with memtier.open_sync(store, model=model, tenant=tenant, device=device) as runtime:
        position = runtime.session(session, adapter=adapter).fork(new_session).position
    _tell({"session": new_session, "forked_from": session, "position": position}, as_json)


@memory.command()
def export(
    session: SessionArgument,
    file: Annotated[Path, typer.Argument(help="File to write; it must not exist.")],
    store: Store = DEFAULT_STORE,
    tenant: Tenant = "default",
    model: Model = "nano",
    adapter: Adapter = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write a session to one file that `memtier import` reads, here or on another machine."""
    from memtier.peek import require_session

    require_session(store, tenant, session)
    with memtier.open_sync(store, model=model, tenant=tenant, device=device) as runtime:
        kept = runtime.session(session, adapter=adapter)
        kept.export(file)
        position = kept.position
    told = {"session": session, "file": str(file), "position": position, "bytes": file.stat().st_size}
    _tell(told, as_json)


@memory.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="File that `memtier export` wrote.")],
    session: Annotated[str | None, typer.Option(help="Id of the new session (default: the one it had).")] = None,
    store: Store = DEFAULT_STORE,
    tenant: Tenant = "default",
    model: Model = "nano",
    adapter: Adapter = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Make a session of an exported file. Nothing in the file is trusted."""
    with memtier.open_sync(store, model=model, tenant=tenant, device=device) as runtime:
        made = runtime.import_session(file, session, adapter=adapter)
        told = {"session": made.id, "file": str(file), "position": made.position}
    _tell(told, as_json)


def _tell(values: dict[str, object], as_json: bool) -> None:
    from memtier.console import emit_json, show_values

    emit_json(values) if as_json else show_values("", values)
