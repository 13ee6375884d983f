"""Looking a session's files over, and mending what can be mended. No model is needed: what is derived is only dropped
here, and made again when the session is opened.

Nothing is deleted that cannot be accounted for: damaged and unknown files go to the session's `quarantine` folder.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import anyio

from memtier.errors import CorruptMemoryError, IncompatibleMemoryError, MemtierError, SessionBusyError
from memtier.folder import META, WEIGHTS, Backends, SessionFolder, is_ours
from memtier.recovery.copies import CHECKPOINT
from memtier.recovery.forget import INTENT
from memtier.recovery.mending import mend_journal, put_aside
from memtier.recovery.reports import Finding, SessionHealth
from memtier.tiers.weights import WeightsTier
from memtier_backends.base import SegmentStore
from memtier_backends.files import storage_errors
from memtier_backends.folder_seal import FolderSeal
from memtier_backends.layout import RESCUED_PREFIX, SessionPaths, sweep_removed, traces
from memtier_backends.lock import SessionLock
from memtier_backends.segments import verify_segment
from memtier_backends.tensors import content_hash

__all__ = ["examine"]

R = TypeVar("R")
Run = Callable[..., Awaitable[Any]]


async def examine(
    folder: Path, backends: Backends, run: Run, *, rebuild: bool, full: bool, weights: WeightsTier | None = None
) -> SessionHealth:
    """Look over one session that nobody has open.

    Args:
        folder: the session's.
        run: `await run(function, *arguments)`, on the thread that journals belong to.
        rebuild: mend what is found; else only tell.
        full: read and check every byte; else sizes, the journal, and whether the index opens.
        weights: a model whose values are to be compared with those that wrote the session; None for none.
    """
    examination = _Examination(SessionPaths(folder), rebuild)
    if not await run(examination.has_journal):
        return examination.health()
    try:
        # one lock for all of it: nobody else may write between a look and the mending
        lock = await run(SessionLock.acquire, folder)
    except SessionBusyError as error:
        examination.find("session", f"is open, and was not looked at: {error}", mended=False, harm=False)
        return examination.health()
    try:
        await _look(examination, backends, run, full, weights)
    except MemtierError as error:
        # the other sessions are to be looked at all the same
        examination.find("session", f"could not be looked at to the end: {error}", mended=False)
    finally:
        with anyio.CancelScope(shield=True):
            await run(lock.release)
    return examination.health()


async def _look(
    examination: _Examination, backends: Backends, run: Run, full: bool, weights: WeightsTier | None
) -> None:
    session = await run(examination.opened, backends)
    if session is None:
        return
    try:
        await run(examination.files, session, full)
        if weights is not None:
            await run(examination.weights, session, weights)
        await examination.index(session, run, full)
    finally:
        with anyio.CancelScope(shield=True):
            await run(session.close)


class _Examination:
    def __init__(self, paths: SessionPaths, rebuild: bool) -> None:
        self.paths = paths
        self.rebuild = rebuild
        self.findings: list[Finding] = []
        self.id: str | None = None
        self.position = 0

    def find(self, what: str, problem: str, *, mended: bool | None = None, harm: bool = True) -> None:
        """Note something; `mended` is what was asked for, unless told."""
        self.findings.append(
            Finding(what=what, problem=problem, mended=self.rebuild if mended is None else mended, harmless=not harm)
        )

    def health(self) -> SessionHealth:
        healthy = all(finding.mended or finding.harmless for finding in self.findings)
        return SessionHealth(
            id=self.id, folder=str(self.paths.folder), position=self.position, healthy=healthy,
            findings=tuple(self.findings),
        )  # fmt: skip

    # -- the journal

    def has_journal(self) -> bool:
        """Whether there is anything to look at."""
        with storage_errors(f"look into {self.paths.folder}"):
            if self.paths.journal.exists():
                return True
            left = [path.name for path in self.paths.folder.iterdir() if path.name != "lock"]
            harm = bool(traces(self.paths.folder))
        told = f"there is none; the folder holds {', '.join(sorted(left)) or 'nothing'}"
        self.find("journal", told, mended=False, harm=harm)
        return False

    def opened(self, backends: Backends) -> SessionFolder | None:
        """The session with a journal that holds what it says; None if it has none that can be used."""
        for path in sorted(self.paths.folder.glob(f"{RESCUED_PREFIX}*")):
            self.find(path.name, "was left by a mending that was cut off; the journal is as it was before")
            if self.rebuild:
                with storage_errors(f"remove {path}"):
                    path.unlink()
        try:
            session = self._open(backends)
        except CorruptMemoryError as error:
            return self._salvaged(backends, error)
        except IncompatibleMemoryError as error:
            self.find("journal", str(error), mended=False)
            return None
        try:
            session.journal.verify()
        except CorruptMemoryError as error:
            session.close()
            return self._salvaged(backends, error)
        except BaseException:
            session.close()
            raise
        return session

    def _open(self, backends: Backends) -> SessionFolder:
        # without a lock: the examination has it
        return SessionFolder(self.paths, None, backends.journal(self.paths.journal), backends)

    def _salvaged(self, backends: Backends, error: CorruptMemoryError) -> SessionFolder | None:
        """With a journal of the entries before the first that is damaged, if one is wanted and can be made."""
        if not self.rebuild:
            self.find("journal", f"{error} `memtier doctor --rebuild` keeps what stands before the damage.")
            return None
        try:
            kept, lost = mend_journal(self.paths)
            session = self._open(backends)
        except CorruptMemoryError as second:
            self.find("journal", f"{error} Nothing of it can be kept: {second}", mended=False)
            return None
        try:
            # its rows may be of what was lost
            session.drop_index()
        except BaseException:
            session.close()
            raise
        gone = "at most " + f"{lost:,}" if lost is not None else "an unknown number of"
        self.find("journal", f"{error} Kept {kept:,} tokens; {gone} that were acknowledged after them are lost.")
        return session

    # -- files

    def files(self, session: SessionFolder, full: bool) -> None:
        """Everything but the index."""
        journal = session.journal
        meta = journal.get_meta(META)
        self.id, self.position = None if meta is None else meta["id"], journal.position
        if journal.get_meta(INTENT) is not None:
            self.find(
                "journal", "a forget was cut off; it goes on when the session is opened", mended=False, harm=False
            )
        self._derived(session, full, "")
        known = {"lock", "segments", "snapshots", "checkpoints", "quarantine", "index.lance"}
        told = (self.paths.journal.name, ".partial-", RESCUED_PREFIX)
        for path in sorted(self.paths.folder.iterdir()):
            if path.name not in known and not path.name.startswith(told):
                self.find(path.name, "is no part of a session")
                self._quarantine(path)
        for path in sorted(self.paths.checkpoints.glob(".removed-*")):
            self.find(f"checkpoints/{path.name}", "was left by the removal of a checkpoint that was cut off")
        if self.rebuild:
            sweep_removed(self.paths.checkpoints)
        for kept in self.paths.checkpoint_folders():
            self._checkpoint(session, kept, full)

    def _checkpoint(self, session: SessionFolder, kept: SessionPaths, full: bool) -> None:
        what = f"checkpoint {kept.folder.name}"
        try:
            if not kept.journal.exists():
                raise CorruptMemoryError(f"its journal {kept.journal.name} is missing.")
            journal = session.backends.journal(kept.journal)
            try:
                journal.verify()
                what = f"checkpoint {(journal.get_meta(CHECKPOINT) or {}).get('name', kept.folder.name)!r}"
                self._derived(SessionFolder(kept, None, journal, session.backends), full, f"{what}, ")
            finally:
                journal.close()
        except CorruptMemoryError as error:
            self.find(what, str(error))
            self._quarantine(kept.folder)
        except MemtierError as error:
            # a newer format, or a disk that does not give it: what it holds is nothing to put aside
            self.find(what, str(error), mended=False)

    def _derived(self, session: SessionFolder, full: bool, where: str) -> None:
        journal = session.journal
        for manifest in journal.segments():
            problem = _problem(session.segments, manifest.name, manifest.size)
            if problem is None and full:
                try:
                    verify_segment(session.segments, manifest)
                except CorruptMemoryError as error:
                    problem = str(error)
            if problem is not None:
                self.find(f"{where}segment {manifest.name}", f"{problem}; it is made again from the journal")
                self._quarantine(session.paths.segments / manifest.name)
                if self.rebuild:
                    # the segments after it would leave a gap; they are made again with it
                    journal.drop_after(manifest.start)
                    break
        for record in journal.snapshots():
            problem = _problem(session.snapshots, record.name, record.size)
            if problem is None and full and content_hash(session.snapshots.get(record.name)) != record.hash:
                problem = "does not have the hash that was written"
            if problem is not None:
                self.find(f"{where}snapshot {record.name}", f"{problem}; an older one or none will do")
                self._quarantine(session.paths.snapshots / record.name)
                if self.rebuild:
                    journal.drop_snapshot(record.name)
        named = {m.name for m in journal.segments()} | {s.name for s in journal.snapshots()}
        for store, folder in ((session.segments, session.paths.segments), (session.snapshots, session.paths.snapshots)):
            for name in store.list():
                if name not in named and not is_ours(name):
                    self.find(f"{where}{folder.name}/{name}", "is no part of a session")
                    self._quarantine(folder / name)

    def weights(self, session: SessionFolder, weights: WeightsTier) -> None:
        """Whether all values of the model are those that wrote the session."""
        meta, kept = session.journal.get_meta(META), session.journal.get_meta(WEIGHTS)
        if meta is None:
            return
        wrote = meta["model"]
        if any(wrote[field] != weights.fingerprint[field] for field in ("config", "tensors")):
            told = f"not compared: {wrote['name']!r} wrote this; give that model"
            self.find("weights", told, mended=False, harm=False)
        elif not kept or kept["dtype"] != weights.fingerprint["dtype"]:
            known = f"they were hashed in {kept['dtype']}" if kept else "no hashes were kept"
            self.find("weights", f"not compared: {known}", mended=False, harm=False)
        else:
            hashes = weights.tensor_hashes()
            other = sorted(name for name in hashes if kept["hashes"].get(name) != hashes[name])
            if other:
                told = f"{len(other)} of {len(hashes)} tensors of {weights.name!r} have other values than those that"
                self.find("weights", f"{told} wrote the session, first {other[0]!r}", mended=False)

    # -- the index

    async def index(self, session: SessionFolder, run: Run, full: bool) -> None:
        """Whether it opens and has the rows that the journal says; with `full`, whether all is what was written."""
        journal = session.journal
        segments, indexed, seal = await run(lambda: (journal.segments(), journal.indexed_through, journal.index_seal))
        if not segments or not self.paths.index.is_dir():
            if indexed:
                self.find("index", "is missing; it is made again when the session is used", harm=False)
                await self._drop_index(session, run)
            return
        try:
            # not opened then: there are bits whose flip makes LanceDB end the process
            if indexed and await run(FolderSeal(self.paths.index).read) != seal:
                raise CorruptMemoryError("its files are not as they were written, or were being written in a crash")
            # the index has one vector a layer: the mean of a landmark's keys, (G * D,)
            sizes = [layer.shape[2] * layer.shape[3] for layer in segments[0].layers]
            index = await session.backends.index(self.paths.index, sizes)
            try:
                first = segments[0].first_block
                count = await index.count(first)
                if count < indexed - first:
                    raise CorruptMemoryError(f"it has {count} rows, and the journal says {indexed - first}")
                if full:
                    await index.rows(0, 2**62)
            finally:
                await index.close()
        except MemtierError as error:
            self.find("index", f"{error}; it is made again from the segments")
            if self.rebuild:
                await run(self._quarantine, self.paths.index)
                await self._drop_index(session, run)

    async def _drop_index(self, session: SessionFolder, run: Run) -> None:
        if self.rebuild:
            await run(session.drop_index)

    def _quarantine(self, path: Path) -> None:
        if self.rebuild:
            put_aside(self.paths, path)


def _problem(store: SegmentStore, name: str, size: int) -> str | None:
    try:
        found = store.size(name)
    except CorruptMemoryError:
        return "is missing"
    return None if found == size else f"has {found} bytes, and {size} were written"
