"""One thread, one queue: where tensors and files are touched.

A model's tensors belong to one thread (inference mode does not cross threads, and a pool would run them on several),
and so do the journals. The event loop hands over a function and waits; jobs run first come, first served.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import anyio
from anyio.lowlevel import current_token

from memtier.errors import SessionError

__all__ = ["WorkerThread", "own_task", "shielded", "to_the_end"]

P = ParamSpec("P")
R = TypeVar("R")


def own_task(method: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """Run each call of `method` in a task of its own, so that what it shields is shielded from every cancellation.

    A cancel scope holds off other scopes and not `task.cancel()`, which `asyncio.wait_for`, `asyncio.timeout` and a
    pressed Ctrl-C call on the caller's task. A task group holds on until its tasks have ended, and cancels them as a
    scope does: what happens to the caller reaches `method` in that form alone.
    """

    @wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> R:
        results: list[R] = []
        errors: list[Exception] = []

        async def run() -> None:
            try:
                results.append(await method(*args, **kwargs))
            except Exception as error:  # noqa: BLE001  raised below, outside of the group
                errors.append(error)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
        if errors:
            # not kept by this frame, which its traceback refers to
            raise errors.pop()
        return results[0]

    return call


def to_the_end(method: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    """As `own_task`, for what must be done whoever cancels its caller, before and meanwhile: that acts afterwards."""

    @wraps(method)
    async def shielded_call(*args: P.args, **kwargs: P.kwargs) -> R:
        return await shielded(method(*args, **kwargs))

    run = own_task(shielded_call)

    @wraps(method)
    async def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return await shielded(run(*args, **kwargs))

    return call


async def shielded(call: Awaitable[R]) -> R:
    """What `await call` returns. Cancellation waits until it is done, and acts at the caller's next checkpoint."""
    returned: list[R] = []
    with anyio.CancelScope(shield=True):
        returned.append(await call)
    return returned[0]


class _Loop(Protocol):
    def call_soon_threadsafe(self, callback: Callable[[], Any]) -> Any: ...


class _Job:
    """A function on its way to the thread, and its outcome on the way back."""

    __slots__ = ("done", "error", "function", "loop", "result")

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = anyio.Event()
        self.loop = cast(_Loop, current_token().native_token)

    def run(self) -> None:
        try:
            self.result = self.function()
        except BaseException as error:  # noqa: BLE001  handed to the awaiting task, which raises it
            self.error = error
        self.loop.call_soon_threadsafe(self.done.set)


class WorkerThread:
    """A dedicated thread that an event loop sends functions to.

    Args:
        name: name of the thread, as a debugger shows it.
        wrap: a context manager factory entered once around the thread's whole life (inference mode, say).
    """

    def __init__(self, name: str, wrap: Callable[[], Any] | None = None) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._wrap = wrap
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Jobs that wait for their turn."""
        return self._jobs.qsize()

    async def run(self, function: Callable[..., R], *args: Any) -> R:
        """Run `function(*args)` on the thread and return what it returns.

        Not interrupted by cancellation: a job that was handed over is waited for, so that its effects are never left
        half known. The caller's cancellation acts at its next checkpoint.

        Raises:
            SessionError: the thread was closed.
            BaseException: whatever `function` raises.
        """
        if self._closed:
            raise SessionError(f"{self._thread.name} is closed. Open the store again to go on.")
        job = _Job(lambda: function(*args))
        self._jobs.put(job.run)
        with anyio.CancelScope(shield=True):
            await job.done.wait()
        if job.error is not None:
            raise job.error
        return cast(R, job.result)

    def wait_for(self, function: Callable[..., R], *args: Any) -> R:
        """As `run`, for a caller that is not a task: blocks its thread until the job is done."""
        if self._closed:
            raise SessionError(f"{self._thread.name} is closed. Open the store again to go on.")
        future: Future[R] = Future()

        def job() -> None:
            try:
                future.set_result(function(*args))
            except BaseException as error:  # noqa: BLE001  handed to the waiting thread, which raises it
                future.set_exception(error)

        self._jobs.put(job)
        return future.result()

    def close(self) -> None:
        """Finish the jobs already handed over, then end the thread."""
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _serve(self) -> None:
        if self._wrap is None:
            self._loop()
        else:
            with self._wrap():
                self._loop()

    def _loop(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
