"""The same names, blocking: for notebooks and scripts.

One event loop runs in a thread of its own; each method hands its call over and waits. Signatures are those of the async
methods, because they are taken from them.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial, wraps
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from anyio.from_thread import BlockingPortal, start_blocking_portal

from memtier.config import MemoryConfig
from memtier.errors import SessionError
from memtier.generation import Generation
from memtier.runtime import Runtime
from memtier.runtime import open as open_async
from memtier.session import Session

__all__ = ["SyncGeneration", "SyncRuntime", "SyncSession", "open_sync"]

P = ParamSpec("P")
R = TypeVar("R")


def open_sync(
    store: str | Path, *, model: Any = "nano", tokenizer: Any = None, config: MemoryConfig | None = None,
    tenant: str = "default", device: str = "auto", dtype: str = "auto",
) -> SyncRuntime:  # fmt: skip
    """Open a store with a model, blocking: ``with memtier.open_sync("./memory") as runtime``. See `memtier.open`."""
    return SyncRuntime(
        open_async(store, model=model, tokenizer=tokenizer, config=config, tenant=tenant, device=device, dtype=dtype)
    )


class _Blocking:
    """An object of the event loop's thread, called from another."""

    def __init__(self, inner: Any, portal: BlockingPortal) -> None:
        self._inner = inner
        self._portal = portal


def _blocking(method: Callable[Concatenate[Any, P], Awaitable[R]]) -> Callable[Concatenate[Any, P], R]:
    """`method` of the inner object, awaited on the event loop's thread."""

    @wraps(method)
    def call(self: _Blocking, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._portal.call(partial(method, self._inner, *args, **kwargs))

    return call


def _plain(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """`method` of the inner object, which awaits nothing, called on the event loop's thread."""

    @wraps(method)
    def call(self: _Blocking, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._portal.call(partial(method, self._inner, *args, **kwargs))

    return call


def _signed_as(
    method: Callable[Concatenate[Any, P], Any],
) -> Callable[[Callable[..., R]], Callable[Concatenate[Any, P], R]]:
    """`functools.wraps`, in a type that stays a method."""
    return wraps(method)


class SyncGeneration(_Blocking):
    """See `Generation`; a plain iterator."""

    _inner: Generation

    def __iter__(self) -> SyncGeneration:
        return self

    def __next__(self) -> str:
        try:
            return self._portal.call(self._inner.__anext__)
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> SyncGeneration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """See `Generation.aclose`."""
        self._portal.call(self._inner.aclose)

    @property
    def text(self) -> str:
        """See `Generation.text`."""
        return self._inner.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """See `Generation.token_ids`."""
        return self._inner.token_ids

    @property
    def finish_reason(self) -> str | None:
        """See `Generation.finish_reason`."""
        return self._inner.finish_reason


class SyncSession(_Blocking):
    """See `Session`."""

    _inner: Session

    @property
    def id(self) -> str:
        """See `Session.id`."""
        return self._inner.id

    @property
    def position(self) -> int:
        """See `Session.position`."""
        return self._inner.position

    observe = _blocking(Session.observe)
    recall = _blocking(Session.recall)
    inspect = _blocking(Session.inspect)
    block = _blocking(Session.block)
    state = _blocking(Session.state)
    flush = _blocking(Session.flush)
    history = _blocking(Session.history)
    checkpoint = _blocking(Session.checkpoint)
    checkpoints = _blocking(Session.checkpoints)
    restore = _blocking(Session.restore)
    drop_checkpoint = _blocking(Session.drop_checkpoint)
    export = _blocking(Session.export)
    forget = _blocking(Session.forget)
    close = _blocking(Session.close)
    blocks = _plain(Session.blocks)
    stats = _plain(Session.stats)

    @_signed_as(Session.fork)
    def fork(self, *args: Any, **kwargs: Any) -> SyncSession:
        return SyncSession(self._portal.call(partial(self._inner.fork, *args, **kwargs)), self._portal)

    @_signed_as(Session.generate)
    def generate(self, *args: Any, **kwargs: Any) -> SyncGeneration:
        return SyncGeneration(self._portal.call(partial(self._inner.generate, *args, **kwargs)), self._portal)

    @_signed_as(Session.chat)
    def chat(self, *args: Any, **kwargs: Any) -> SyncGeneration:
        return SyncGeneration(self._portal.call(partial(self._inner.chat, *args, **kwargs)), self._portal)

    @property
    def has_chat_template(self) -> bool:
        """See `Session.has_chat_template`."""
        return self._inner.has_chat_template


class SyncRuntime:
    """See `Runtime`; a plain context manager."""

    def __init__(self, runtime: Runtime) -> None:
        self._inner = runtime
        self._stack: ExitStack | None = None
        self._open_portal: BlockingPortal | None = None
        # the same object for the same session, as long as anyone has it: a closed session must not be kept alive
        self._sessions: WeakValueDictionary[int, SyncSession] = WeakValueDictionary()

    @property
    def _portal(self) -> BlockingPortal:
        if self._open_portal is None:
            raise SessionError("this runtime is not open. Use it inside 'with memtier.open_sync(...) as runtime'.")
        return self._open_portal

    def __enter__(self) -> SyncRuntime:
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal("asyncio"))
            inner: AbstractContextManager[Runtime] = portal.wrap_async_context_manager(self._inner)
            stack.enter_context(inner)
            self._open_portal = portal
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, self._stack, self._open_portal = self._stack, None, None
        if stack is not None:
            stack.__exit__(kind, error, trace)

    @_signed_as(Runtime.session)
    def session(self, *args: Any, **kwargs: Any) -> SyncSession:
        session = self._portal.call(partial(self._inner.session, *args, **kwargs))
        return self._sessions.setdefault(id(session), SyncSession(session, self._portal))

    @_signed_as(Runtime.import_session)
    def import_session(self, *args: Any, **kwargs: Any) -> SyncSession:
        session = self._portal.call(partial(self._inner.import_session, *args, **kwargs))
        return self._sessions.setdefault(id(session), SyncSession(session, self._portal))

    sessions = _blocking(Runtime.sessions)
    delete_session = _blocking(Runtime.delete_session)
    delete_tenant = _blocking(Runtime.delete_tenant)
    doctor = _blocking(Runtime.doctor)
    stats = _plain(Runtime.stats)
