"""A journal whose bytes changed says so; it never gives wrong tokens in silence, and never starts anew."""

import random
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from memtier.errors import (
    CorruptMemoryError,
    IncompatibleMemoryError,
    SessionNotFoundError,
    StorageError,
    StorageFullError,
)
from memtier_backends.journal_salvage import salvage
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.records import SnapshotRecord
from memtier_backends.segments import pack_segment
from memtier_backends.testing import begin_turn, make_payloads

SECRET = b"the secret of Bodiv is 4821"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed journal with something of everything in it."""
    path = tmp_path / "journal.sqlite3"
    journal = SqliteJournal.open(path)
    journal.set_meta("id", {"tenant": "t", "session": "s"})
    for n in range(6):
        turn = begin_turn(journal, source=f"file {n}")
        journal.commit(turn, list(range(100 * n, 100 * n + 40)), mark=n % 2 == 0)
        journal.commit(turn, [n, n], text=f"text of turn {n}")
    journal.rollback(230, "test")
    _, manifest = pack_segment(make_payloads(0, 5))
    journal.add_segment(manifest)
    journal.set_indexed_through(3, seal="abc")
    journal.add_snapshot(SnapshotRecord(100, "a", 5, "x", 0))
    journal.close()
    return path


def everything(journal: SqliteJournal) -> tuple[object, ...]:
    position = journal.position
    return (
        journal.tokens(0, position).tolist(),
        journal.turns(),
        journal.marks(0, position),
        journal.segments(),
        journal.snapshots(),
        journal.indexed_through,
        journal.get_meta("id"),
    )


def test_a_flipped_bit_anywhere_in_the_file_is_found_or_harmless(path: Path) -> None:
    journal = SqliteJournal.open(path)
    before = everything(journal)
    journal.close()
    whole = path.read_bytes()
    generator = random.Random(0)
    found = 0
    for _ in range(250):
        damaged = bytearray(whole)
        at = generator.randrange(len(damaged))
        damaged[at] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            journal = SqliteJournal.open(path)
            try:
                journal.verify()
                assert everything(journal) == before, f"a flipped bit of byte {at} gave other content"
            finally:
                journal.close()
        except (CorruptMemoryError, IncompatibleMemoryError):
            found += 1
    assert found > 25


@pytest.mark.parametrize("read_only", [False, True], ids=["owner", "look"])
def test_no_flipped_bit_is_read_in_silence(path: Path, read_only: bool) -> None:
    """Nobody calls verify: what is read is what was written, or an error."""
    journal = SqliteJournal.open(path)
    journal.set_meta("forget", {"ranges": [[1, 2]]})
    expected = answers(journal)
    journal.close()
    whole = path.read_bytes()
    # most of a small file is free space, which is zeros
    used = [at for at, byte in enumerate(whole) if byte or at % 16 == 0]
    choose = random.Random(1)
    loud = 0
    for _ in range(300):
        damaged = bytearray(whole)
        at = choose.choice(used)
        damaged[at] ^= 1 << choose.randrange(8)
        path.write_bytes(damaged)
        try:
            journal = SqliteJournal.open(path, read_only=read_only)
        except (CorruptMemoryError, IncompatibleMemoryError):
            loud += 1
            continue
        for what, answer in answers(journal).items():
            told = isinstance(answer, CorruptMemoryError)
            loud += told
            assert told or answer == expected[what], f"a flipped bit of byte {at} gave other {what}"
        journal._rows.connection.close()
    assert loud > 100


def answers(journal: SqliteJournal) -> dict[str, object]:
    """What each thing that can be read is; an error stands for an answer."""
    calls = {
        "position": lambda: journal.position,
        "tokens": lambda: journal.tokens(0, journal.position).tolist(),
        "some tokens": lambda: journal.tokens(50, 60).tolist(),
        "turns": journal.turns,
        "some turns": lambda: journal.turns(100, 130),
        "marks": lambda: journal.marks(0, 230),
        "segments": journal.segments,
        "first block": lambda: journal.first_block,
        "snapshots": journal.snapshots,
        "index mark": lambda: journal.indexed_through,
        "index seal": lambda: journal.index_seal,
        "id": lambda: journal.get_meta("id"),
        "forget": lambda: journal.get_meta("forget"),
    }
    found: dict[str, object] = {}
    for what, call in calls.items():
        try:
            found[what] = call()
        except CorruptMemoryError as error:
            found[what] = error
    return found


@pytest.mark.parametrize(("live", "message"), [(5, "are missing"), (7, "there twice")])
def test_tokens_that_overlap_are_no_tokens(tmp_path: Path, live: int, message: str) -> None:
    """Found where they are read, too: the file may be damaged while it is open."""
    journal = SqliteJournal.open(tmp_path / "journal.sqlite3")
    journal.commit(begin_turn(journal), list(range(10)))
    journal.rollback(6, "test")
    journal.commit(begin_turn(journal), list(range(100, 110)))
    journal._rows.execute("UPDATE entries SET live = ? WHERE live = 6", (live,))
    with pytest.raises(CorruptMemoryError, match=message):
        journal.tokens(0, 16)
    with pytest.raises(CorruptMemoryError, match="one after the other"):
        journal.turns()
    assert journal.tokens(6, 16).tolist() == list(range(100, 110))
    assert journal.tokens(8, 9).tolist() == [102]
    journal._rows.execute("UPDATE entries SET live = 0 WHERE kind = 'tokens'")
    with pytest.raises(CorruptMemoryError, match="turns of tokens"):
        journal.turns(3, 4)
    journal.close()


def test_a_flipped_bit_in_a_token_row_is_found_when_it_is_read_and_by_verify(path: Path) -> None:
    whole = path.read_bytes()
    at = whole.index(b"".join(token.to_bytes(4, "little") for token in (217, 218)))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    journal = SqliteJournal.open(path)
    assert journal.tokens(0, 50).tolist()[:3] == [0, 1, 2]
    with pytest.raises(CorruptMemoryError, match=r"entry \d+ \(tokens at position 84\)"):
        journal.tokens(0, 200)
    with pytest.raises(CorruptMemoryError, match="backup"):
        journal.verify()
    journal.close()


def edited(path: Path, *statements: str) -> SqliteJournal:
    """The journal after someone ran SQL in its file."""
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()
    return SqliteJournal.open(path)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("DELETE FROM entries WHERE seq = 5", "entry 5 is missing"),
        ("UPDATE entries SET live = 39 WHERE seq = 2", "taken back"),
        ("UPDATE entries SET live = 2 WHERE kind = 'tokens' AND live = 0", "taken back"),
        ("UPDATE entries SET live = 'x' WHERE seq = 2", "entry 2 holds values of another type"),
        ("UPDATE entries SET kind = 'text' WHERE seq = 5", "taken back"),
        ("UPDATE entries SET kind = 'text' WHERE kind = 'rollback'", "up to 230"),
        ("UPDATE entries SET turn = 7 WHERE seq = (SELECT MAX(seq) FROM entries)", "in turn 7"),
        ("UPDATE entries SET start = 'x' WHERE seq = 2", "entry 2 holds values of another type"),
        ("UPDATE records SET body = replace(body, 'session', 'possess')", "meta record 'id'"),
        ("UPDATE records SET kind = 'other' WHERE kind = 'snapshot'", "unknown kind 'other'"),
        ("UPDATE records SET rank = 3 WHERE kind = 'segment'", "segment record"),
    ],
)
def test_a_file_whose_rows_do_not_agree_is_refused(path: Path, statement: str, message: str) -> None:
    with pytest.raises(CorruptMemoryError, match=message):
        edited(path, statement)
    if " records " in statement:
        return  # a look checks those that it reads
    look = SqliteJournal.open(path, read_only=True)
    assert look.position == 230
    for call in (look.turns, look.segments, look.snapshots, lambda: look.get_meta("id"), lambda: look.tokens(0, 1)):
        with pytest.raises(CorruptMemoryError, match=message):
            call()
    look.close()


def test_a_changed_row_is_found_by_verify(path: Path) -> None:
    journal = edited(path, "UPDATE entries SET turn = 1 WHERE seq = 2")
    with pytest.raises(CorruptMemoryError, match="entry 2"):
        journal.verify()
    journal.close()


def test_a_lost_tail_is_found_at_open(path: Path) -> None:
    with pytest.raises(CorruptMemoryError, match="newest entry"):
        edited(path, "DELETE FROM entries WHERE seq = (SELECT MAX(seq) FROM entries)")


def test_a_changed_head_is_found_at_open(path: Path) -> None:
    with pytest.raises(CorruptMemoryError, match="head"):
        edited(path, "UPDATE head SET position = position - 1")


def test_damage_that_sqlite_quotes_is_told_too(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"CREATE TABLE entries (", b"CREATE TABLE entr\xc8es (", 1))
    with pytest.raises(CorruptMemoryError, match="damaged"):
        SqliteJournal.open(path)


@pytest.mark.parametrize("left", [0, 1, 100, 5000])
def test_a_truncated_file_is_damage_and_not_a_new_session(path: Path, left: int) -> None:
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CorruptMemoryError, match=r"journal\.sqlite3"):
        SqliteJournal.open(path)


@pytest.mark.parametrize("read_only", [True, False], ids=["look", "owner"])
def test_an_empty_file_is_damage_and_keeps_its_log(path: Path, read_only: bool) -> None:
    journal = SqliteJournal.open(path)
    journal.commit(begin_turn(journal), [1])
    log = Path(f"{path}-wal")
    kept = log.read_bytes()
    journal.close()
    path.write_bytes(b"")
    log.write_bytes(kept)
    with pytest.raises(CorruptMemoryError, match="it is empty"):
        SqliteJournal.open(path, read_only=read_only)
    assert log.read_bytes() == kept
    log.unlink()
    with pytest.raises(CorruptMemoryError, match="it is empty"):
        SqliteJournal.open(path, read_only=read_only)


def test_a_file_that_is_no_database_is_damage(path: Path) -> None:
    path.write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(CorruptMemoryError, match="damaged"):
        SqliteJournal.open(path)


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite3"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE entries (a)")
    connection.close()
    with pytest.raises(CorruptMemoryError, match="application id"):
        SqliteJournal.open(path)


def test_a_newer_format_is_refused_by_name(path: Path) -> None:
    with pytest.raises(IncompatibleMemoryError, match=r"format 2.*Install a newer memtier"):
        edited(path, "PRAGMA user_version = 2")


def test_a_log_without_its_journal_is_damage(path: Path) -> None:
    path.rename(f"{path}-wal")
    with pytest.raises(CorruptMemoryError, match="missing"):
        SqliteJournal.open(path)


def test_a_crash_while_making_a_journal_leaves_none(tmp_path: Path) -> None:
    path = tmp_path / "journal.sqlite3"
    stale = tmp_path / ".journal.sqlite3.123.tmp"
    stale.write_bytes(b"half")
    SqliteJournal.open(path).close()
    assert [p.name for p in tmp_path.iterdir()] == ["journal.sqlite3"]


def test_a_reader_beside_the_writer_sees_what_was_committed_and_writes_nothing(path: Path) -> None:
    with pytest.raises(SessionNotFoundError, match="no journal"):
        SqliteJournal.open(path.with_name("other"), read_only=True)
    writer = SqliteJournal.open(path)
    reader = SqliteJournal.open(path, read_only=True)
    assert reader.position == 230
    writer.commit(begin_turn(writer), [1])
    assert reader.position == 231
    with pytest.raises(StorageError, match="readonly"):
        reader.set_meta("a", 1)
    reader.close()
    writer.close()


def test_the_pragmas_are_those_that_durability_rests_on(path: Path) -> None:
    journal = SqliteJournal.open(path)
    values = {
        name: journal._rows.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "secure_delete", "user_version")
    }
    assert values == {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1, "user_version": 1}
    journal.close()


def test_a_checkpoint_leaves_no_log(path: Path) -> None:
    journal = SqliteJournal.open(path)
    journal.commit(begin_turn(journal), [1])
    log = Path(f"{path}-wal")
    assert log.stat().st_size > 0
    journal.checkpoint()
    assert log.stat().st_size == 0
    journal.close()
    assert not log.exists()


def test_a_checkpoint_that_a_reader_holds_up_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memtier_backends.sqlite_file._BUSY_TIMEOUT_SECONDS", 0.01)
    journal = SqliteJournal.open(path)
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM entries").fetchone()
    journal.commit(begin_turn(journal), [1])
    with pytest.raises(StorageError, match="reader kept it busy"):
        journal.checkpoint()
    reader.close()
    journal.checkpoint()
    assert journal.position == 231
    journal.close()


def test_a_text_that_is_too_large_is_no_damage(path: Path) -> None:
    journal = SqliteJournal.open(path)
    limit = journal._rows.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1000)
    turn = begin_turn(journal)
    for call in (
        lambda: journal.commit(turn, [1], text="x" * 2000),
        lambda: journal.commit(turn, [1] * 500),
        lambda: journal.set_meta("a", "x" * 2000),
    ):
        with pytest.raises(StorageError, match=r"larger than SQLite keeps.*split it") as told:
            call()
        assert not isinstance(told.value, CorruptMemoryError)
    assert journal.commit(turn, [1], text="x") == 231
    journal._rows.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, limit)
    journal.commit(turn, [1] * 500)
    journal._rows.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1000)
    # what was written is read, so a row that is too large then is damage
    with pytest.raises(CorruptMemoryError):
        journal.tokens(231, 731)
    journal._rows.connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, limit)
    journal.close()


@pytest.mark.parametrize("where", ["records", "sqlite_autoindex_records_1"], ids=["row", "index"])
def test_a_record_that_the_table_or_its_index_still_leads_to_is_kept(path: Path, tmp_path: Path, where: str) -> None:
    journal = SqliteJournal.open(path)
    journal.set_meta("session", {"id": "a"})
    journal.set_meta("forget", {"ranges": [[1, 2]]})
    expected = answers(journal)
    (page,) = journal._rows.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (where,)).fetchone()
    journal.close()
    data = bytearray(path.read_bytes())
    # of the row another record is damaged, and of the index the way to this one
    name = b"metaid" if where == "records" else b"metaforget"
    data[data.index(name, (page - 1) * 4096, page * 4096) + 4] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptMemoryError):
        SqliteJournal.open(path)
    assert salvage(path, tmp_path / "mended.sqlite3") == (230, 0)
    mended = SqliteJournal.open(tmp_path / "mended.sqlite3")
    assert mended.get_meta("forget") == {"ranges": [[1, 2]]}
    assert mended.get_meta("session") == {"id": "a"}
    assert mended.get_meta("id") == (None if where == "records" else expected["id"])
    mended.close()


LEFT = [
    "segments/a",
    "snapshots/a",
    "quarantine/journal.sqlite3.0",
    f"checkpoints/{'0' * 32}/lock",
    ".rescued-0.sqlite3",
]


@pytest.mark.parametrize("left", LEFT)
def test_a_lost_journal_is_no_new_session(path: Path, left: str) -> None:
    path.unlink()
    (path.parent / left).parent.mkdir(parents=True, exist_ok=True)
    (path.parent / left).write_bytes(b"x")
    with pytest.raises(CorruptMemoryError, match=r"journal\.sqlite3 is missing.*doctor --rebuild, or delete"):
        SqliteJournal.open(path)
    assert not path.exists()
    assert (path.parent / left).exists()


def test_what_one_that_died_before_it_began_leaves_is_no_session(path: Path) -> None:
    path.unlink()
    for name in ("segments", "snapshots", "checkpoints", "quarantine", "index.lance/rows.lance"):
        (path.parent / name).mkdir(parents=True)
    for name in ("lock", "index.lance/rows.lance/0.lance"):
        (path.parent / name).write_bytes(b"x")
    journal = SqliteJournal.open(path)
    assert journal.position == 0
    journal.close()


@pytest.mark.parametrize("secure", [True, False], ids=["secure_delete", "control-without"])
def test_deleted_bytes_are_overwritten(tmp_path: Path, secure: bool) -> None:
    path = tmp_path / "journal.sqlite3"
    journal = SqliteJournal.open(path)
    if not secure:
        journal._rows.execute("PRAGMA secure_delete=OFF")
    journal.add_snapshot(SnapshotRecord(0, SECRET.decode(), 1, "x", 0))
    journal.checkpoint()
    assert SECRET in path.read_bytes()
    journal.drop_snapshot(SECRET.decode())
    journal.checkpoint()
    assert (SECRET in path.read_bytes()) is not secure
    journal.close()


def test_a_full_disk_takes_nothing_that_was_acknowledged(path: Path) -> None:
    journal = SqliteJournal.open(path)
    (pages,) = journal._rows.execute("PRAGMA page_count").fetchone()
    journal._rows.execute(f"PRAGMA max_page_count={pages + 2}")
    turn = begin_turn(journal)
    acknowledged = [journal.position]

    def fill() -> None:
        for _ in range(100):
            acknowledged.append(journal.commit(turn, list(range(512))))

    with pytest.raises(StorageFullError, match="free some space"):
        fill()
    assert journal.position == acknowledged[-1]
    journal.verify()
    journal._rows.execute("PRAGMA max_page_count=1000000")
    assert journal.commit(turn, [1]) == acknowledged[-1] + 1
    journal.close()


def test_a_copy_of_a_live_journal_with_its_log_is_whole(path: Path, tmp_path: Path) -> None:
    journal = SqliteJournal.open(path)
    journal.commit(begin_turn(journal), [1, 2, 3])
    for name in ("journal.sqlite3", "journal.sqlite3-wal"):
        (tmp_path / "copy").mkdir(exist_ok=True)
        shutil.copy(tmp_path / name, tmp_path / "copy" / name)
    copy = SqliteJournal.open(tmp_path / "copy" / "journal.sqlite3")
    assert everything(copy) == everything(journal)
    copy.verify()
    copy.close()
    journal.close()


def test_a_second_thread_waits_and_is_not_told_of_damage(path: Path) -> None:
    journal = SqliteJournal.open(path)
    turn = begin_turn(journal)
    before = journal.position
    seen, reading = [before], Event()

    def read_until_the_last_commit() -> None:
        while seen[-1] < before + 50:
            seen.append(journal.position)
            reading.set()

    with ThreadPoolExecutor(1) as pool:
        reads = pool.submit(read_until_the_last_commit)
        assert reading.wait(60)
        for n in range(50):
            journal.commit(turn, [n])
        reads.result()
    assert seen == sorted(seen) and set(seen) <= set(range(before, before + 51))
    journal.close()
