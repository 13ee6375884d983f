"""The conformance suites: what every journal, segment store and index must do, as pytest classes.

An adapter's tests subclass a suite and say how to open the store; nothing more:

    class TestSqliteJournal(JournalSuite):
        def open(self, path):
            return SqliteJournal.open(path)

Also here: small payloads and rows to test with, and the fault wrappers of faults.py. Needs pytest.

One long file, so that what a new adapter must do is read and imported in one place.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from memtier.errors import ConfigError, CorruptMemoryError, StorageError
from memtier_backends.base import Journal, MemoryIndex, SegmentStore
from memtier_backends.faults import Faults, FaultyIndex, FaultyJournal, FaultySegmentStore
from memtier_backends.records import BlockPayload, IndexRow, RawArray, SegmentManifest, SnapshotRecord
from memtier_backends.segments import pack_segment

__all__ = [
    "Faults",
    "FaultyIndex",
    "FaultyJournal",
    "FaultySegmentStore",
    "IndexSuite",
    "JournalSuite",
    "SegmentStoreSuite",
    "begin_turn",
    "damage_file",
    "make_payloads",
    "make_rows",
]

# Of the payloads made here: tokens of a block, key/value heads, head size.
BLOCK_TOKENS, KV_HEADS, HEAD_SIZE = 4, 2, 3


def make_payloads(first_block: int, blocks: int, *, layers: int = 2, seed: int = 0) -> list[BlockPayload]:
    """Consecutive float16 blocks of random numbers."""
    numbers = np.random.default_rng([seed, first_block])

    def payload(block: int) -> BlockPayload:
        shape = (2, BLOCK_TOKENS, KV_HEADS, HEAD_SIZE)
        kv = [numbers.standard_normal(shape).astype("<f2") for _ in range(layers)]
        return BlockPayload(
            block=block,
            start=block * BLOCK_TOKENS,
            end=(block + 1) * BLOCK_TOKENS,
            kv=tuple(RawArray("F16", shape, array.tobytes()) for array in kv),
            landmarks=tuple(array[0].mean(axis=0, dtype=np.float32).reshape(-1) for array in kv),
            innovation=numbers.random(BLOCK_TOKENS, dtype=np.float32),
        )

    return [payload(block) for block in range(first_block, first_block + blocks)]


def make_rows(texts: Sequence[str], *, first_block: int = 0, layers: Sequence[int] = (4,)) -> list[IndexRow]:
    """One row a text; the landmarks of a block depend on its number alone."""
    return [
        IndexRow(
            block=block,
            start=block * BLOCK_TOKENS,
            end=(block + 1) * BLOCK_TOKENS,
            text=text,
            created_at=1_000.0 + block,
            innovation=None if block % 3 == 0 else block / 8,
            landmarks=tuple(
                np.random.default_rng([layer, block]).standard_normal(size, dtype=np.float32)
                for layer, size in enumerate(layers)
            ),
        )
        for block, text in enumerate(texts, first_block)
    ]


def begin_turn(journal: Journal, role: str = "user", source: str | None = None) -> int:
    """A turn like any other."""
    return journal.begin_turn(
        role=role, source=source, metadata={"n": 1}, created_at=12.5, retrieval="on", span_blocks=4
    )


def damage_file(choose: random.Random, path: Path) -> str:
    """Flip a bit of a file, cut it, or tear a sector of it; what was done."""
    data = bytearray(path.read_bytes())
    how = choose.choice(["flip", "flip", "cut", "zeros", "twice"])
    at = choose.randrange(len(data))
    if how == "flip":
        data[at] ^= 1 << choose.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "zeros":
        data[at // 512 * 512 : at // 512 * 512 + 512] = bytes(min(512, len(data) - at // 512 * 512))
    else:
        # a sector that another one of the file was written over
        here, other = at // 512 * 512, choose.randrange(len(data)) // 512 * 512
        size = min(512, len(data) - here, len(data) - other)
        data[here : here + size] = data[other : other + size]
    path.write_bytes(data)
    return f"{how} at {at} of {path.name}"


class JournalSuite:
    """What a Journal must do."""

    def open(self, path: Path) -> Journal:
        """Open the journal at `path`, making it if it is not there."""
        raise NotImplementedError

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "journal"

    @pytest.fixture
    def journal(self, path: Path) -> Iterator[Journal]:
        journal = self.open(path)
        yield journal
        journal.close()

    def test_a_new_journal_is_empty(self, journal: Journal) -> None:
        assert journal.position == 0
        assert journal.turns() == []
        assert journal.segments() == []
        assert journal.snapshots() == []
        assert journal.indexed_through == 0
        assert journal.tokens(0, 0).shape == (0,)
        assert journal.get_meta("id") is None
        journal.verify()

    def test_any_range_of_tokens_comes_back(self, journal: Journal) -> None:
        turn = begin_turn(journal)
        assert journal.commit(turn, [7, 8, 9]) == 3
        assert journal.commit(turn, np.array([2**31 - 1], dtype=np.int64)) == 4
        assert journal.commit(turn, [0, 1]) == 6
        everything = [7, 8, 9, 2**31 - 1, 0, 1]
        for start in range(7):
            for end in range(start, 7):
                assert journal.tokens(start, end).tolist() == everything[start:end]
        assert journal.tokens(0, 6).dtype == np.int32

    def test_what_was_committed_is_there_after_reopening(self, journal: Journal, path: Path) -> None:
        turn = begin_turn(journal, source="a file")
        journal.commit(turn, [1, 2, 3], text="abc", mark=True)
        journal.set_meta("id", {"session": "../a/b", "n": [1, None]})
        turns = journal.turns()
        journal.close()
        again = self.open(path)
        assert again.position == 3
        assert again.tokens(0, 3).tolist() == [1, 2, 3]
        assert again.turns() == turns
        assert again.marks(0, 3) == [2]
        assert again.get_meta("id") == {"session": "../a/b", "n": [1, None]}
        again.verify()
        again.close()

    def test_a_turn_says_who_spoke_and_how_it_was_read(self, journal: Journal) -> None:
        turn = journal.begin_turn(
            role="assistant", source=None, metadata=None, created_at=1.25, retrieval="random", span_blocks=3
        )
        journal.commit(turn, [5])
        (record,) = journal.turns()
        assert (record.turn, record.role, record.source, record.metadata) == (turn, "assistant", None, {})
        assert (record.start, record.end, record.created_at) == (0, 1, 1.25)
        assert (record.retrieval, record.span_blocks) == ("random", 3)

    def test_turns_that_touch_a_range_are_listed_whole(self, journal: Journal) -> None:
        for length in (3, 2, 4):
            turn = begin_turn(journal)
            for token in range(length):
                journal.commit(turn, [token])
        spans = [(0, 3), (3, 5), (5, 9)]
        for start in range(9):
            for end in range(start + 1, 10):
                expected = [span for span in spans if span[0] < end and span[1] > start]
                assert [(t.start, t.end) for t in journal.turns(start, end)] == expected

    def test_a_turn_without_tokens_is_not_listed(self, journal: Journal) -> None:
        begin_turn(journal)
        assert journal.turns() == []

    def test_texts_of_pieces_are_joined(self, journal: Journal) -> None:
        turn = begin_turn(journal)
        journal.commit(turn, [1, 2])
        journal.commit(turn, [3], text="one ")
        journal.commit(turn, [4], text="zwei, \N{SNOWMAN} and \ud800")
        assert journal.turns()[0].text == "one zwei, \N{SNOWMAN} and \ud800"

    def test_a_text_may_follow_its_tokens(self, journal: Journal) -> None:
        turn = begin_turn(journal)
        journal.commit(turn, [1, 2])
        assert journal.commit(turn, [], text="late") == 2
        assert journal.turns()[0].text == "late"

    def test_a_turn_with_tokens_of_no_text_has_no_text(self, journal: Journal) -> None:
        turn = begin_turn(journal)
        journal.commit(turn, [1], text="a")
        journal.commit(turn, [2])
        assert journal.turns()[0].text is None

    def test_marks_stand_at_the_last_token_of_their_commit(self, journal: Journal) -> None:
        turn = begin_turn(journal)
        journal.commit(turn, [1, 2, 3], mark=True)
        journal.commit(turn, [4])
        journal.commit(turn, [5], mark=True)
        assert journal.marks(0, 5) == [2, 4]
        assert journal.marks(2, 4) == [2]
        assert journal.marks(3, 4) == []

    def test_a_rollback_takes_tokens_texts_and_marks_back(self, journal: Journal) -> None:
        first = begin_turn(journal)
        journal.commit(first, [1, 2], text="ab")
        second = begin_turn(journal)
        journal.commit(second, [3, 4, 5], text="cde", mark=True)
        journal.rollback(4, "the model refused the step")
        assert journal.position == 4
        assert journal.tokens(0, 4).tolist() == [1, 2, 3, 4]
        assert journal.marks(0, 4) == []
        assert [(t.start, t.end, t.text) for t in journal.turns()] == [(0, 2, "ab"), (2, 4, None)]
        journal.commit(second, [9])
        assert journal.tokens(2, 5).tolist() == [3, 4, 9]
        journal.rollback(2, "again")
        assert [(t.start, t.end, t.text) for t in journal.turns()] == [(0, 2, "ab")]
        journal.rollback(0, "all")
        assert journal.position == 0
        journal.verify()

    def test_the_newest_commit_is_told_until_something_follows_it(self, journal: Journal) -> None:
        assert journal.newest_commit() is None
        turn = begin_turn(journal)
        assert journal.newest_commit() is None
        journal.commit(turn, [1, 2, 3])
        journal.commit(turn, [4, 5], text="all of it")
        journal.set_meta("about", 1)
        assert journal.newest_commit() == (3, 5)
        journal.rollback(4, "why")
        assert journal.newest_commit() is None
        journal.commit(turn, [6])
        assert journal.newest_commit() == (4, 5)
        begin_turn(journal)
        assert journal.newest_commit() is None

    def test_a_rollback_forgets_what_was_derived_from_its_tokens(self, journal: Journal) -> None:
        self._with_segments(journal)
        # Into the middle of the second segment, which goes as a whole.
        journal.rollback(4 * BLOCK_TOKENS + 1, "test")
        assert [m.first_block for m in journal.segments()] == [0]
        assert journal.indexed_through == 3
        assert [s.position for s in journal.snapshots()] == [4]

    def test_drop_after_forgets_derived_records_and_keeps_tokens(self, journal: Journal) -> None:
        self._with_segments(journal)
        journal.drop_after(6 * BLOCK_TOKENS)
        assert [m.first_block for m in journal.segments()] == [0, 3, 5]
        journal.drop_after(5 * BLOCK_TOKENS)
        assert [m.first_block for m in journal.segments()] == [0, 3]
        assert journal.indexed_through == 5
        journal.drop_after(0)
        assert journal.segments() == []
        assert journal.snapshots() == []
        assert journal.indexed_through == 0
        assert journal.position == 8 * BLOCK_TOKENS

    def test_manifests_come_back_equal_and_in_order(self, journal: Journal) -> None:
        manifests = self._with_segments(journal)
        assert journal.segments() == manifests

    def test_a_segment_that_leaves_a_gap_is_refused(self, journal: Journal) -> None:
        self._with_segments(journal)
        _, gap = pack_segment(make_payloads(7, 1))
        _, again = pack_segment(make_payloads(0, 3))
        for manifest in (gap, again):
            with pytest.raises(ConfigError, match="block 6 comes next"):
                journal.add_segment(manifest)

    def test_a_segment_past_the_tokens_is_refused(self, journal: Journal) -> None:
        _, manifest = pack_segment(make_payloads(0, 1))
        with pytest.raises(ConfigError, match="has 0 tokens"):
            journal.add_segment(manifest)

    def test_the_index_mark_stays_within_the_segments(self, journal: Journal) -> None:
        self._with_segments(journal)
        for blocks in (-1, 7):
            with pytest.raises(ConfigError, match=r"\[0, 6\]"):
                journal.set_indexed_through(blocks, seal="abc")
        assert (journal.indexed_through, journal.index_seal) == (5, "as written")
        journal.set_indexed_through(0, seal="")
        assert (journal.indexed_through, journal.index_seal) == (0, "")

    def test_one_segment_stands_for_several_and_may_be_told_so_twice(self, journal: Journal, path: Path) -> None:
        first, second, third = self._with_segments(journal)
        _, both = pack_segment(make_payloads(first.first_block, first.blocks + second.blocks))
        assert journal.merge_segments(both) == [first.name, second.name]
        assert journal.merge_segments(both) == []
        assert journal.segments() == [both, third]
        assert journal.indexed_through == 5
        journal.close()
        again = self.open(path)
        assert again.segments() == [both, third]
        again.verify()
        again.close()

    @pytest.mark.parametrize(("block", "blocks"), [(0, 4), (1, 4), (6, 1)], ids=["half-last", "half-first", "new"])
    def test_a_segment_that_holds_other_blocks_stands_for_none(self, journal: Journal, block: int, blocks: int) -> None:
        manifests = self._with_segments(journal)
        _, other = pack_segment(make_payloads(block, blocks))
        with pytest.raises(ConfigError, match="just these"):
            journal.merge_segments(other)
        assert journal.segments() == manifests

    def test_a_segment_sent_twice_is_one(self, journal: Journal) -> None:
        manifests = self._with_segments(journal)
        journal.add_segment(manifests[-1])
        assert journal.segments() == manifests

    def test_old_segments_and_the_snapshots_that_need_them_are_dropped(self, journal: Journal, path: Path) -> None:
        first, second, third = self._with_segments(journal)
        at = journal.position
        journal.add_snapshot(SnapshotRecord(at, "needs none of them", 1, "x", 6, first_block=4))
        # block 4 lies in the second segment, which goes as a whole or not at all
        assert sorted(journal.drop_before(4)) == sorted([first.name, "new", "old"])
        assert journal.drop_before(4) == []
        assert (journal.first_block, journal.segments()) == (3, [second, third])
        assert [s.name for s in journal.snapshots()] == ["needs none of them"]
        assert journal.indexed_through == 5
        journal.close()
        again = self.open(path)
        assert (again.first_block, again.segments()) == (3, [second, third])
        again.verify()
        with pytest.raises(ConfigError, match="some already"):
            again.begin_with(7)
        # nothing to go on from is left: all is made again from the first token on
        again.drop_after(at - 1)
        assert (again.first_block, again.segments(), again.snapshots()) == (0, [], [])
        assert again.indexed_through == 0
        again.begin_with(2)
        _, later = pack_segment(make_payloads(2, 2))
        again.add_segment(later)
        assert again.segments() == [later]
        again.close()

    def test_a_turn_says_what_was_dropped_when_it_began(self, journal: Journal) -> None:
        for retained_from in (0, 3):
            turn = journal.begin_turn(
                role="user", source=None, metadata=None, created_at=0.0, retrieval="on", span_blocks=4,
                retained_from=retained_from,
            )  # fmt: skip
            journal.commit(turn, [1, 2, 3, 4])
        assert [turn.retained_from for turn in journal.turns()] == [0, 3]
        # positions move down with the tokens before them
        journal.forget(1, 3, derived_to=0, meta={})
        assert [turn.retained_from for turn in journal.turns()] == [0, 1]

    def test_a_turn_may_be_begun_under_a_number_and_with_what_was_forgotten_of_it(
        self, journal: Journal, path: Path
    ) -> None:
        about = {"source": None, "metadata": None, "created_at": 0.0, "retrieval": "on", "span_blocks": 4}
        first = journal.begin_turn(role="user", **about, turn=5, forgotten=[(0, 2), (4, 7)])
        assert first == 5
        journal.commit(first, [1, 2, 3])
        for number in (5, 4):
            with pytest.raises(ConfigError, match="higher number"):
                journal.begin_turn(role="user", **about, turn=number)
        for wrong in ([(3, 3)], [(2, 1)], [(-1, 2)], [(0, 2), (2, 3)], [(4, 5), (0, 1)]):
            with pytest.raises(ConfigError, match="in order"):
                journal.begin_turn(role="user", **about, forgotten=wrong)
        second = journal.begin_turn(role="user", **about)
        assert second == 6
        journal.commit(second, [4, 5])
        journal.close()
        again = self.open(path)
        assert [(t.turn, t.start, t.end, t.forgotten) for t in again.turns()] == [
            (5, 0, 3, ((0, 2), (4, 7))),
            (6, 3, 5, ()),
        ]
        # what is forgotten next is told in places of the turn as it was said, and joins
        again.forget(0, 2, derived_to=0, meta={})
        assert [(t.turn, t.forgotten) for t in again.turns()] == [(5, ((0, 7),)), (6, ())]
        again.verify()
        again.close()

    def test_numpy_integers_are_integers(self, journal: Journal, path: Path) -> None:
        self._with_segments(journal)
        journal.set_indexed_through(np.int64(3), seal="")  # pyright: ignore[reportArgumentType]
        journal.rollback(np.int64(20), "test")  # pyright: ignore[reportArgumentType]
        journal.close()
        again = self.open(path)
        assert (again.position, again.indexed_through) == (20, 3)
        again.commit(begin_turn(again), [7, 8], mark=True)
        start, end = np.int64(19), np.int64(22)
        assert again.tokens(start, end).tolist()[1:] == [7, 8]  # pyright: ignore[reportArgumentType]
        assert [(t.start, t.end) for t in again.turns(end - 1, end)] == [(20, 22)]  # pyright: ignore[reportArgumentType]
        assert again.marks(start, end) == [21]  # pyright: ignore[reportArgumentType]
        again.verify()
        again.close()

    def test_what_was_taken_back_is_left_out_and_all_that_stands_is_as_it_was(
        self, journal: Journal, path: Path
    ) -> None:
        self._with_segments(journal)
        journal.drop_rolled_back()
        at = journal.position
        turn = begin_turn(journal)
        journal.commit(turn, [1, 2, 3, 4], text="half of it", mark=True)
        journal.rollback(at + 3, "test")
        journal.commit(turn, [5], mark=True)
        begin_turn(journal, source="refused")
        turn = begin_turn(journal, source="refused")
        journal.commit(turn, [6, 7], text="refused", mark=True)
        journal.rollback(at + 4, "refused")
        journal.add_snapshot(SnapshotRecord(at + 4, "newest", 1, "x", 3))

        def everything(of: Journal) -> list[object]:
            return [
                of.position, of.tokens(0, of.position).tolist(), of.turns(), of.marks(0, of.position), of.segments(),
                of.snapshots(), of.indexed_through, of.index_seal, of.get_meta("id"),
            ]  # fmt: skip

        journal.set_meta("id", "a")
        expected = everything(journal)
        assert journal.indexed_through
        journal.drop_rolled_back()
        assert everything(journal) == expected
        journal.drop_rolled_back()
        journal.verify()
        journal.close()
        assert b"refused" not in path.read_bytes()
        again = self.open(path)
        assert everything(again) == expected
        # the newest turn goes on
        assert again.commit(turn, [8], text="said after all") == at + 5
        assert (again.turns()[-1].turn, again.turns()[-1].text) == (turn, "said after all")
        again.verify()
        again.close()

    def test_snapshots_are_kept_by_name_and_listed_by_position(self, journal: Journal) -> None:
        journal.commit(begin_turn(journal), list(range(10)))
        journal.add_snapshot(SnapshotRecord(8, "b", 1, "x", 0))
        journal.add_snapshot(SnapshotRecord(3, "a", 1, "x", 0))
        journal.add_snapshot(SnapshotRecord(8, "b", 2, "y", 0))
        assert journal.snapshots() == [SnapshotRecord(3, "a", 1, "x", 0), SnapshotRecord(8, "b", 2, "y", 0)]
        journal.drop_snapshot("a")
        journal.drop_snapshot("never there")
        assert [s.name for s in journal.snapshots()] == ["b"]
        with pytest.raises(ConfigError, match=r"\[0, 10\]"):
            journal.add_snapshot(SnapshotRecord(11, "c", 1, "x", 0))

    def test_meta_is_replaced(self, journal: Journal) -> None:
        journal.set_meta("a", 1)
        journal.set_meta("a", "two")
        journal.set_meta("b", None)
        assert (journal.get_meta("a"), journal.get_meta("b")) == ("two", None)

    @pytest.mark.parametrize("tokens", [[-1], [2**31], [[1, 2]], [0.5]], ids=["negative", "large", "2-D", "float"])
    def test_tokens_that_are_no_ids_are_refused_whole(self, journal: Journal, tokens: list[int]) -> None:
        turn = begin_turn(journal)
        with pytest.raises(ConfigError, match="tokens"):
            journal.commit(turn, tokens)
        assert journal.position == 0

    def test_only_the_newest_turn_takes_tokens(self, journal: Journal) -> None:
        with pytest.raises(ConfigError, match="Begin a turn"):
            journal.commit(0, [1])
        first = begin_turn(journal)
        begin_turn(journal)
        with pytest.raises(ConfigError, match="newest turn"):
            journal.commit(first, [1])

    def test_a_text_or_a_mark_without_tokens_is_refused(self, journal: Journal) -> None:
        turn = begin_turn(journal)
        with pytest.raises(ConfigError, match="no tokens"):
            journal.commit(turn, [], text="lost")
        with pytest.raises(ConfigError, match="no tokens"):
            journal.commit(turn, [], mark=True)
        assert journal.commit(turn, []) == 0

    def test_ranges_outside_the_session_are_refused(self, journal: Journal) -> None:
        journal.commit(begin_turn(journal), [1, 2])
        for start, end in ((0, 3), (-1, 1), (2, 1)):
            with pytest.raises(ConfigError, match=r"\[0, 2\)"):
                journal.tokens(start, end)
        for position in (-1, 3):
            with pytest.raises(ConfigError, match=r"\[0, 2\]"):
                journal.rollback(position, "test")

    def test_metadata_that_is_not_json_is_refused(self, journal: Journal) -> None:
        with pytest.raises(ConfigError, match="JSON"):
            journal.set_meta("a", object())
        with pytest.raises(ConfigError, match="JSON"):
            journal.set_meta("a", float("nan"))

    def test_a_checkpoint_changes_nothing(self, journal: Journal) -> None:
        journal.commit(begin_turn(journal), [1, 2])
        journal.checkpoint()
        assert journal.tokens(0, 2).tolist() == [1, 2]
        assert journal.bytes_on_disk > 0
        journal.verify()

    def test_a_closed_journal_says_so(self, journal: Journal) -> None:
        journal.close()
        journal.close()
        with pytest.raises(StorageError, match="closed"):
            journal.set_meta("a", 1)

    def _with_segments(self, journal: Journal) -> list[SegmentManifest]:
        """8 blocks of tokens; segments of 3, 2 and 1 blocks; 5 of them indexed; snapshots at 4 and 24."""
        journal.commit(begin_turn(journal), list(range(8 * BLOCK_TOKENS)))
        manifests = [pack_segment(make_payloads(first, blocks))[1] for first, blocks in ((0, 3), (3, 2), (5, 1))]
        for manifest in manifests:
            journal.add_segment(manifest)
        journal.set_indexed_through(5, seal="as written")
        journal.add_snapshot(SnapshotRecord(24, "new", 1, "x", 0))
        journal.add_snapshot(SnapshotRecord(4, "old", 1, "x", 0))
        return manifests


class SegmentStoreSuite:
    """What a SegmentStore must do."""

    def open(self, folder: Path) -> SegmentStore:
        """Open the store in `folder`, making it if it is not there."""
        raise NotImplementedError

    @pytest.fixture
    def store(self, tmp_path: Path) -> SegmentStore:
        return self.open(tmp_path / "store")

    def test_a_new_store_is_empty(self, store: SegmentStore) -> None:
        assert store.list() == []
        assert store.clean() == []

    def test_any_range_comes_back(self, store: SegmentStore) -> None:
        data = bytes(range(7))
        store.put("a", memoryview(data))
        assert store.get("a") == data
        assert store.size("a") == 7
        for offset in range(8):
            assert store.get("a", offset) == data[offset:]
            for length in range(8 - offset):
                assert store.get("a", offset, length) == data[offset : offset + length]

    def test_an_empty_file_is_a_file(self, store: SegmentStore) -> None:
        store.put("empty", b"")
        assert store.list() == ["empty"]
        assert store.get("empty") == b""

    def test_put_replaces_whole(self, store: SegmentStore) -> None:
        store.put("a", b"long and old")
        store.put("a", b"new")
        assert store.get("a") == b"new"

    def test_files_are_there_after_reopening(self, store: SegmentStore, tmp_path: Path) -> None:
        store.put("b.safetensors", b"1")
        store.put("a-0_1", b"2")
        again = self.open(tmp_path / "store")
        assert again.list() == ["a-0_1", "b.safetensors"]
        assert again.get("b.safetensors") == b"1"

    def test_delete_is_harmless_twice(self, store: SegmentStore) -> None:
        store.put("a", b"1")
        store.delete("a")
        store.delete("a")
        assert store.list() == []

    def test_a_range_past_the_end_is_damage(self, store: SegmentStore) -> None:
        store.put("a", b"123")
        with pytest.raises(CorruptMemoryError, match=r"truncated.*bytes 1 to 4.*has 3"):
            store.get("a", 1, 3)
        with pytest.raises(CorruptMemoryError, match="truncated"):
            store.get("a", 4)

    def test_a_missing_file_is_damage(self, store: SegmentStore) -> None:
        with pytest.raises(CorruptMemoryError, match=r"gone.*missing"):
            store.get("gone")
        with pytest.raises(CorruptMemoryError, match=r"gone.*missing"):
            store.size("gone")

    @pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\0", "a\n", "ä"])
    def test_a_name_that_is_no_name_is_refused(self, store: SegmentStore, name: str) -> None:
        for call in (store.get, store.delete, store.size, lambda n: store.put(n, b"")):
            with pytest.raises(ConfigError, match="file name"):
                call(name)

    def test_a_negative_range_is_refused(self, store: SegmentStore) -> None:
        store.put("a", b"123")
        with pytest.raises(ConfigError, match="negative"):
            store.get("a", -1)


class IndexSuite:
    """What a MemoryIndex must do. `open` gives an index whose landmarks have the sizes of `layers`."""

    layers = (4, 6)
    # Whether rows are there after closing and opening again.
    durable = True
    pytestmark = pytest.mark.anyio

    async def open(self, folder: Path) -> MemoryIndex:
        raise NotImplementedError

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @asynccontextmanager
    async def opened(self, folder: Path, texts: Sequence[str] = ()) -> AsyncIterator[MemoryIndex]:
        index = await self.open(folder / "index")
        try:
            await index.add(make_rows(texts, layers=self.layers))
            yield index
        finally:
            await index.close()

    async def test_an_empty_index_finds_nothing(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as index:
            assert await index.count() == 0
            assert await index.search_text("word", 5) == []
            assert await index.search_landmarks(0, np.ones(4, np.float32), 5) == []
            assert (await index.rows(0, 10)).num_rows == 0
            await index.drop_from(0)
            await index.compact()

    async def test_the_rarest_word_decides(self, tmp_path: Path) -> None:
        texts = ["the cat sat", "the dog sat", "the Bodiv ran", "the cow sat"]
        async with self.opened(tmp_path, texts) as index:
            hits = await index.search_text("the Bodiv", 2)
            assert hits[0].block == 2
            assert (hits[0].text, hits[0].start, hits[0].end) == ("the Bodiv ran", 8, 12)
            assert hits[0].created_at == 1_002.0
            assert len(hits) == 2
            assert hits[0].score > hits[1].score

    async def test_only_rows_with_a_word_of_the_query_are_found(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path, ["red apple", "green pear", "red plum"]) as index:
            assert {hit.block for hit in await index.search_text("red", 10)} == {0, 2}
            assert await index.search_text("blue", 10) == []

    async def test_case_and_accents_do_not_matter(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path, ["Ein Café in Zürich", "a bar"]) as index:
            assert [hit.block for hit in await index.search_text("CAFE zurich", 3)] == [0]

    @pytest.mark.parametrize(
        "query",
        ['"', "'; DROP TABLE blocks; --", 'plum AND ("', "(((", "plum*", "text:plum", "a\\", "\x00", "%", "^2~ +-!"],
    )
    async def test_odd_characters_are_characters(self, tmp_path: Path, query: str) -> None:
        async with self.opened(tmp_path, ["red plum", "green pear"]) as index:
            found = [hit.block for hit in await index.search_text(query, 5)]
            assert found == ([0] if "plum" in query else [])

    @pytest.mark.parametrize("query", ["", "   ", "\n\t", "?!"])
    async def test_a_query_without_words_finds_nothing(self, tmp_path: Path, query: str) -> None:
        async with self.opened(tmp_path, ["red plum"]) as index:
            assert await index.search_text(query, 5) == []

    async def test_k_bounds_the_hits(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path, ["plum"] * 6) as index:
            assert len(await index.search_text("plum", 4)) == 4
            assert await index.search_text("plum", 0) == []
            assert len(await index.search_landmarks(0, np.ones(4, np.float32), 4)) == 4
            assert await index.search_landmarks(0, np.ones(4, np.float32), 0) == []

    async def test_equal_scores_come_newest_first(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path, ["plum tree"] * 4) as index:
            assert [hit.block for hit in await index.search_text("plum", 4)] == [3, 2, 1, 0]

    async def test_rows_added_later_are_found_at_once_and_after_compaction(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path, ["old plum"]) as index:
            await index.compact()
            await index.add(make_rows(["new pear"], first_block=1, layers=self.layers))
            for _ in range(2):
                assert [hit.block for hit in await index.search_text("pear", 3)] == [1]
                assert [hit.block for hit in await index.search_text("plum", 3)] == [0]
                await index.compact()

    async def test_rows_sent_again_are_harmless(self, tmp_path: Path) -> None:
        texts = ["one", "two", "three"]
        async with self.opened(tmp_path, texts) as index:
            await index.add(make_rows(texts, layers=self.layers))
            both = make_rows(["two", "three", "four"], first_block=1, layers=self.layers)
            await index.add([*both, *both])
            assert await index.count() == 4
            assert (await index.rows(0, 9))["text"].to_pylist() == ["one", "two", "three", "four"]

    async def test_landmark_search_is_exact(self, tmp_path: Path) -> None:
        rows = make_rows(["text"] * 50, layers=self.layers)
        async with self.opened(tmp_path, ["text"] * 50) as index:
            for layer, size in enumerate(self.layers):
                vector = np.random.default_rng(layer).standard_normal(size, dtype=np.float32)
                scores = np.array([float(row.landmarks[layer] @ vector) for row in rows])
                hits = await index.search_landmarks(layer, vector, 5)
                assert [hit.block for hit in hits] == np.argsort(-scores)[:5].tolist()
                assert np.allclose([hit.score for hit in hits], np.sort(scores)[::-1][:5], rtol=1e-5)

    async def test_rows_come_back_as_they_were_sent(self, tmp_path: Path) -> None:
        texts = [f"text {n} \N{SNOWMAN}" for n in range(7)]
        sent = make_rows(texts, layers=self.layers)
        async with self.opened(tmp_path, texts) as index:
            table = await index.rows(2, 5)
            assert table.column_names == [
                *("block", "start", "end", "text", "created_at", "innovation", "digest"),
                *(f"landmark_{layer}" for layer in range(len(self.layers))),
            ]
            for got, row in zip(table.to_pylist(), sent[2:5], strict=True):
                assert (got["block"], got["start"], got["end"]) == (row.block, row.start, row.end)
                assert (got["text"], got["created_at"], got["digest"]) == (row.text, row.created_at, row.digest)
                assert got["innovation"] == row.innovation
                for layer, landmark in enumerate(row.landmarks):
                    assert np.array_equal(np.array(got[f"landmark_{layer}"], np.float32), landmark)

    async def test_dropped_rows_are_gone_and_may_come_again(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path, ["plum", "plum", "plum"]) as index:
            await index.drop_from(1)
            assert await index.count() == 1
            assert [hit.block for hit in await index.search_text("plum", 5)] == [0]
            await index.add(make_rows(["pear", "plum"], first_block=1, layers=self.layers))
            assert (await index.rows(0, 9))["text"].to_pylist() == ["plum", "pear", "plum"]
            assert [hit.block for hit in await index.search_text("pear", 5)] == [1]

    async def test_old_rows_are_passed_over_and_dropped(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path, ["plum", "plum", "plum pear"]) as index:
            for dropped in (False, True):
                assert [hit.block for hit in await index.search_text("plum", 1, first_block=1)] == [1]
                assert await index.search_text("plum", 9, first_block=3) == []
                assert await index.count(1) == 2
                assert await index.count() == (2 if dropped else 3)
                await index.drop_before(1)
            assert (await index.rows(0, 9))["block"].to_pylist() == [1, 2]
            await index.add(make_rows(["plum"], first_block=3, layers=self.layers))
            assert await index.count() == 3

    async def test_compaction_merges_fragments_and_changes_no_row(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as index:
            for block in range(5):
                await index.add(make_rows([f"plum {block}"], first_block=block, layers=self.layers))
            before = await index.rows(0, 9)
            await index.compact()
            assert await index.fragments() == 1
            assert (await index.rows(0, 9)).equals(before)
            assert len(await index.search_text("plum", 9)) == 5

    async def test_rows_are_there_after_reopening(self, tmp_path: Path) -> None:
        if not self.durable:
            pytest.skip("this index keeps nothing on disk")
        async with self.opened(tmp_path, ["red plum", "green pear"]):
            pass
        async with self.opened(tmp_path) as index:
            assert await index.count() == 2
            assert [hit.block for hit in await index.search_text("pear", 3)] == [1]
            await index.add(make_rows(["red plum", "green pear", "blue sky"], layers=self.layers))
            assert await index.count() == 3

    async def test_a_landmark_of_the_wrong_size_is_refused(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as index:
            with pytest.raises(ConfigError, match="block 0 has landmarks"):
                await index.add(make_rows(["text"], layers=(4, 5)))
            with pytest.raises(ConfigError, match="shape"):
                await index.search_landmarks(0, np.ones(5, np.float32), 1)
            with pytest.raises(ConfigError, match="layer is 2"):
                await index.search_landmarks(2, np.ones(4, np.float32), 1)
            assert await index.count() == 0

    async def test_a_closed_index_says_so(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path, ["plum"]) as index:
            await index.close()
            with pytest.raises(StorageError, match="closed"):
                await index.count()
            with pytest.raises(StorageError, match="closed"):
                await index.add(make_rows(["pear"], layers=self.layers))
