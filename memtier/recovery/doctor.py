"""Looking a session's files over, and mending what can be mended. No model is needed: what is derived is only dropped
here, and made again when the session is opened.

Nothing is deleted that cannot be accounted for: damaged and unknown files go to the session's `quarantine` folder.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from memtier.errors import CorruptMemoryError, IncompatibleMemoryError, MemtierError, SessionBusyError
from memtier.folder import META, WEIGHTS, Backends, SessionFolder, is_ours
from memtier.recovery.copies import CHECKPOINT
from memtier.recovery.forget import INTENT, open_copy
from memtier.recovery.reports import Finding, SessionHealth
from memtier.tiers.weights import WeightsTier
from memtier_backends.base import SegmentStore
from memtier_backends.files import flush_folder, storage_errors
from memtier_backends.folder_seal import FolderSeal
from memtier_backends.journal_salvage import salvage
from memtier_backends.layout import SessionPaths
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
    try:
        session = await run(examination.opened, backends)
    except SessionBusyError as error:
        examination.find("session", f"is open, and was not looked at: {error}", mended=False, harm=False)
        return examination.health()
    if session is not None:
        try:
            await run(examination.files, session, full)
            if weights is not None:
                await run(examination.weights, session, weights)
            await examination.index(session, run, full)
        finally:
            await run(session.close)
    return examination.health()


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

    def opened(self, backends: Backends) -> SessionFolder | None:
        """The session with a journal that holds what it says; None if it has none that can be used."""
        if not self.paths.journal.exists():
            left = [path.name for path in self.paths.folder.iterdir() if path.name != "lock"]
            told = f"there is none; the folder holds {', '.join(left) or 'nothing'}"
            self.find("journal", told, mended=False, harm=bool({"segments", "snapshots"} & set(left)))
            return None
        try:
            session = open_copy(self.paths.folder, backends)
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
        return session

    def _salvaged(self, backends: Backends, error: CorruptMemoryError) -> SessionFolder | None:
        """With a journal of the entries before the first that is damaged, if one is wanted and can be made."""
        if not self.rebuild:
            self.find("journal", f"{error} `memtier doctor --rebuild` keeps what stands before the damage.")
            return None
        rescued = self.paths.folder / f".rescued-{uuid4().hex}.sqlite3"
        try:
            kept, lost = salvage(self.paths.journal, rescued)
            self._quarantine(*self.paths.folder.glob(f"{self.paths.journal.name}*"))
            with storage_errors(f"put the mended journal in {self.paths.folder}"):
                os.replace(rescued, self.paths.journal)
                flush_folder(self.paths.folder)
            session = open_copy(self.paths.folder, backends)
        except CorruptMemoryError as second:
            self.find("journal", f"{error} Nothing of it can be kept: {second}", mended=False)
            return None
        finally:
            rescued.unlink(missing_ok=True)
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
        for path in sorted(self.paths.folder.iterdir()):
            if path.name not in known and not path.name.startswith((self.paths.journal.name, ".partial-")):
                self.find(path.name, "is no part of a session")
                self._quarantine(path)
        for kept in self.paths.checkpoint_folders():
            self._checkpoint(session, kept, full)

    def _checkpoint(self, session: SessionFolder, kept: SessionPaths, full: bool) -> None:
        what = f"checkpoint {kept.folder.name}"
        try:
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
            if full and indexed and await run(FolderSeal(self.paths.index).read) != seal:
                raise CorruptMemoryError("its files are not as they were written")
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

    def _quarantine(self, *paths: Path) -> None:
        """Out of the way, under a name of its own; nothing is overwritten."""
        if not self.rebuild:
            return
        quarantine = self.paths.folder / "quarantine"
        with storage_errors(f"move files to {quarantine}"):
            quarantine.mkdir(exist_ok=True)
            for path in paths:
                if path.exists() or path.is_symlink():
                    os.replace(path, quarantine / f"{path.name}.{uuid4().hex[:8]}")
            flush_folder(quarantine)


def _problem(store: SegmentStore, name: str, size: int) -> str | None:
    try:
        found = store.size(name)
    except CorruptMemoryError:
        return "is missing"
    return None if found == size else f"has {found} bytes, and {size} were written"
