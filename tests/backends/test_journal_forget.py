"""What is forgotten leaves no byte in the journal's file; copies are whole, and going back is all or nothing."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtier.errors import ConfigError, CorruptMemoryError, StorageError
from memtier_backends import sqlite_file
from memtier_backends.journal_forget import as_it_stands, as_said
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.records import SnapshotRecord
from memtier_backends.segments import pack_segment
from memtier_backends.testing import begin_turn, make_payloads

SECRET = "Bodiv's code is 4821, and nobody may know."
IDS = [900_000 + n for n in range(40)]


def told(folder: Path) -> SqliteJournal:
    """40 tokens of a secret between two others; the secret was sent twice, and once taken back."""
    journal = SqliteJournal.open(folder / "journal.sqlite3")
    journal.commit(begin_turn(journal), list(range(20)), text="before")
    turn = begin_turn(journal, source=SECRET)
    journal.commit(turn, IDS, text=SECRET, mark=True)
    journal.rollback(20, "refused")
    turn = begin_turn(journal, source=SECRET)
    journal.commit(turn, IDS[:25])
    journal.commit(turn, IDS[25:], text=SECRET, mark=True)
    journal.commit(begin_turn(journal), list(range(20, 40)), text="after", mark=True)
    return journal


def raw(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))


def holds_secret(folder: Path) -> bool:
    ids = np.array(IDS, "<i4").tobytes()
    return any(piece in raw(folder) for piece in (SECRET.encode()[:12], SECRET.encode()[20:], ids[:40], ids[120:]))


def test_what_is_forgotten_leaves_no_byte_and_the_rest_moves_down(tmp_path: Path) -> None:
    journal = told(tmp_path)
    journal.checkpoint()
    assert holds_secret(tmp_path)
    journal.forget(20, 60, derived_to=0, meta={"edition": 2})
    journal.checkpoint()
    assert not holds_secret(tmp_path)
    assert journal.tokens(0, 40).tolist() == list(range(40))
    assert journal.marks(0, 40) == [39]
    assert [(t.start, t.end, t.text) for t in journal.turns()] == [(0, 20, "before"), (20, 40, "after")]
    assert journal.get_meta("edition") == 2
    journal.verify()
    journal.close()


def test_the_same_scan_fails_where_secure_delete_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = sqlite_file.connect

    def lax(*args, **kwargs) -> sqlite3.Connection:
        connection = connect(*args, **kwargs)
        connection.execute("PRAGMA secure_delete=OFF")
        return connection

    monkeypatch.setattr("memtier_backends.journal_sqlite.connect", lax)
    journal = told(tmp_path)
    journal.forget(20, 60, derived_to=0, meta={})
    journal.checkpoint()
    assert holds_secret(tmp_path)
    journal.close()


def test_half_a_turn_may_be_forgotten(tmp_path: Path) -> None:
    journal = told(tmp_path)
    journal.forget(10, 30, scrub=[2], derived_to=0, meta={})
    assert journal.tokens(0, 60).tolist() == [*range(10), *IDS[10:], *range(20, 40)]
    assert [(t.start, t.end, t.text, t.source) for t in journal.turns()] == [
        (0, 10, None, None),
        (10, 40, None, None),
        (40, 60, "after", None),
    ]
    assert journal.marks(0, 60) == [39, 59]
    journal.verify()
    journal.close()


def test_of_a_turn_that_only_keeps_the_token_that_begins_it_the_text_is_known(tmp_path: Path) -> None:
    journal = told(tmp_path)
    journal.forget(1, 20, scrub=[journal.turns()[0].turn], derived_to=0, meta={})
    assert next((t.start, t.end, t.text) for t in journal.turns()) == (0, 1, "")
    journal.verify()
    journal.close()


def test_forgetting_everything_leaves_a_session_that_goes_on(tmp_path: Path) -> None:
    journal = told(tmp_path)
    journal.forget(0, 80, derived_to=0, meta={})
    assert journal.position == 0 and journal.turns() == []
    journal.verify()
    assert journal.commit(begin_turn(journal), [1, 2]) == 2
    journal.close()


def test_what_is_derived_goes_from_where_it_is_told(tmp_path: Path) -> None:
    journal = told(tmp_path)
    for first, blocks in ((0, 3), (3, 2), (5, 10)):
        journal.add_segment(pack_segment(make_payloads(first, blocks))[1])
    journal.set_indexed_through(15, seal="abc")
    journal.add_snapshot(SnapshotRecord(20, "before", 1, "x", 5))
    journal.add_snapshot(SnapshotRecord(40, "within", 1, "x", 7))
    journal.forget(30, 35, derived_to=20, meta={})
    assert [m.end for m in journal.segments()] == [12, 20]
    assert [s.name for s in journal.snapshots()] == ["before"]
    assert journal.indexed_through == 0
    journal.close()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 8)), max_size=6), st.integers(0, 39), st.integers(1, 20))
def test_offsets_into_a_turn_are_known_whatever_was_forgotten_of_it(cuts, first, length) -> None:
    said = list(range(40))
    left, forgotten = said, []
    for at, size in cuts:
        gone = left[at : at + size]
        left = left[:at] + left[at + size :]
        forgotten = runs(sorted([*(n for a, b in forgotten for n in range(a, b)), *gone]))
    some = left[first : first + length]
    assert as_said(forgotten, first, first + len(some)) == runs(some)
    within = [i for i, n in enumerate(left) if first <= n < first + length]
    standing = as_it_stands(forgotten, first, min(first + length, 40))
    assert [n for a, b in standing for n in range(a, b)] == within


def runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges."""
    found: list[tuple[int, int]] = []
    for n in numbers:
        if found and found[-1][1] == n:
            found[-1] = found[-1][0], n + 1
        else:
            found.append((n, n + 1))
    return found


@pytest.mark.parametrize("wrong", [(5, 5, 0), (-1, 3, 0), (79, 81, 0), (5, 6, 6)], ids=str)
def test_what_is_no_range_is_refused(tmp_path: Path, wrong: tuple[int, int, int]) -> None:
    journal = told(tmp_path)
    with pytest.raises(ConfigError, match="forgotten"):
        journal.forget(wrong[0], wrong[1], derived_to=wrong[2], meta={})
    assert journal.position == 80
    journal.close()


def test_a_copy_is_whole_and_no_other_file_is_overwritten(tmp_path: Path) -> None:
    journal = told(tmp_path)
    (tmp_path / "copies").mkdir()
    copy = tmp_path / "copies" / "journal.sqlite3"
    journal.copy_to(copy)
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    journal.rollback(5, "test")
    again = SqliteJournal.open(copy)
    again.verify()
    assert again.position == 80
    again.close()
    with pytest.raises(StorageError, match="there is such a file"):
        journal.copy_to(copy)
    journal.close()


def test_a_damaged_copy_changes_nothing(tmp_path: Path) -> None:
    journal = told(tmp_path)
    (tmp_path / "copies").mkdir()
    copy = tmp_path / "copies" / "journal.sqlite3"
    journal.copy_to(copy)
    at = copy.read_bytes().index(b"before")
    with copy.open("r+b") as file:
        file.seek(at)
        file.write(b"B")
    journal.commit(begin_turn(journal), [7])
    with pytest.raises(CorruptMemoryError):
        journal.replace_with(copy)
    assert journal.position == 81
    journal.verify()
    journal.close()
