"""Commands that keep, copy, move and mend sessions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import memtier
from memtier.cli_options import DEFAULT_STORE, Adapter, Device, Json, Model, SessionArgument, Store, Tenant
from memtier.cli_session import copy_of_session, existing_session
from memtier.errors import ConfigError, SessionError

if TYPE_CHECKING:
    from memtier.recovery.reports import SessionHealth

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

    with copy_of_session(store, tenant, session, model, adapter, device) as copy:
        turns = copy.history()
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
    with existing_session(store, tenant, session, model, adapter, device) as kept:
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
    from memtier.console import reading_again

    with existing_session(store, tenant, session, model, adapter, device) as kept, reading_again() as on_progress:
        before = kept.position
        kept.restore(name, on_progress=on_progress)
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
    with existing_session(store, tenant, session, model, adapter, device) as kept:
        position = kept.fork(new_session).position
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
    with existing_session(store, tenant, session, model, adapter, device) as kept:
        kept.export(file)
        position = kept.position
    told = {"session": session, "file": str(file), "position": position, "bytes": file.stat().st_size}
    _tell(told, as_json)


@memory.command()
def forget(
    session: SessionArgument,
    text: Annotated[str | None, typer.Argument(help="Forget the best passage that holds these words; or:")] = None,
    start: Annotated[int | None, typer.Option(help="First token to forget.")] = None,
    end: Annotated[int | None, typer.Option(help="The token after the last one to forget.")] = None,
    turn: Annotated[int | None, typer.Option(help="A turn, by its number in `memtier history`.")] = None,
    forks: Annotated[bool, typer.Option(help="Forget it in forks too.")] = True,
    verify: Annotated[
        bool, typer.Option(help="Look for its bytes in the raw files; exit code 1 without a proof.")
    ] = True,
    store: Store = DEFAULT_STORE,
    tenant: Tenant = "default",
    model: Model = "nano",
    adapter: Adapter = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Forget a passage for good: it leaves every tier, every checkpoint and every fork; later tokens move down."""
    from memtier.console import emit_json, reading_again, show_values

    with existing_session(store, tenant, session, model, adapter, device) as kept, reading_again() as on_progress:
        hit = None
        if text is not None:
            hits = kept.recall(text, k=1)
            if not hits:
                raise SessionError(f"nothing in session {session!r} matches {text!r}; nothing was forgotten.")
            (hit,) = hits
        report = kept.forget(hit, start=start, end=end, turn=turn, forks=forks, verify=verify, on_progress=on_progress)
    forgotten = {"session": session, "text": None if hit is None else hit.text, **report.model_dump(mode="json")}
    emit_json(forgotten) if as_json else show_values(f"forgotten in {session}", forgotten)
    if report.proof is not None and not report.proof.proven:
        raise typer.Exit(1)


@memory.command()
def delete(
    session: Annotated[str | None, typer.Argument(help="Id of the session.")] = None,
    all_of_tenant: Annotated[bool, typer.Option("--all", help="Delete every session of the tenant.")] = False,
    store: Store = DEFAULT_STORE,
    tenant: Tenant = "default",
    as_json: Json = False,
) -> None:
    """Delete a session, or all of a tenant's, with checkpoints. Forks are sessions of their own, and stay."""
    from memtier.listing import remove_session_of, remove_tenant

    if (session is None) != all_of_tenant:
        raise ConfigError("say which session to delete, or --all; exactly one of them.")
    if session is not None:
        _tell({"deleted": [session], "still_held_by": remove_session_of(store, tenant, session)}, as_json)
    else:
        _tell({"deleted": remove_tenant(store, tenant), "still_held_by": []}, as_json)


@memory.command()
def doctor(
    session: Annotated[str | None, typer.Argument(help="Id of the session (default: all of the tenant).")] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Mend what is found, put aside what is unknown.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Read and check every byte, and every value of the model's weights.")
    ] = False,
    store: Store = DEFAULT_STORE,
    tenant: Tenant = "default",
    model: Model = "nano",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Look over the files of sessions; exit code 1 if something is wrong and was not mended. --full loads the model."""
    import anyio

    from memtier.console import emit_json, show_health
    from memtier.folder import Backends
    from memtier.peek import require_session
    from memtier.recovery.doctor import examine
    from memtier.tiers.weights import WeightsTier
    from memtier_backends.layout import session_folder, session_folders, traces

    async def run(function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    async def look() -> list[SessionHealth]:
        return [
            await examine(folder, Backends(), run, rebuild=rebuild, full=full, weights=weights) for folder in folders
        ]

    if session is None:
        folders = session_folders(store, tenant)
    else:
        folders = [session_folder(store, tenant, session)]
        if not traces(folders[0]):
            require_session(store, tenant, session)
    weights = WeightsTier.load(model, device=device) if full else None
    found = anyio.run(look)
    if as_json:
        emit_json({"store": str(store), "sessions": [health.model_dump(mode="json") for health in found]})
    else:
        show_health(found)
    if not all(health.healthy for health in found):
        raise typer.Exit(1)


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
    from memtier.console import reading_again

    with (
        memtier.open_sync(store, model=model, tenant=tenant, device=device) as runtime,
        reading_again() as on_progress,
    ):
        made = runtime.import_session(file, session, adapter=adapter, on_progress=on_progress)
        told = {"session": made.id, "file": str(file), "position": made.position}
    _tell(told, as_json)


def _tell(values: dict[str, object], as_json: bool) -> None:
    from memtier.console import emit_json, show_values

    emit_json(values) if as_json else show_values("", values)
