"""The same names, blocking: for notebooks and scripts.

One event loop runs in a thread of its own; each method hands its call over and waits. An interrupted caller (Ctrl-C)
gives its call up between two steps. Signatures are those of the async methods, because they are taken from them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, suppress
from functools import partial, wraps
from inspect import isawaitable
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakValueDictionary

import anyio
from anyio.from_thread import BlockingPortal

from memtier.config import MemoryConfig
from memtier.errors import SessionError
from memtier.generation import Generation
from memtier.runtime import Runtime
from memtier.runtime import open as open_async
from memtier.session import Session

__all__ = ["SyncGeneration", "SyncRuntime", "SyncSession", "open_sync"]

NOT_OPEN = "this runtime is not open. Use it inside 'with memtier.open_sync(...) as runtime'."

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


class _Call:
    """A call on the event loop's thread, which its caller may give up."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._scope: anyio.CancelScope | None = None
        self.ended = False

    @property
    def begun(self) -> bool:
        """True once the function was called."""
        return self._scope is not None

    async def run(self) -> Any:
        """What the function returns, awaited if need be."""
        self._over = anyio.Event()
        with anyio.CancelScope() as self._scope:
            try:
                result = self._function()
                return await result if isawaitable(result) else result
            finally:
                self.ended = True
                self._over.set()
        raise SessionError("the call was given up by its caller.")  # who does not listen any more

    async def give_up(self) -> None:
        """Cancel it, and wait until it is over. Handed over after `run`, so begun after it too, if that ever is."""
        if self._scope is not None:
            self._scope.cancel()
            await self._over.wait()


class _LoopThread:
    """An event loop in a thread of its own, with a runtime open in it; the one way for other threads to call there.

    All blocking objects of a runtime share it. A forked child has the objects and not the thread: there each call is
    refused, since it would wait for ever.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._portal: BlockingPortal | None = None
        self._stack = ExitStack()
        # the same object for the same session, as long as anyone has it: a closed session must not be kept alive
        self._sessions: WeakValueDictionary[int, SyncSession] = WeakValueDictionary()
        self._sessions_lock = threading.Lock()

    @property
    def forked(self) -> bool:
        """True in a child of the process that opened it."""
        return os.getpid() != self._pid

    def open(self, runtime: Runtime) -> None:
        """Start the thread, and open the runtime in it."""
        self._refuse_forked()
        # no generator is left suspended, as `start_blocking_portal` has one: a forked child would run its end on exit
        with ExitStack() as stack:
            started: Future[BlockingPortal] = Future()
            thread = threading.Thread(target=_serve, args=(started,), name="memtier-loop", daemon=True)
            thread.start()
            portal = started.result()
            stack.callback(thread.join)
            stack.push(lambda kind, error, trace: portal.call(portal.stop, kind is not None))
            stack.enter_context(portal.wrap_async_context_manager(runtime))
            self._stack, self._thread, self._portal = stack.pop_all(), thread, portal

    def close(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close the runtime, and end the thread. A forked child has neither, and says so if nothing else is wrong."""
        if self.forked:
            if error is None:
                self._refuse_forked()
            return
        stack, self._stack, self._portal = self._stack, ExitStack(), None
        stack.__exit__(kind, error, trace)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `function` returns when called, and awaited if need be, on the thread.

        Raises:
            SessionError: the runtime is not open, or not in this process; or this is its thread.
            BaseException: whatever `function` raises.
        """
        self._refuse_forked()
        if self._thread is threading.current_thread():
            raise SessionError(
                "a blocking call came from within another one, by an iterator that is read there or by on_progress, "
                "and would wait for itself. Call first, and give what it returned: list(generation), not map(f, "
                "generation)."
            )
        portal = self._portal
        if portal is None:
            raise SessionError(NOT_OPEN)
        call = _Call(partial(function, *map(_unwrapped, args), **{name: _unwrapped(x) for name, x in kwargs.items()}))
        try:
            return portal.call(call.run)
        except CancelledError as error:
            raise SessionError("the runtime was closed by another thread during this call. Open it again.") from error
        except RuntimeError as error:
            if call.begun:
                raise
            # closed by another thread just now
            raise SessionError(NOT_OPEN) from error
        except BaseException:
            if not call.ended:
                # the caller was interrupted, not the call; once it is closed, all calls have ended
                with suppress(RuntimeError):
                    portal.call(call.give_up)
            raise

    def session(self, inner: Session) -> SyncSession:
        """The blocking session of an async one, the same each time."""
        with self._sessions_lock:
            return self._sessions.setdefault(id(inner), SyncSession(inner, self))

    def _refuse_forked(self) -> None:
        if self.forked:
            raise SessionError(
                f"this runtime was opened by process {self._pid}, and this is process {os.getpid()}: threads do not "
                f"survive a fork. Open the store in the child, or start it with 'spawn'."
            )


def _serve(started: Future[BlockingPortal]) -> None:
    async def serve() -> None:
        async with BlockingPortal() as portal:
            started.set_result(portal)
            await portal.sleep_until_stopped()

    try:
        anyio.run(serve)
    except BaseException as error:
        if started.done():
            raise
        started.set_exception(error)


class _Blocking:
    """An object of the event loop's thread, called from another."""

    def __init__(self, inner: Any, loop: _LoopThread) -> None:
        self._inner = inner
        self._loop = loop


def _unwrapped(value: Any) -> Any:
    return value._inner if isinstance(value, _Blocking) else value


def _blocking(method: Callable[Concatenate[Any, P], Awaitable[R]]) -> Callable[Concatenate[Any, P], R]:
    """`method` of the inner object, awaited on the event loop's thread."""

    @wraps(method)
    def call(self: _Blocking, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._loop.call(method, self._inner, *args, **kwargs)

    return call


def _plain(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """`method` of the inner object, which awaits nothing, called on the event loop's thread."""

    @wraps(method)
    def call(self: _Blocking, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._loop.call(method, self._inner, *args, **kwargs)

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
        if self._inner.finish_reason is not None:
            raise StopIteration
        try:
            return self._loop.call(self._inner.__anext__)
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> SyncGeneration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # in a forked child there is nothing to end; what else goes wrong there must not be hidden by that
        if error is None or not self._loop.forked:
            self.close()

    def close(self) -> None:
        """See `Generation.aclose`."""
        if self._inner.finish_reason is None:
            self._loop.call(self._inner.aclose)

    aclose = close

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
        return self._loop.session(self._loop.call(self._inner.fork, *args, **kwargs))

    @_signed_as(Session.generate)
    def generate(self, *args: Any, **kwargs: Any) -> SyncGeneration:
        return SyncGeneration(self._loop.call(self._inner.generate, *args, **kwargs), self._loop)

    @_signed_as(Session.chat)
    def chat(self, *args: Any, **kwargs: Any) -> SyncGeneration:
        return SyncGeneration(self._loop.call(self._inner.chat, *args, **kwargs), self._loop)

    @property
    def has_chat_template(self) -> bool:
        """See `Session.has_chat_template`."""
        return self._inner.has_chat_template


class SyncRuntime(_Blocking):
    """See `Runtime`; a plain context manager."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime, _LoopThread())

    def __enter__(self) -> SyncRuntime:
        self._loop.open(self._inner)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.close(kind, error, trace)

    @_signed_as(Runtime.session)
    def session(self, *args: Any, **kwargs: Any) -> SyncSession:
        return self._loop.session(self._loop.call(self._inner.session, *args, **kwargs))

    @_signed_as(Runtime.import_session)
    def import_session(self, *args: Any, **kwargs: Any) -> SyncSession:
        return self._loop.session(self._loop.call(self._inner.import_session, *args, **kwargs))

    sessions = _blocking(Runtime.sessions)
    delete_session = _blocking(Runtime.delete_session)
    delete_tenant = _blocking(Runtime.delete_tenant)
    doctor = _blocking(Runtime.doctor)
    stats = _plain(Runtime.stats)
