"""A session as a command opens it: one that there is, and closed again with its runtime whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import memtier

if TYPE_CHECKING:
    from memtier.sync import SyncRuntime, SyncSession

__all__ = ["copy_of_session", "existing_session", "opened"]


def opened(runtime: SyncRuntime, session: str, adapter: Path | None) -> SyncSession:
    """A session of the runtime, with a bar while its tokens are read again, as after a crash."""
    from memtier.console import reading_again

    with reading_again() as on_progress:
        return runtime.session(session, adapter=adapter, on_progress=on_progress)


@contextmanager
def existing_session(
    store: Path, tenant: str, session: str, model: str, adapter: Path | None, device: str
) -> Iterator[SyncSession]:
    """The session itself. Raises SessionNotFoundError if there is none."""
    from memtier.peek import require_session

    require_session(store, tenant, session)
    with memtier.open_sync(store, model=model, tenant=tenant, device=device) as runtime:
        yield opened(runtime, session, adapter)


@contextmanager
def copy_of_session(
    store: Path, tenant: str, session: str, model: str, adapter: Path | None, device: str
) -> Iterator[SyncSession]:
    """A copy, to look at: nothing is changed, and whoever has it open is not disturbed. Raises likewise."""
    from memtier.peek import peek

    with (
        peek(store, tenant, session) as copy,
        existing_session(copy, tenant, session, model, adapter, device) as looked,
    ):
        yield looked
