"""A store, opened with a model: the threads, the updater tasks, and the sessions (open_sessions.py).

Two threads serve all sessions: the model's owns every tensor, the journals' owns SQLite. Each session packs and
writes its files on a thread of its own, so a slow disk holds up no other session.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import anyio
import torch

from memtier.arguments import check_progress, file_path
from memtier.batching import DecodeBatcher
from memtier.config import MemoryConfig, resolve_settings
from memtier.errors import ConfigError, MemtierError, SessionError, StorageError
from memtier.folder import Backends
from memtier.listing import describe_all
from memtier.open_sessions import OpenSessions
from memtier.parts import Shared
from memtier.reader import STEP_TOKENS
from memtier.recovery.doctor import examine
from memtier.recovery.portable import exported_id
from memtier.recovery.reports import SessionHealth
from memtier.replay import Progress
from memtier.reports import RuntimeStats, SessionInfo
from memtier.session import Session
from memtier.text import check_text
from memtier.threads import WorkerThread, own_task, to_the_end
from memtier.tiers.device_pool import DevicePool
from memtier.tiers.weights import WeightsTier
from memtier_backends.layout import check_store, session_folder, session_folders, sweep_removed
from memtier_backends.space import Space

__all__ = ["Runtime", "open"]

log = logging.getLogger("memtier")


def open(
    store: str | Path, *, model: Any = "nano", tokenizer: Any = None, config: MemoryConfig | None = None,
    tenant: str = "default", device: str = "auto", dtype: str = "auto",
) -> Runtime:  # fmt: skip
    """Open a store with a model: ``async with memtier.open("./memory") as runtime``.

    Args:
        store: a folder on a local disk; made if missing.
        model: "nano", a Hugging Face id or folder, or a loaded model, which is given back as it came.
        tokenizer: a tokenizer, its id or folder; None for the model's own.
        config: sizes and limits.
        tenant: sessions of different tenants never meet.
        device: "auto" (a GPU if there is one), "cpu", "cuda" ...
        dtype: "auto" (the weights'), "float32", "float64", "bfloat16" or "float16".

    Raises:
        ConfigError: on entering: a store that is no local folder, a model that cannot be used, sizes that contradict.
    """
    path = os.fspath(store) if isinstance(store, (str, os.PathLike)) else store
    if not isinstance(path, str):
        raise ConfigError(f"store is {store!r}; it must be the path of a folder, for example './memory'.")
    config = MemoryConfig() if config is None else config
    return Runtime(path, model, tokenizer, config, tenant, device, dtype)


class Runtime:
    """Made by `open`; an async context manager. Close it in the task that opened it."""

    def __init__(
        self, store: str | Path, model: Any, tokenizer: Any, config: MemoryConfig, tenant: str, device: str, dtype: str,
        *, backends: Backends | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(config, MemoryConfig):
            raise ConfigError(f"config is {type(config).__name__}; it must be a memtier.MemoryConfig.")
        self._store = check_store(store)
        session_folder(self._store, tenant, "any")  # refuses a tenant that cannot be one
        check_text(tenant, "the tenant")
        self._load = partial(WeightsTier.load, model, tokenizer, device, dtype)
        self._config = config
        self._tenant = tenant
        self._backends = backends or Backends()
        self._task: int | None = None
        self._pid = os.getpid()
        self._closed = False

    async def __aenter__(self) -> Runtime:
        if self._task is not None:
            raise SessionError("this runtime was opened before. Call memtier.open again for a new one.")
        self._task = anyio.get_current_task().id
        self._model_thread = WorkerThread("memtier-model", torch.inference_mode)
        self._journal_thread = WorkerThread("memtier-journal")
        self._tasks = anyio.create_task_group()
        try:
            self._weights: WeightsTier = await self._model_thread.run(self._load)
            model = self._weights.config
            self._settings = resolve_settings(
                self._config, model.memory_settings(), model.layer_types or [],
                kv_channels=model.num_key_value_heads * model.head_dim,
            )  # fmt: skip
            self._weights.check_settings(self._settings)
            self._pool = await self._model_thread.run(self._make_pool)
            self._batcher = DecodeBatcher(self._model_thread, self._config.max_batch_sessions)
            self._log_estimate()
            self._space = await self._journal_thread.run(self._set_space_aside)
            await self._journal_thread.run(self._sweep)
            self._shared = Shared(
                self._store, self._tenant, self._config, self._settings, self._weights, self._pool, self._batcher,
                self._backends, self._space, self._model_thread, self._journal_thread, self._tasks,
            )  # fmt: skip
            self._sessions = OpenSessions(self._shared)
            await self._tasks.__aenter__()
        except BaseException:
            self._stop_threads()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        here = anyio.get_current_task().id
        if here != self._task:
            raise SessionError(
                f"this runtime was opened in task {self._task} and is being closed in task {here}. Close it where it "
                f"was opened: keep the whole 'async with memtier.open(...)' in one task."
            )
        self._closed = True
        # what waits is in the journal already: a program that is cancelled or interrupted need not wait for it
        write = not (kind is not None and issubclass(kind, (anyio.get_cancelled_exc_class(), KeyboardInterrupt)))
        failures: list[MemtierError] = []
        try:
            failures = await self._put_away(write)
        finally:
            try:
                await self._tasks.__aexit__(None, None, None)
            finally:
                self._stop_threads()
        if failures and error is None:
            raise failures[0]

    @own_task
    async def session(
        self, session_id: str, *, adapter: str | Path | None = None, reread: bool = False,
        on_progress: Progress | None = None,
    ) -> Session:  # fmt: skip
        """The session of that id: a new one, or the one that was, as far as its journal goes.

        Asked twice, the same object.

        Args:
            session_id: any text of at least one character.
            adapter: folder of an adapter of the model (`memtier train hylora`, or peft's LoRA), which this session
                reads with; None for the model alone. It is loaded once for all its sessions, and let go with the last.
            reread: if another model or other sizes wrote it, give it to this model: its text is read again, which
                takes as long as reading it did. Checkpoints stay with the model that wrote them.
            on_progress: called, where tokens must be read again (after a crash, a forget that was cut off, with
                `reread`), after each step with how many were and the total.

        Raises:
            ConfigError: an id that cannot be one; no adapter, or one of another model.
            SessionBusyError: another runtime holds it.
            SessionError: too many are open.
            IncompatibleMemoryError: another model, another adapter, other sizes or a newer format wrote it; names the
                field. With `reread`: a turn whose text is not known, and another tokenizer.
            CorruptMemoryError: its files are damaged.
        """
        self._check_open()
        check_progress(on_progress)
        return await self._sessions.open(session_id, adapter, reread, on_progress)

    @own_task
    async def sessions(self) -> list[SessionInfo]:
        """Every session of this tenant in the store, open or not."""
        self._check_open()
        open_ids = frozenset(session.id for session in self._sessions.all())
        return await self._journal_thread.run(describe_all, self._store, self._tenant, open_ids)

    @own_task
    async def import_session(
        self, path: str | Path, session_id: str | None = None, *, adapter: str | Path | None = None,
        on_progress: Progress | None = None,
    ) -> Session:  # fmt: skip
        """A session of a file that `Session.export` wrote, opened.

        Args:
            path: the file; nothing in it is trusted.
            session_id: None for the id that it had.
            adapter: folder of the adapter that wrote it; see `session`.
            on_progress: as in `session`.

        Raises:
            SessionError: there is such a session, no such file, or too many are open.
            IncompatibleMemoryError: another model, other sizes or another format wrote it; names the field.
            CorruptMemoryError: the file is not as it was written; nothing was kept of it.
        """
        self._check_open()
        check_progress(on_progress)
        path = file_path(path)
        if session_id is None:
            session_id = await self._journal_thread.run(exported_id, path)
        return await self._sessions.take_in(path, session_id, adapter, on_progress)

    @own_task
    async def delete_session(self, session_id: str) -> list[str]:
        """Close a session if it is open, and remove all that is on disk of it, checkpoints included.

        Returns:
            Ids of forks: sessions of their own, which still hold what they shared with it.

        Raises:
            SessionNotFoundError: there is none.
            SessionBusyError: another runtime holds it.
        """
        self._check_open()
        return await self._sessions.delete(session_id)

    @own_task
    async def delete_tenant(self) -> list[str]:
        """Close all sessions of this tenant, and remove all that is on disk of them.

        Returns:
            Ids of the sessions that were.

        Raises:
            SessionBusyError: another runtime holds one; nothing was removed.
        """
        self._check_open()
        return await self._sessions.delete_all()

    @own_task
    async def doctor(self, *, rebuild: bool = False, full: bool = False) -> list[SessionHealth]:
        """Look over the files of this tenant's sessions, but for those that are open, which are only named.

        Args:
            rebuild: mend what is found. Derived files are made again; what cannot be accounted for is moved to the
                session's `quarantine` folder; of a damaged journal, what stands before the damage is kept.
            full: read and check every byte, and compare all values of the model with those that wrote each session.
        """
        self._check_open()
        run, backends = self._journal_thread.run, self._backends
        folders = session_folders(self._store, self._tenant)
        weights = self._weights if full else None
        return [await examine(folder, backends, run, rebuild=rebuild, full=full, weights=weights) for folder in folders]

    def stats(self) -> RuntimeStats:
        """Counters of the runtime and its open sessions, at once."""
        self._check_open()
        pool, sessions = self._pool, self._sessions.all()
        return RuntimeStats(
            model=self._weights.name,
            device=str(self._weights.device),
            waiting_steps=self._model_thread.waiting,
            open_sessions=len(sessions),
            max_open_sessions=self._config.max_open_sessions,
            free_bytes=self._space.free_bytes,
            min_free_bytes=self._config.min_free_bytes,
            pool_bytes=0 if pool is None else pool.nbytes,
            pool_blocks=0 if pool is None else pool.blocks,
            pool_hits=0 if pool is None else pool.hits,
            pool_misses=0 if pool is None else pool.misses,
            pool_refusals=0 if pool is None else pool.refusals,
            pool_hit_rate=None if pool is None else pool.hit_rate,
            decode_batches=dict(sorted(self._batcher.sizes.items())),
            sessions=tuple(session.stats() for session in sessions),
        )

    # -- private

    @to_the_end
    async def _put_away(self, write: bool) -> list[MemtierError]:
        """Close all sessions and let go of the model; what failed of the sessions."""
        failures = await self._sessions.close_all(write=write)
        if self._pool is not None:
            await self._model_thread.run(self._pool.close)
        await self._model_thread.run(self._weights.close)
        return failures

    def _set_space_aside(self) -> Space:
        config = self._config
        space = Space(self._store, min_free_bytes=config.min_free_bytes, reserve_bytes=config.reserve_bytes)
        space.fill()
        return space

    def _sweep(self) -> None:
        """Remove what removals that were cut off have left: it is forgotten already, and only its bytes are there."""
        for folder in (self._store, session_folder(self._store, self._tenant, "any").parent):
            try:
                sweep_removed(folder)
            except StorageError as error:
                log.warning("what a removal left could not be removed: %s", error)

    def _stop_threads(self) -> None:
        for thread in (self._model_thread, self._journal_thread):
            thread.close()

    def _make_pool(self) -> DevicePool | None:
        model = self._weights.config
        return DevicePool.make(
            self._config.device_pool_bytes, self._settings, model.num_key_value_heads, model.head_dim,
            self._weights.device, step_tokens=STEP_TOKENS,
        )  # fmt: skip

    def _log_estimate(self) -> None:
        model, layers = self._weights.config, len(self._settings.memory_layers)
        item = torch.finfo(getattr(torch, self._settings.storage_dtype)).bits // 8
        kv = 2 * layers * model.num_key_value_heads * model.head_dim * item
        log.info(
            "%s keeps %d bytes of K/V a token in storage, of layers %s: %d MB a million tokens",
            self._weights.name, kv, self._settings.memory_layers, kv,
        )  # fmt: skip

    def _check_open(self) -> None:
        if self._task is None or self._closed:
            raise SessionError("this runtime is not open. Use it inside 'async with memtier.open(...) as runtime'.")
        if os.getpid() != self._pid:
            raise SessionError(
                f"this runtime was opened by process {self._pid}, and this is process {os.getpid()}: threads do not "
                f"survive a fork. Open the store in the child, or start it with 'spawn'."
            )
