"""Which neighbouring segments one should stand for: a session that is flushed after every few tokens collects files.

A segment never reaches over a cut (the position of a snapshot), merged or not. Before the last cut nothing is added any
more, and neighbours are merged at once; after it only when several have come together, so that each block is written
again a few times at most.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from memtier_backends.base import SegmentStore
from memtier_backends.records import SegmentManifest
from memtier_backends.segments import pack_segment, read_payloads

__all__ = ["merged", "next_merge"]


def next_merge(
    manifests: Sequence[SegmentManifest], cuts: Collection[int], *, most_blocks: int, patience: int
) -> list[SegmentManifest]:
    """The oldest neighbours that should be one segment; none if there is nothing to merge.

    Args:
        manifests: of all segments, in order.
        cuts: blocks that a segment may begin with and must not reach over.
        most_blocks: the largest segment.
        patience: so many that could be merged after the last cut may wait.
    """
    groups: list[list[SegmentManifest]] = []
    for manifest in manifests:
        if (
            groups
            and manifest.first_block not in cuts
            and manifest.end_block - groups[-1][0].first_block <= most_blocks
        ):
            groups[-1].append(manifest)
        else:
            groups.append([manifest])
    several = [group for group in groups if len(group) > 1]
    last_cut = max(cuts, default=0)
    closed = [group for group in several if group[0].first_block < last_cut]
    if closed:
        return closed[0]
    return several[0] if sum(map(len, several)) >= patience else []


def merged(store: SegmentStore, manifests: Sequence[SegmentManifest]) -> tuple[bytes, SegmentManifest]:
    """One segment with the blocks of neighbours, each checked. Raises CorruptMemoryError if one is damaged."""
    return pack_segment([payload for manifest in manifests for payload in read_payloads(store, manifest)])
