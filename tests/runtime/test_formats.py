"""Every artifact says which format and which model it is of; any mismatch is refused by the name of the field."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from memtier.errors import IncompatibleMemoryError
from memtier.folder import META
from memtier.testing import tiny_model
from memtier.tiers import state
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths, session_folder
from memtier_backends.tensors import content_hash

pytestmark = pytest.mark.anyio


def journal_of(tmp_path: Path) -> SqliteJournal:
    return SqliteJournal.open(SessionPaths(session_folder(tmp_path / "store", "default", "a")).journal)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda meta: meta | {"format": 99}, "format 99"),
        (lambda meta: {key: value for key, value in meta.items() if key != "format"}, "format None"),
        (lambda meta: meta | {"memory": meta["memory"] | {"new_size": 3}}, "new_size=3"),
        (lambda meta: meta | {"memory": meta["memory"] | {"storage_dtype": "float32"}}, "storage_dtype"),
        (lambda meta: meta | {"memory": meta["memory"] | {"memory_layers": [1]}}, "memory_layers"),
        (lambda meta: meta | {"model": meta["model"] | {"tensors": "x"}}, "tensors"),
        (lambda meta: meta | {"id": "b"}, "its id is 'b'"),
    ],
    ids=["newer", "none", "unknown size", "dtype", "layers", "tensors", "id"],
)
async def test_a_session_of_another_kind_is_refused(open_store, ids, tmp_path, change, field) -> None:
    async with open_store() as runtime:
        await (await runtime.session("a")).observe(ids[:50])
    journal = journal_of(tmp_path)
    journal.set_meta(META, change(journal.get_meta(META)))
    journal.close()
    async with open_store() as runtime:
        with pytest.raises(IncompatibleMemoryError, match=field):
            await runtime.session("a")


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        ({"head_dim": 4}, "shape of K and V"),
        ({"memory_layers": [1]}, "layers"),
        ({"landmark_keys": 2}, "landmark size"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_segments_of_another_shape_are_refused(open_store, ids, tmp_path, sizes, field) -> None:
    """As if the session's own word about its model had been changed: the segments have theirs."""
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids)
        await session.flush()
    other = tiny_model(dtype=torch.float64, **sizes)
    async with open_store("of the other", model=other) as runtime:
        await (await runtime.session("a")).observe(ids[:10])
    theirs = SqliteJournal.open(
        SessionPaths(session_folder(tmp_path / "of the other", "default", "a")).journal, read_only=True
    )
    mine = journal_of(tmp_path)
    mine.set_meta(META, theirs.get_meta(META))
    mine.close()
    theirs.close()
    async with open_store(model=other) as runtime:
        with pytest.raises(IncompatibleMemoryError, match=f"with {field}"):
            await runtime.session("a")


async def test_a_snapshot_of_another_format_is_refused_by_name(open_store, ids, monkeypatch) -> None:
    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids[:50])
        reader = session.timeline.reader
        monkeypatch.setattr(state, "FORMAT", "memtier-snapshot-0")
        data, _ = await session.model_thread.run(reader.snapshot)
        monkeypatch.undo()
        with pytest.raises(IncompatibleMemoryError, match="format 'memtier-snapshot-0'"):
            await session.model_thread.run(reader.restore, data, "x", content_hash(data), 50)
        # it is only a cache of the journal: the session goes on
        assert (await session.observe(ids[50:100])).position == 100
