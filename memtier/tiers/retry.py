"""Storage that fails may be storage that is busy: the same call is sent again a few times before it counts."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

from memtier.errors import CorruptMemoryError, IncompatibleMemoryError, StorageError

__all__ = ["RETRY_AFTER_SECONDS", "is_transient", "retry", "retry_reads"]

log = logging.getLogger("memtier")

RETRY_AFTER_SECONDS = (0.02, 0.1, 0.5)
"""Waits before the second, third and fourth try."""

R = TypeVar("R")


def is_transient(error: BaseException) -> bool:
    """True for an error that another try may not meet: not for damage, and not for another format."""
    return isinstance(error, (StorageError, OSError)) and not isinstance(
        error, (CorruptMemoryError, IncompatibleMemoryError)
    )


def retry_reads(read: Callable[[], R]) -> R:
    """What `read()` returns, tried up to four times. Blocks; for threads that may.

    Raises:
        StorageError: the last try's error, or the first that no further try can mend.
    """
    for wait in RETRY_AFTER_SECONDS:
        try:
            return read()
        except (StorageError, OSError) as error:
            if not is_transient(error):
                raise
            log.warning("a read failed and is tried again in %s s: %s", wait, error)
        time.sleep(wait)
    return read()


async def retry(call: Callable[[], Awaitable[R]], what: str) -> R:
    """What `await call()` returns, tried up to four times. Sent again, the call must do no harm.

    Raises:
        StorageError: as `retry_reads`.
    """
    for wait in RETRY_AFTER_SECONDS:
        try:
            return await call()
        except (StorageError, OSError) as error:
            if not is_transient(error):
                raise
            log.warning("%s failed and is tried again in %s s: %s", what, wait, error)
        await anyio.sleep(wait)
    return await call()
