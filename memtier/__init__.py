"""memtier lets a language model remember: four tiers of memory, in constant device memory.

    async with memtier.open("./memory") as runtime:
        session = await runtime.session("alice")
        await session.observe("any text")
        async for piece in session.generate("a question"):
            print(piece, end="")

Names are loaded when first used, so that importing memtier does no work.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memtier.blocks import MemoryHit as MemoryHit
    from memtier.config import MemoryConfig as MemoryConfig
    from memtier.errors import ConfigError as ConfigError
    from memtier.errors import CorruptMemoryError as CorruptMemoryError
    from memtier.errors import IncompatibleMemoryError as IncompatibleMemoryError
    from memtier.errors import KernelError as KernelError
    from memtier.errors import MemtierError as MemtierError
    from memtier.errors import ModelError as ModelError
    from memtier.errors import SessionBusyError as SessionBusyError
    from memtier.errors import SessionError as SessionError
    from memtier.errors import SessionNotFoundError as SessionNotFoundError
    from memtier.errors import StorageError as StorageError
    from memtier.errors import StorageFullError as StorageFullError
    from memtier.generation import Generation as Generation
    from memtier.huggingface import TieredCache as TieredCache
    from memtier.listing import list_sessions as list_sessions
    from memtier.recovery.reports import CheckpointInfo as CheckpointInfo
    from memtier.recovery.reports import ErasureProof as ErasureProof
    from memtier.recovery.reports import Finding as Finding
    from memtier.recovery.reports import ForgetReport as ForgetReport
    from memtier.recovery.reports import SessionHealth as SessionHealth
    from memtier.reports import BlockContent as BlockContent
    from memtier.reports import MemoryReport as MemoryReport
    from memtier.reports import ObserveReport as ObserveReport
    from memtier.reports import RuntimeStats as RuntimeStats
    from memtier.reports import SessionInfo as SessionInfo
    from memtier.reports import SessionStats as SessionStats
    from memtier.reports import TurnInfo as TurnInfo
    from memtier.runtime import Runtime as Runtime
    from memtier.runtime import open as open
    from memtier.session import Session as Session
    from memtier.sync import SyncGeneration as SyncGeneration
    from memtier.sync import SyncRuntime as SyncRuntime
    from memtier.sync import SyncSession as SyncSession
    from memtier.sync import open_sync as open_sync

_HOMES = {
    "memtier.blocks": ("MemoryHit",),
    "memtier.config": ("MemoryConfig",),
    "memtier.errors": (
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
    ),
    "memtier.generation": ("Generation",),
    "memtier.huggingface": ("TieredCache",),
    "memtier.recovery.reports": ("CheckpointInfo", "ErasureProof", "Finding", "ForgetReport", "SessionHealth"),
    "memtier.reports": (
        "BlockContent",
        "MemoryReport",
        "ObserveReport",
        "RuntimeStats",
        "SessionInfo",
        "SessionStats",
        "TurnInfo",
    ),
    "memtier.listing": ("list_sessions",),
    "memtier.runtime": ("Runtime", "open"),
    "memtier.session": ("Session",),
    "memtier.sync": ("SyncGeneration", "SyncRuntime", "SyncSession", "open_sync"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BlockContent",
    "CheckpointInfo",
    "ConfigError",
    "CorruptMemoryError",
    "ErasureProof",
    "Finding",
    "ForgetReport",
    "Generation",
    "IncompatibleMemoryError",
    "KernelError",
    "MemoryConfig",
    "MemoryHit",
    "MemoryReport",
    "MemtierError",
    "ModelError",
    "ObserveReport",
    "Runtime",
    "RuntimeStats",
    "Session",
    "SessionBusyError",
    "SessionError",
    "SessionHealth",
    "SessionInfo",
    "SessionNotFoundError",
    "SessionStats",
    "StorageError",
    "StorageFullError",
    "SyncGeneration",
    "SyncRuntime",
    "SyncSession",
    "TieredCache",
    "TurnInfo",
    "list_sessions",
    "open",
    "open_sync",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("memtier")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'memtier' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
