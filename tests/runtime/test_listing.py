"""A session that cannot be read hides no other."""

from __future__ import annotations

import pytest

import memtier
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths, session_folder

pytestmark = pytest.mark.anyio


async def test_a_session_that_cannot_be_read_is_left_out_of_the_list_and_named(open_store, tmp_path, caplog) -> None:
    async with open_store() as runtime:
        for name in ("a", "b", "c", "d"):
            await (await runtime.session(name)).observe("Some text. ")
    paths = {name: SessionPaths(session_folder(tmp_path / "store", "default", name)) for name in "abcd"}
    paths["a"].journal.write_bytes(b"no journal at all" * 300)
    for name, change in (("b", {"model": {}}), ("c", {"id": ["c"]})):
        journal = SqliteJournal.open(paths[name].journal)
        journal.set_meta("session", journal.get_meta("session") | change)
        journal.close()
    async with open_store() as runtime:
        assert [info.id for info in await runtime.sessions()] == ["d"]
    assert [info.id for info in memtier.list_sessions(tmp_path / "store")] == ["d"]
    for name in "abc":
        assert f"{paths[name].folder} is left out" in caplog.text
