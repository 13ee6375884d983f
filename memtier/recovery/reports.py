"""What memtier tells of what is done to sessions on disk: checkpoints, forgetting and its proof, damage."""

from __future__ import annotations

from memtier.reports import Report

__all__ = ["CheckpointInfo", "ErasureProof", "Finding", "ForgetReport", "SessionHealth"]


class CheckpointInfo(Report):
    """A moment of a session that was kept under a name: its `position`, and when it was kept."""

    name: str
    position: int
    created_at: float


class ErasureProof(Report):
    """What scans of the raw files found of a forgotten span, before and after.

    `proven` only if everything that was looked for was found before, in its class of file, and nothing of it after in
    any file; else `reasons` say why not. `looked_for` and `found_before` count pieces by class of file and kind;
    `remains` are files that still hold one.
    """

    proven: bool
    reasons: tuple[str, ...]
    looked_for: dict[str, dict[str, int]]
    found_before: dict[str, dict[str, int]]
    remains: tuple[str, ...]
    files: int
    bytes: int


class ForgetReport(Report):
    """What was forgotten: the tokens [start, end), as they were numbered before.

    `forks` and `checkpoints` held some of it and forgot it too; `still_held_by` are forks that were left alone.
    `also_at` are ranges, as numbered now, that repeat parts of it: quotations, which stay. The session was read again
    from token `restored_from` on. What nobody could look into may hold some of it: `unreadable` are folders of damaged
    sessions, `put_aside` files that `memtier doctor` moved to a quarantine.
    """

    start: int
    end: int
    tokens: int
    position: int
    restored_from: int
    replayed_tokens: int
    forks: tuple[str, ...]
    checkpoints: tuple[str, ...]
    still_held_by: tuple[str, ...]
    also_at: tuple[tuple[int, int], ...]
    unreadable: tuple[str, ...]
    put_aside: tuple[str, ...]
    proof: ErasureProof | None
    seconds: float


class Finding(Report):
    """Something that is not as it was written: what it is, and what is wrong with it.

    `mended`: it was put right, or put aside, where that was asked for. `harmless`: nothing has to be done.
    """

    what: str
    problem: str
    mended: bool
    harmless: bool = False


class SessionHealth(Report):
    """What a look at a session's files found. `healthy` if every finding was mended or does no harm."""

    id: str | None
    folder: str
    position: int
    healthy: bool
    findings: tuple[Finding, ...]
