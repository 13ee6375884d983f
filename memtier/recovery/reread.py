"""Giving a session to another model: its journal is written again in that model's tokens, what was derived goes.

What is read then is the text of each turn; where both models have the same tokenizer, the very tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from memtier.blocks import MemorySettings
from memtier.errors import IncompatibleMemoryError
from memtier.folder import EDITION, META, WEIGHTS, Backends, all_values, check_owner, written_by
from memtier.recovery.forget import open_copy, resume
from memtier.tiers.weights import WeightsTier
from memtier_backends.base import Journal
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths
from memtier_backends.records import TurnRecord

__all__ = ["reread"]

COMMIT_TOKENS = 512


def reread(
    folder: Path, siblings: Sequence[Path], backends: Backends, identity: dict[str, str], weights: WeightsTier,
    settings: MemorySettings,
) -> bool:  # fmt: skip
    """Make a session's journal one that this model can read, in one transaction. Returns whether it had to be.

    Turns keep their numbers and the session its lineage, so that forks are still known as such.

    Args:
        folder: the session's.
        siblings: folders of its tenant's sessions; a forget that was cut off goes on in forks, too.
        backends: what it is made of.
        identity: whose it must be.
        weights, settings: who is to read it.

    Raises:
        SessionBusyError: someone has it open, or a fork that a forget which was cut off must go on in.
        IncompatibleMemoryError: another tokenizer, and a turn whose text is not known; nothing was changed.
    """
    if not SessionPaths(folder).journal.exists():
        return False
    session = open_copy(folder, backends)
    try:
        meta = session.journal.get_meta(META)
        if meta is None:
            return False
        try:
            check_owner(session.journal, identity, weights, settings)
        except IncompatibleMemoryError:
            if any(meta[name] != value for name, value in identity.items()):
                raise
        else:
            return False
        # the copy says nothing of what is still to be forgotten
        resume(session, siblings)
        partial = session.paths.partial()
        partial.mkdir()
        copy = SqliteJournal.open(partial / "journal.sqlite3", scratch=True)
        try:
            about = {"reread_from": meta["model"]["name"], **written_by(weights, settings)}
            copy.set_meta(META, {**meta, **about})
            copy.set_meta(WEIGHTS, all_values(weights))
            copy.set_meta(EDITION, uuid4().hex)
            _fill(copy, session.journal, meta, weights, settings)
        finally:
            copy.close()
        session.drop_index()
        session.journal.replace_with(partial / "journal.sqlite3")
        session.clean()
    finally:
        session.close()
    return True


def _fill(
    copy: SqliteJournal, journal: Journal, meta: dict[str, Any], weights: WeightsTier, settings: MemorySettings
) -> None:
    codec = weights.codec
    began, begins = [0], [0]
    same_tokens = meta["model"]["tokenizer"] == weights.fingerprint["tokenizer"]
    for turn in journal.turns():
        marks = journal.marks(turn.start, turn.end)
        if same_tokens:
            tokens = journal.tokens(turn.start, turn.end)
        else:
            tokens = codec.encode(_text(turn, meta["model"]["name"]))
            # a mark stands at the last token of what was asked
            marks = [turn.start + tokens.size - 1] if turn.end - 1 in marks else []
            if copy.position == 0 and codec.bos_token_id is not None:
                tokens = np.concatenate([np.array([codec.bos_token_id], np.int32), tokens])
                marks = [mark + 1 for mark in marks]
        if tokens.size:
            # in another model's tokens: what was dropped then, up to the turn that it reached into
            retained_from = turn.retained_from if same_tokens else begins[bisect_right(began, turn.retained_from) - 1]
            began.append(turn.start)
            begins.append(copy.position)
            number = copy.begin_turn(
                role=turn.role, source=turn.source, metadata=turn.metadata, created_at=turn.created_at,
                retrieval=turn.retrieval, span_blocks=settings.span_blocks, retained_from=retained_from,
                turn=turn.turn,
                # counted in tokens, which are others for another tokenizer
                forgotten=turn.forgotten if same_tokens else (),
            )  # fmt: skip
            _commit(copy, number, tokens, turn.text, {mark - turn.start for mark in marks})


def _commit(copy: SqliteJournal, number: int, tokens: NDArray[np.int32], text: str | None, marks: set[int]) -> None:
    edges = sorted({*range(COMMIT_TOKENS, tokens.size, COMMIT_TOKENS), *(mark + 1 for mark in marks), tokens.size})
    start = 0
    for end in edges:
        last = end == tokens.size
        copy.commit(number, tokens[start:end], text=text if last else None, mark=end - 1 in marks)
        start = end


def _text(turn: TurnRecord, model: str) -> str:
    if turn.text is None:
        raise IncompatibleMemoryError(
            f"turn {turn.turn} ({turn.role}, tokens {turn.start} to {turn.end}) cannot be read by another model: its "
            f"text is not known, for it was given as token ids or was cut off, and the tokenizers differ. Forget that "
            f"turn under {model!r} first, or use a model with that tokenizer."
        )
    return turn.text
