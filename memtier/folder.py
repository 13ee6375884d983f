"""A session on disk, opened: its lock, journal, stores and index, and who may read it.

`Backends` says how each is made, so that tests can put faults between.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from memtier.blocks import MemorySettings
from memtier.config import FINGERPRINTED
from memtier.errors import CorruptMemoryError, IncompatibleMemoryError
from memtier.tiers.weights import WeightsTier
from memtier_backends.base import Journal, MemoryIndex, SegmentStore
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths
from memtier_backends.lock import SessionLock
from memtier_backends.segments import FileSegmentStore

__all__ = ["Backends", "SessionFolder"]

log = logging.getLogger("memtier")

META = "session"


async def _lance(folder: Path, layers: list[int]) -> MemoryIndex:
    from memtier_backends.index_lance import LanceIndex

    return await LanceIndex.open(folder, layers)


@dataclass(frozen=True, slots=True)
class Backends:
    """Factories of what a session writes to. `index` takes the folder and the landmark size of each memory layer."""

    journal: Callable[[Path], Journal] = SqliteJournal.open
    segments: Callable[[Path], SegmentStore] = FileSegmentStore
    snapshots: Callable[[Path], SegmentStore] = FileSegmentStore
    index: Callable[[Path, list[int]], Awaitable[MemoryIndex]] = _lance


class SessionFolder:
    """What a session owns on disk. It belongs to the journal thread, but for the stores, which are safe anywhere.

    Opening drops unfinished files, files that no record names, and records of what lies past the journal's end.
    """

    def __init__(self, paths: SessionPaths, lock: SessionLock, journal: Journal, backends: Backends) -> None:
        """Use `open`."""
        self.paths = paths
        self.journal = journal
        self.backends = backends
        self.segments = backends.segments(paths.segments)
        self.snapshots = backends.snapshots(paths.snapshots)
        self._lock = lock

    @classmethod
    def open(
        cls,
        folder: Path,
        backends: Backends,
        *,
        identity: dict[str, str],
        weights: WeightsTier,
        settings: MemorySettings,
    ) -> SessionFolder:
        """Take the lock, open the journal, and check that this model and these sizes wrote it.

        Raises:
            SessionBusyError: another runtime holds it.
            IncompatibleMemoryError: another model, other sizes, or a newer format; names the field.
            CorruptMemoryError: damaged.
        """
        lock = SessionLock.acquire(folder)
        try:
            paths = SessionPaths(folder)
            journal = backends.journal(paths.journal)
            try:
                _check_owner(journal, identity, weights, settings)
                opened = cls(paths, lock, journal, backends)
                opened._clean()
            except BaseException:
                journal.close()
                raise
        except BaseException:
            lock.release()
            raise
        return opened

    def close(self) -> None:
        """Close the journal and free the lock."""
        try:
            self.journal.close()
        finally:
            self._lock.release()

    def _clean(self) -> None:
        self.journal.drop_after(self.journal.position)
        known = {m.name for m in self.journal.segments()}, {s.name for s in self.journal.snapshots()}
        for store, names in zip((self.segments, self.snapshots), known, strict=True):
            store.clean()
            for orphan in set(store.list()) - names:
                log.info("%s: dropped %s, which no record names", self.paths.folder, orphan)
                store.delete(orphan)


def _check_owner(journal: Journal, identity: dict[str, str], weights: WeightsTier, settings: MemorySettings) -> None:
    sizes = {name: value for name, value in asdict(settings).items() if name in (*FINGERPRINTED, "storage_dtype")}
    sizes["memory_layers"] = list(settings.memory_layers)
    meta: dict[str, Any] | None = journal.get_meta(META)
    if meta is None:
        if journal.position:
            raise CorruptMemoryError(
                f"the journal of session {identity['id']!r} holds {journal.position} tokens, and does not say which "
                f"model wrote them. Restore the folder from a backup, or delete the session."
            )
        named = {**weights.fingerprint, "name": weights.name}
        journal.set_meta(META, {**identity, "created_at": time.time(), "model": named, "memory": sizes})
        return
    where = f"session {identity['id']!r}"
    weights.check(meta["model"], where)
    for name, stored in meta["memory"].items():
        if sizes[name] != stored:
            raise IncompatibleMemoryError(
                f"{where} was written with {name}={stored}, and is opened with {name}={sizes[name]}. "
                f"Open it with MemoryConfig({name}={stored!r}), or observe the text again under another id."
            )
