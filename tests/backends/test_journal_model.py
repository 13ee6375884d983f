"""Whatever is committed, taken back and reopened in whatever order, the journal says what a plain list would."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.testing import begin_turn


@dataclass
class Piece:
    """Tokens that one text stands for, or is to stand for."""

    start: int
    end: int
    text: str | None


@dataclass
class Turn:
    number: int
    pieces: list[Piece] = field(default_factory=list)
    # Tokens since the last text, and whether it is known where their piece began.
    open_start: int = 0


class JournalMachine(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "journal.sqlite3"
        self.journal = SqliteJournal.open(self.path)
        self.tokens: list[int] = []
        self.owners: list[int] = []
        self.marks: list[int] = []
        self.turns: list[Turn] = []

    def teardown(self) -> None:
        self.journal.verify()
        self.journal.close()
        self.folder.cleanup()

    @rule()
    def begin(self) -> None:
        self.turns.append(Turn(begin_turn(self.journal), open_start=len(self.tokens)))

    @precondition(lambda self: self.turns)
    @rule(
        ids=st.lists(st.integers(0, 2**31 - 1), max_size=5),
        text=st.one_of(st.none(), st.text(max_size=3)),
        mark=st.booleans(),
    )
    def commit(self, ids: list[int], text: str | None, mark: bool) -> None:
        turn = self.turns[-1]
        end = len(self.tokens) + len(ids)
        if end == turn.open_start:
            text = None
        self.journal.commit(turn.number, ids, text=text, mark=mark and bool(ids))
        self.tokens += ids
        self.owners += [turn.number] * len(ids)
        if mark and ids:
            self.marks.append(end - 1)
        if text is not None:
            turn.pieces.append(Piece(turn.open_start, end, text))
            turn.open_start = end

    @rule(share=st.floats(0, 1))
    def rollback(self, share: float) -> None:
        position = round(share * len(self.tokens))
        self.journal.rollback(position, "test")
        del self.tokens[position:], self.owners[position:]
        self.marks = [mark for mark in self.marks if mark < position]
        for turn in self.turns:
            turn.pieces = [piece for piece in turn.pieces if piece.end <= position]
        if self.turns:
            self.turns[-1].open_start = position

    @precondition(lambda self: self.tokens)
    @rule(bounds=st.tuples(st.floats(0, 1), st.floats(0, 1)))
    def forget(self, bounds: tuple[float, float]) -> None:
        start = min(round(min(bounds) * len(self.tokens)), len(self.tokens) - 1)
        end = max(start + 1, round(max(bounds) * len(self.tokens)))
        self.journal.forget(start, end, derived_to=0, meta={"forgotten": [start, end]})
        assert self.journal.get_meta("forgotten") == [start, end]
        del self.tokens[start:end], self.owners[start:end]

        def moved(position: int) -> int:
            return min(position, start) if position < end else position - (end - start)

        self.marks = [moved(mark) for mark in self.marks if not start <= mark < end]
        for turn in self.turns:
            whole = [piece for piece in turn.pieces if piece.end <= start or piece.start >= end]
            turn.pieces = [Piece(moved(p.start), moved(p.end), p.text) for p in whole]
        if self.turns:
            self.turns[-1].open_start = len(self.tokens)

    @rule(share=st.floats(0, 1))
    def copy_and_return(self, share: float) -> None:
        copy = Path(self.folder.name) / "copy.sqlite3"
        self.journal.copy_to(copy)
        if self.turns:
            self.journal.rollback(round(share * len(self.tokens)), "lost by going back")
        self.journal.replace_with(copy)
        copy.unlink()
        if self.turns:
            self.turns[-1].open_start = len(self.tokens)

    @rule()
    def reopen(self) -> None:
        self.journal.close()
        self.journal = SqliteJournal.open(self.path)
        if self.turns:
            self.turns[-1].open_start = len(self.tokens)

    @rule()
    def reopen_after_a_crash(self) -> None:
        # A killed process leaves its write-ahead log as it is: a second connection reads what the first never closed.
        again = SqliteJournal.open(self.path)
        self.journal._rows.connection.close()
        self.journal = again
        if self.turns:
            self.turns[-1].open_start = len(self.tokens)

    @rule()
    def checkpoint(self) -> None:
        self.journal.checkpoint()

    @invariant()
    def tokens_and_marks_agree(self) -> None:
        n = len(self.tokens)
        assert self.journal.position == n
        assert self.journal.tokens(0, n).tolist() == self.tokens
        assert self.journal.tokens(n // 3, n - n // 3).tolist() == self.tokens[n // 3 : n - n // 3]
        assert self.journal.marks(0, n) == self.marks

    @invariant()
    def turns_agree(self) -> None:
        listed = self.journal.turns()
        assert [t.turn for t in listed] == sorted(set(self.owners))
        for record in listed:
            owned = np.flatnonzero(np.array(self.owners) == record.turn)
            assert (record.start, record.end) == (owned[0], owned[-1] + 1)
            assert record.text == self._text(record.turn, record.start, record.end)

    def _text(self, number: int, start: int, end: int) -> str | None:
        (turn,) = [t for t in self.turns if t.number == number]
        edges = [start, *(piece.end for piece in turn.pieces)]
        covered = edges[:-1] == [piece.start for piece in turn.pieces] and edges[-1] == end
        return "".join(piece.text or "" for piece in turn.pieces) if covered else None


# each run looks at something new; a failure prints how to repeat it
TestJournalModel = JournalMachine.TestCase
TestJournalModel.settings = settings(max_examples=25, stateful_step_count=25, derandomize=False, deadline=None)
