"""A write-ahead log that was damaged is told from one whose end was cut off; SQLite takes both for a shorter log."""

import random
import shutil
from pathlib import Path

import pytest

from memtier.errors import CorruptMemoryError
from memtier_backends.journal_salvage import salvage
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.testing import begin_turn

COMMITS, TOKENS = 20, 30


def log_of(path: Path) -> Path:
    return Path(f"{path}-wal")


@pytest.fixture
def ends(tmp_path: Path) -> list[int]:
    """A session that a killed process left, all of it in the log; where each of its commits ends in the log."""
    path = tmp_path / "live" / "journal.sqlite3"
    path.parent.mkdir()
    journal = SqliteJournal.open(path)
    journal.set_meta("session", {"id": "a"})
    turn = begin_turn(journal)
    ends = []
    for n in range(COMMITS):
        journal.commit(turn, [n] * TOKENS)
        ends.append(log_of(path).stat().st_size)
    (tmp_path / "killed").mkdir()
    for file in (path, log_of(path)):
        shutil.copy(file, tmp_path / "killed" / file.name)
    journal.close()
    return ends


def opened(folder: Path, log: bytes, *, read_only: bool = False) -> int:
    """The position of the killed session with another log."""
    path = folder / "again" / "journal.sqlite3"
    shutil.rmtree(path.parent, ignore_errors=True)
    shutil.copytree(folder / "killed", path.parent)
    log_of(path).write_bytes(log)
    journal = SqliteJournal.open(path, read_only=read_only)
    try:
        journal.verify()
        assert journal.tokens(0, journal.position).tolist() == [n // TOKENS for n in range(journal.position)]
        return journal.position
    finally:
        journal.close()


def test_a_flipped_bit_of_an_acknowledged_transaction_is_damage(tmp_path: Path, ends: list[int]) -> None:
    log = log_of(tmp_path / "killed" / "journal.sqlite3").read_bytes()
    assert opened(tmp_path, log) == COMMITS * TOKENS
    choose = random.Random(0)
    for number in range(60):
        flipped = bytearray(log)
        # the last transaction cannot be told from one that was never finished
        flipped[choose.randrange(ends[-2])] ^= 1 << choose.randrange(8)
        with pytest.raises(CorruptMemoryError, match=r"write-ahead log .* is damaged"):
            opened(tmp_path, bytes(flipped), read_only=number % 2 == 0)


def test_a_sector_that_was_lost_is_damage(tmp_path: Path, ends: list[int]) -> None:
    log = log_of(tmp_path / "killed" / "journal.sqlite3").read_bytes()
    for at in range(0, ends[-3], 2048):
        if not any(log[at : at + 512]):
            continue
        with pytest.raises(CorruptMemoryError, match="is damaged"):
            opened(tmp_path, log[:at] + bytes(512) + log[at + 512 :])


def test_a_last_transaction_that_was_cut_off_is_left_out(tmp_path: Path, ends: list[int]) -> None:
    log = log_of(tmp_path / "killed" / "journal.sqlite3").read_bytes()
    before, end = ends[-2:]
    standing = (COMMITS - 1) * TOKENS
    for left in (before, before + 10, (before + end) // 2, end - 1):
        assert opened(tmp_path, log[:left]) == standing
        assert opened(tmp_path, log[:left] + bytes(len(log) - left)) == standing
    # its end reached the disk, and its beginning did not
    assert opened(tmp_path, log[:before] + bytes(600) + log[before + 600 :]) == standing


def test_a_log_that_was_never_written_is_none(tmp_path: Path, ends: list[int]) -> None:
    for nothing in (b"", bytes(10), bytes(40_000)):
        assert opened(tmp_path, nothing) == 0


def test_what_is_left_of_an_older_round_of_the_log_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "killed" / "journal.sqlite3"
    path.parent.mkdir()
    journal = SqliteJournal.open(path)
    turn = begin_turn(journal)
    for n in range(COMMITS - 1):
        journal.commit(turn, [n] * TOKENS)
    long = log_of(path).stat().st_size
    # folds it in; the next transaction is written over its beginning
    journal._rows.connection.execute("PRAGMA wal_checkpoint(RESTART)")
    journal.commit(turn, [COMMITS - 1] * TOKENS)
    log = log_of(path).read_bytes()
    assert len(log) == long
    assert opened(tmp_path, log) == COMMITS * TOKENS
    journal.close()


def test_what_a_cut_off_transaction_left_behind_a_shorter_one_is_no_damage(tmp_path: Path, ends: list[int]) -> None:
    killed = tmp_path / "killed" / "journal.sqlite3"
    log = log_of(killed).read_bytes()
    # of the last two transactions the first frames never reached the disk: as if they had been one
    torn = log[: ends[-3]] + bytes(600) + log[ends[-3] + 600 :]
    with pytest.raises(CorruptMemoryError):
        opened(tmp_path, torn)
    torn = log[: ends[-2]] + bytes(600) + log[ends[-2] + 600 :]
    log_of(killed).write_bytes(torn)
    live = SqliteJournal.open(killed)
    assert live.position == (COMMITS - 1) * TOKENS
    # shorter than what was cut off, and followed by its end
    live._rows.connection.execute("UPDATE head SET turn = turn")
    assert log_of(killed).stat().st_size == len(log)
    assert opened(tmp_path, log_of(killed).read_bytes()) == (COMMITS - 1) * TOKENS
    live.close()


def test_a_log_that_a_writer_begins_anew_while_it_is_read_is_read_again(
    tmp_path: Path, ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = log_of(tmp_path / "killed" / "journal.sqlite3").read_bytes()
    half = bytearray(log)
    half[ends[3]] ^= 1
    reads = [bytes(half), log]
    monkeypatch.setattr("memtier_backends.wal_check._read", lambda path: reads.pop(0))
    assert opened(tmp_path, log) == COMMITS * TOKENS
    assert not reads


def test_what_stands_before_the_damage_of_a_log_is_kept_and_the_loss_is_not_guessed(
    tmp_path: Path, ends: list[int]
) -> None:
    path = tmp_path / "killed" / "journal.sqlite3"
    log = bytearray(log_of(path).read_bytes())
    log[ends[4] + 100] ^= 1
    log_of(path).write_bytes(log)
    assert salvage(path, tmp_path / "mended.sqlite3") == (5 * TOKENS, None)
