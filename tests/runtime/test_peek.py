"""To look at a session beside its owner: what was there when the look began stays in sight."""

from __future__ import annotations

import os

import pytest

from memtier.peek import peek
from memtier_backends.layout import SessionPaths, session_folder

pytestmark = pytest.mark.anyio


async def test_files_that_the_owner_merges_away_meanwhile_can_be_looked_at(open_store, ids, tmp_path) -> None:
    async with open_store(hot_bytes=0) as runtime:
        session = await runtime.session("a")
        await session.observe(ids)
        await session.flush()
        kept = await session.block(3)
        paths = SessionPaths(session_folder(tmp_path / "store", "default", "a"))
        with peek(tmp_path / "store", "default", "a") as copy:
            for path in (*paths.segments.iterdir(), *paths.snapshots.iterdir()):
                path.unlink()
            async with open_store(copy, hot_bytes=0) as looking:
                looked = await (await looking.session("a")).block(3)
        assert looked.text == kept.text
        assert (looked.keys[0] == kept.keys[0]).all()


async def test_a_file_that_goes_while_it_is_named_is_sought_by_a_newer_journal(
    open_store, ids, tmp_path, monkeypatch
) -> None:
    link, gone = os.link, []

    def goes_once(there, here) -> None:
        if not gone:
            gone.append(there)
            raise FileNotFoundError(2, "it was merged", str(there))
        link(there, here)

    async with open_store() as runtime:
        session = await runtime.session("a")
        await session.observe(ids)
        await session.flush()
        monkeypatch.setattr(os, "link", goes_once)
        with peek(tmp_path / "store", "default", "a") as copy:
            names = {path.name for path in SessionPaths(session_folder(copy, "default", "a")).segments.iterdir()}
        assert gone and names == {manifest.name for manifest in session.folder.journal.segments()}
