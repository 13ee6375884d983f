"""What a journal knows of what is derived from its tokens: manifests of segments, snapshots, how far the index goes.

Segments hold the blocks from `first_block` on: older ones may have been dropped. Transactions are the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from memtier.errors import ConfigError
from memtier_backends.journal_rows import JournalRows
from memtier_backends.records import SegmentManifest, SnapshotRecord

__all__ = ["DerivedRecords"]

FIRST_BLOCK = "first_block"
INDEX_SEAL = "index_seal"


class DerivedRecords:
    """Records of segments and snapshots.

    Manifests are long and many: once read and checked they are kept, where nobody else writes to the file (`alone`).
    """

    def __init__(self, rows: JournalRows, *, alone: bool) -> None:
        self._rows = rows
        self._alone = alone
        self._manifests: list[SegmentManifest] | None = None

    # -- segments

    @property
    def first_block(self) -> int:
        found = self._rows.records("meta", FIRST_BLOCK)
        return found[0] if found else 0

    @property
    def next_block(self) -> int:
        """The block that the next segment begins with."""
        newest = self._rows.records("segment", newest_only=True)
        return SegmentManifest.from_json(newest[0]).end_block if newest else self.first_block

    def segments(self) -> list[SegmentManifest]:
        if self._manifests is not None:
            return list(self._manifests)
        manifests = [SegmentManifest.from_json(plain) for plain in self._rows.records("segment")]
        next_block = self.first_block
        for manifest in manifests:
            if manifest.first_block != next_block:
                self._rows.corrupt(f"the record of the segment with block {next_block} is missing")
            next_block = manifest.end_block
        if self._alone:
            self._manifests = list(manifests)
        return manifests

    def begin_with(self, block: int) -> None:
        if self._rows.records("segment", newest_only=True):
            raise ConfigError(f"segments cannot begin with block {block}: there are some already.")
        self._set_first_block(block)

    def add_segment(self, manifest: SegmentManifest) -> None:
        newest = self._rows.records("segment", newest_only=True)
        if newest and newest[0]["name"] == manifest.name:
            return
        position = self._rows.head().position
        next_block = SegmentManifest.from_json(newest[0]).end_block if newest else self.first_block
        if manifest.first_block != next_block or manifest.end > position:
            raise ConfigError(
                f"segment {manifest.name} holds blocks from {manifest.first_block} on and tokens up to "
                f"{manifest.end}; block {next_block} comes next, and the session has {position} tokens."
            )
        self._rows.put_record("segment", manifest.name, manifest.first_block, manifest.to_json())
        if self._manifests is not None:
            self._manifests.append(manifest)

    def merge_segments(self, manifest: SegmentManifest) -> list[str]:
        inside = [m for m in self.segments() if manifest.first_block <= m.first_block < manifest.end_block]
        if [m.name for m in inside] == [manifest.name]:
            return []
        if not inside or (inside[0].first_block, inside[-1].end_block) != (manifest.first_block, manifest.end_block):
            raise ConfigError(
                f"segment {manifest.name} holds blocks [{manifest.first_block}, {manifest.end_block}); it can only "
                f"stand for segments that hold just these."
            )
        self._put_in_place_of(inside, manifest)
        return [m.name for m in inside]

    # -- snapshots

    def add_snapshot(self, record: SnapshotRecord) -> None:
        position = self._rows.head().position
        if not 0 <= record.position <= position:
            raise ConfigError(
                f"snapshot {record.name} is of position {record.position}; it must be in [0, {position}]."
            )
        self._rows.put_record("snapshot", record.name, record.position, asdict(record))

    def snapshots(self) -> list[SnapshotRecord]:
        return [SnapshotRecord(**plain) for plain in self._rows.records("snapshot")]

    def drop_snapshot(self, name: str) -> None:
        self._rows.execute("DELETE FROM records WHERE kind = 'snapshot' AND name = ?", (name,))

    # -- the index

    @property
    def index_seal(self) -> str:
        found = self._rows.records("meta", INDEX_SEAL)
        return found[0] if found else ""

    def set_indexed_through(self, blocks: int, seal: str) -> None:
        stored = self.next_block
        if not 0 <= blocks <= stored:
            raise ConfigError(f"the index mark is {blocks}; it must be in [0, {stored}], the blocks in segments.")
        self._rows.put_head(replace(self._rows.head(), indexed_through=int(blocks)))
        self._rows.put_record("meta", INDEX_SEAL, 0, seal)

    # -- dropping

    def drop_before(self, block: int) -> list[str]:
        old = [m for m in self.segments() if m.end_block <= block]
        if not old:
            return []
        first_block = old[-1].end_block
        useless = [record.name for record in self.snapshots() if record.first_block < first_block]
        self._put_in_place_of(old)
        for name in useless:
            self.drop_snapshot(name)
        self._set_first_block(first_block)
        return [m.name for m in old] + useless

    def drop_after(self, position: int) -> None:
        self._rows.execute("DELETE FROM records WHERE kind = 'snapshot' AND rank > ?", (position,))
        kept = self.first_block
        known = self.segments()
        standing = [m for m in known if m.end <= position]
        if standing:
            kept = standing[-1].end_block
        if self.first_block and not self.snapshots():
            # what was dropped can only be made again from the first token on, and all that followed with it
            standing, kept = [], 0
            self._set_first_block(0)
        self._put_in_place_of(known[len(standing) :])
        head = self._rows.head()
        if head.indexed_through > kept:
            self._rows.put_head(replace(head, indexed_through=kept))

    def forget_what_was_read(self) -> None:
        """A transaction was undone, or the file was replaced: read again."""
        self._manifests = None

    def _put_in_place_of(self, old: Sequence[SegmentManifest], new: SegmentManifest | None = None) -> None:
        """Of neighbours one, or none."""
        if not old:
            return
        at = self.segments().index(old[0])
        for manifest in old:
            self._rows.execute("DELETE FROM records WHERE kind = 'segment' AND name = ?", (manifest.name,))
        if new is not None:
            self._rows.put_record("segment", new.name, new.first_block, new.to_json())
        if self._manifests is not None:
            self._manifests[at : at + len(old)] = [] if new is None else [new]

    def _set_first_block(self, block: int) -> None:
        self._rows.put_record("meta", FIRST_BLOCK, 0, int(block))
