"""Every error memtier raises, as one tree.

    MemtierError
    ├── ConfigError            a choice that cannot work (also a ValueError)
    ├── ModelError             the model refused a step, or cannot be used here
    ├── SessionError           a session cannot do what was asked
    │   ├── SessionBusyError       another process or runtime holds it
    │   └── SessionNotFoundError   no such session in this store
    ├── StorageError           the store could not read or write
    │   ├── StorageFullError       no space left; nothing acknowledged was lost
    │   ├── CorruptMemoryError     bytes on disk are not what was written
    │   └── IncompatibleMemoryError  memory of another model, format or config
    └── KernelError            a kernel that was asked for by name cannot run

A message says what came, what was expected, and what to do next.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "CorruptMemoryError",
    "IncompatibleMemoryError",
    "KernelError",
    "MemtierError",
    "ModelError",
    "SessionBusyError",
    "SessionError",
    "SessionNotFoundError",
    "StorageError",
    "StorageFullError",
]


class MemtierError(Exception):
    """Base of every error that memtier raises on purpose."""


class ConfigError(MemtierError, ValueError):
    """A configuration or an argument that cannot work."""


class ModelError(MemtierError):
    """The model refused a step (non-finite values, out of memory) or cannot be used."""


class SessionError(MemtierError):
    """A session cannot do what was asked of it."""


class SessionBusyError(SessionError):
    """Another process or runtime holds the session's lock."""


class SessionNotFoundError(SessionError):
    """The store holds no session of that id."""


class StorageError(MemtierError):
    """The store could not read or write."""


class StorageFullError(StorageError):
    """No space is left; what was acknowledged before is safe."""


class CorruptMemoryError(StorageError):
    """Bytes on disk are not the bytes that were written."""


class IncompatibleMemoryError(StorageError):
    """Memory made by another model, another format or another memory config."""


class KernelError(MemtierError):
    """A kernel implementation that was asked for by name cannot run here."""
