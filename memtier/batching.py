"""Decoding of several sessions at once: tokens that are waiting to be read at the same time share one forward pass.

Every request hands the model thread a job of its own, so turns stay first come, first served. The job that comes up
first serves all requests that have arrived, up to a limit; the others' find their answer ready. Before it begins it
waits a little for the sessions of the last round, whose next tokens are on their way: without that, the first to come
back would always run alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary, WeakSet

import torch

from memtier.blocks import MemorySettings
from memtier.decode_cache import DecodeCache
from memtier.reader import Manner, Reader, StepResult
from memtier.threads import WorkerThread
from memtier.tiers.weights import WeightsTier

__all__ = ["Choose", "DecodeBatcher"]

log = logging.getLogger("memtier")

Choose = Callable[[torch.Tensor], int]

PATIENCE, MOST_PATIENCE_SECONDS = 0.5, 0.02
"""How long a round waits for those of the last: a share of what that one took, and no longer than."""

REST_ROUNDS = 8


class DecodeBatcher:
    """Reads sampled tokens of many sessions, and samples their next.

    Args:
        model: the model's thread.
        max_sessions: the most in one forward pass; 1 reads each alone.
    """

    def __init__(self, model: WorkerThread, max_sessions: int) -> None:
        self._model = model
        self._max_sessions = max_sessions
        self._waiting: list[_Request] = []
        self._arrived = threading.Condition()
        self._last_round: WeakSet[Reader] = WeakSet()
        self._last_seconds = 0.0
        self._rounds = 0
        self._read_in: WeakKeyDictionary[Reader, int] = WeakKeyDictionary()
        self.sizes: Counter[int] = Counter()

    async def sample(
        self, reader: Reader, unread: int | None, manner: Manner, choose: Choose
    ) -> tuple[int, StepResult]:
        """Read a token and choose the next from the logits after it. Not interrupted by cancellation.

        Args:
            reader: of the session, or of a copy.
            unread: the token sampled last; None to choose from the logits that are there.
            manner: how to retrieve.
            choose: a token id from logits; runs on the model thread.

        Raises:
            ModelError: the model refused; the reader's cache is dropped.
            StorageError: memory could not be read; likewise.
        """
        request = _Request(reader, unread, manner, choose)
        with self._arrived:
            self._waiting.append(request)
            self._arrived.notify()
        return await self._model.run(self._serve, request)

    # -- the model thread

    def _serve(self, request: _Request) -> tuple[int, StepResult]:
        if not request.served:
            requests = self._gather(request)
            began = time.perf_counter()
            self._read(requests)
            self._last_seconds = time.perf_counter() - began
            self._last_round = WeakSet(r.reader for r in requests)
            self._settle_those_that_rest()
        return request.result()

    def _settle_those_that_rest(self) -> None:
        """A row keeps the states of its whole batch alive: it is copied out once its session has not come for long."""
        self._rounds += 1
        self._read_in.update(dict.fromkeys(self._last_round, self._rounds))
        for reader in [r for r, number in self._read_in.items() if self._rounds - number >= REST_ROUNDS]:
            reader.settle()
            del self._read_in[reader]

    def _gather(self, first: _Request) -> list[_Request]:
        """The request whose turn it is and others that wait, the oldest first."""
        with self._arrived:
            if self._max_sessions > 1:
                patience = min(self._last_seconds * PATIENCE, MOST_PATIENCE_SECONDS)
                self._arrived.wait_for(self._all_are_back, timeout=patience)
            others = [request for request in self._waiting if request is not first]
            taken = [first, *others[: self._max_sessions - 1]]
            self._waiting = others[self._max_sessions - 1 :]
        return taken

    def _all_are_back(self) -> bool:
        here = {request.reader for request in self._waiting}
        return len(here) >= self._max_sessions or all(reader in here for reader in self._last_round)

    def _read(self, requests: Sequence[_Request]) -> None:
        # one forward pass is under one adapter
        together: dict[tuple[WeightsTier, MemorySettings], list[_Request]] = defaultdict(list)
        for request in requests:
            if request.unread is not None and (settings := request.reader.plain_settings(request.manner)) is not None:
                together[request.reader.weights, settings].append(request)
        for (weights, _), rows in together.items():
            # in the order of the last round, so that states which lie together stay where they are
            rows.sort(key=lambda request: request.reader.number)
            if len(rows) > 1:
                self._read_together(weights, rows)
        for request in requests:
            if not request.served:
                if request.unread is not None:
                    self.sizes[1] += 1
                request.serve(request.read_alone)

    def _read_together(self, weights: WeightsTier, rows: Sequence[_Request]) -> None:
        """One forward pass; if it fails nothing has changed, and each row is left to be read alone."""
        try:
            batch = DecodeCache([cache for request in rows if (cache := request.reader.cache) is not None])
            logits = weights.decode([request.unread or 0 for request in rows], batch)
        except Exception as error:  # noqa: BLE001  each row, read alone, tells its own
            log.warning("a batch of %d sessions failed (%s); each is read alone", len(rows), error)
            return
        batch.commit()
        self.sizes[len(rows)] += 1
        for request, row in zip(rows, logits, strict=True):
            request.reader.logits = row.clone()
            request.serve(lambda: StepResult(()))


class _Request:
    """One token to be read, and the next to be sampled."""

    def __init__(self, reader: Reader, unread: int | None, manner: Manner, choose: Choose) -> None:
        self.reader = reader
        self.unread = unread
        self.manner = manner
        self.served = False
        self._choose = choose
        self._outcome: tuple[int, StepResult] | None = None
        self._error: BaseException | None = None

    def read_alone(self) -> StepResult:
        return StepResult(()) if self.unread is None else self.reader.step([self.unread], self.manner)

    def serve(self, read: Callable[[], StepResult]) -> None:
        """Read, then choose; an error is kept for whoever asked."""
        self.served = True
        try:
            result = read()
            assert self.reader.logits is not None, "there is something to continue"
            try:
                self._outcome = self._choose(self.reader.logits), result
            except BaseException:
                self.reader.drop()  # the token was read, and will be taken back
                raise
        except BaseException as error:  # noqa: BLE001  raised by `result`, in the job of the session that asked
            self._error = error

    def result(self) -> tuple[int, StepResult]:
        if self._error is not None:
            raise self._error
        assert self._outcome is not None, "it was served"
        return self._outcome
