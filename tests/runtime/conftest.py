"""Stores opened with a tiny float64 model, whose index is in memory and whose storage can be made to fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import memtier
from memtier.folder import Backends
from memtier.runtime import Runtime
from memtier.testing import tiny_model
from memtier_backends.base import SegmentStore
from memtier_backends.faults import Faults, FaultyIndex, FaultyJournal, FaultySegmentStore
from memtier_backends.index_memory import MemoryIndexAdapter
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.segment_store import FileSegmentStore


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(Path(memtier.__file__).parent / "models" / "nano")


@pytest.fixture(scope="session")
def model() -> Any:
    return tiny_model(dtype=torch.float64)


@pytest.fixture(scope="session")
def ids() -> list[int]:
    """300 token ids with repetition in them, so that retrieval has something to find."""
    generator = torch.Generator().manual_seed(7)
    first = torch.randint(0, 256, (100,), generator=generator)
    return torch.cat([first, torch.randint(0, 256, (120,), generator=generator), first[:80]]).tolist()


OpenStore = Callable[..., Runtime]


@pytest.fixture
def open_store(tmp_path: Path, model: Any, tokenizer: Any) -> OpenStore:
    """`open_store(name, faults=..., **config)`: a runtime on a store of that name."""

    def make(
        name: str = "store",
        *,
        faults: Faults | None = None,
        model: Any = model,
        tokenizer: Any = tokenizer,
        segments: Callable[[Path], SegmentStore] = FileSegmentStore,
        **config: Any,
    ) -> Runtime:
        faults = faults or Faults()

        async def index(folder: Path, layers: list[int]) -> FaultyIndex:
            return FaultyIndex(MemoryIndexAdapter(layers), faults)

        backends = Backends(
            journal=lambda path: FaultyJournal(SqliteJournal.open(path), faults),
            segments=lambda path: FaultySegmentStore(segments(path), faults),
            snapshots=lambda path: FaultySegmentStore(FileSegmentStore(path), faults, "snapshots"),
            index=index,
        )
        store = tmp_path / name
        return Runtime(
            store, model, tokenizer, memtier.MemoryConfig(**config), "default", "auto", "auto", backends=backends
        )

    return make
