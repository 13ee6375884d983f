"""A session on disk, opened: its lock, journal, stores and index, and who may read it.

`Backends` says how each is made, so that tests can put faults between.
"""

from __future__ import annotations

import logging
import re
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from memtier.blocks import MemorySettings
from memtier.config import FINGERPRINTED
from memtier.errors import CorruptMemoryError, IncompatibleMemoryError
from memtier.tiers.weights import WeightsTier
from memtier_backends.base import Journal, MemoryIndex, SegmentStore
from memtier_backends.files import flush_folder, storage_errors
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths, drop_partial, sweep_removed
from memtier_backends.lock import SessionLock
from memtier_backends.segment_store import FileSegmentStore

__all__ = ["Backends", "SessionFolder", "check_owner", "check_writer", "is_ours", "written_by"]

log = logging.getLogger("memtier")

META = "session"
WEIGHTS = "weights"
EDITION = "edition"
FORMAT = 1
_SEGMENT = re.compile(r"\d{10}-\d{10}-[0-9a-f]{16}\.safetensors")
_SNAPSHOT = re.compile(r"\d{12}-[0-9a-f]{16}\.safetensors")


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

    def __init__(self, paths: SessionPaths, lock: SessionLock | None, journal: Journal, backends: Backends) -> None:
        """Use `open`. A checkpoint has no lock of its own: the session's guards it."""
        self.paths = paths
        self.journal = journal
        self.backends = backends
        self.segments = backends.segments(paths.segments)
        self.snapshots = backends.snapshots(paths.snapshots)
        self._lock = lock

    @property
    def edition(self) -> str:
        """Another one whenever positions have moved: what was found before is then somewhere else."""
        return self.journal.get_meta(EDITION) or ""

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
                check_owner(journal, identity, weights, settings)
                opened = cls(paths, lock, journal, backends)
                opened.clean()
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
            if self._lock is not None:
                self._lock.release()

    def delete(self, name: str) -> None:
        """Delete a segment or a snapshot that no record names any more, whichever it is."""
        (self.snapshots if _SNAPSHOT.fullmatch(name) else self.segments).delete(name)

    def drop_index(self) -> None:
        """Remove the index, which the updater then makes again from the segments. Nobody may have it open."""
        self.journal.set_indexed_through(0, seal="")
        with storage_errors(f"remove the index {self.paths.index}"):
            if self.paths.index.exists():
                shutil.rmtree(self.paths.index)
                flush_folder(self.paths.folder)

    def clean(self) -> None:
        """Drop unfinished files, files that no record names, and records of what lies past the journal's end."""
        drop_partial(self.paths.folder)
        sweep_removed(self.paths.checkpoints)
        self.journal.drop_after(self.journal.position)
        known = {m.name for m in self.journal.segments()}, {s.name for s in self.journal.snapshots()}
        for store, names in zip((self.segments, self.snapshots), known, strict=True):
            store.clean()
            for orphan in filter(is_ours, set(store.list()) - names):
                log.info("%s: dropped %s, which no record names", self.paths.folder, orphan)
                store.delete(orphan)


def is_ours(name: str) -> bool:
    """True for a file that a segment or a snapshot was written to; anything else there is somebody's, and stays."""
    return (_SEGMENT.fullmatch(name) or _SNAPSHOT.fullmatch(name)) is not None


def check_owner(journal: Journal, identity: dict[str, str], weights: WeightsTier, settings: MemorySettings) -> None:
    """Refuse the memory of another session or another model; write down whose a new one is.

    Raises:
        IncompatibleMemoryError: names the field that differs.
        CorruptMemoryError: it does not say.
    """
    where = f"session {identity['id']!r}"
    meta: dict[str, Any] | None = journal.get_meta(META)
    if meta is None:
        if journal.position:
            raise CorruptMemoryError(
                f"the journal of session {identity['id']!r} holds {journal.position} tokens, and does not say which "
                f"model wrote them. Restore the folder from a backup, or delete the session."
            )
        about = {"format": FORMAT, "created_at": time.time(), "lineage": uuid4().hex}
        # first, since whose it is says that the session has begun
        journal.set_meta(WEIGHTS, all_values(weights))
        journal.set_meta(META, {**identity, **about, **written_by(weights, settings)})
        return
    for name, expected in identity.items():
        if meta[name] != expected:
            raise IncompatibleMemoryError(
                f"{where} lies in the folder of {name} {expected!r} and says that its {name} is {meta[name]!r}. "
                f"A session's folder cannot be renamed or moved: use session.export and runtime.import_session."
            )
    check_writer(meta, weights, settings, where)


def written_by(weights: WeightsTier, settings: MemorySettings) -> dict[str, Any]:
    """What memory says of the model and the sizes that it was written with."""
    return {"model": {**weights.fingerprint, "name": weights.name}, "memory": _sizes(settings)}


def all_values(weights: WeightsTier) -> dict[str, Any]:
    """A hash of every tensor of the model, and in which dtype: what `memtier doctor --full` compares."""
    return {"dtype": weights.fingerprint["dtype"], "hashes": weights.tensor_hashes()}


def check_writer(meta: dict[str, Any], weights: WeightsTier, settings: MemorySettings, where: str) -> None:
    """Refuse memory of another format, another model or other sizes.

    Args:
        meta: what the memory says of itself.
        where: what to call it.

    Raises:
        IncompatibleMemoryError: names the first field that differs.
    """
    if meta.get("format") != FORMAT:
        raise IncompatibleMemoryError(
            f"{where} has format {meta.get('format')!r}, and this version of memtier reads format {FORMAT}. "
            f"Open it with the version that wrote it."
        )
    weights.check(meta["model"], where)
    stored, sizes = meta["memory"], _sizes(settings)
    for name in sorted(stored.keys() | sizes.keys()):
        was, now = stored.get(name), sizes.get(name)
        if was != now:
            raise IncompatibleMemoryError(
                f"{where} was written with {name}={was}, and is opened with {name}={now}. "
                f"Open it with MemoryConfig({name}={was!r}), or observe the text again under another id."
            )


def _sizes(settings: MemorySettings) -> dict[str, Any]:
    sizes = {name: value for name, value in asdict(settings).items() if name in (*FINGERPRINTED, "storage_dtype")}
    return {**sizes, "memory_layers": list(settings.memory_layers)}
