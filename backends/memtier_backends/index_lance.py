"""The index of a session in LanceDB: one database, one table, one writer.

Everything in it is derived from the journal and the segments, so the answer to damage is always the same: remove the
folder, and send the rows again. What it returns is checked against each row's digest, because a flipped bit in a data
file is otherwise read in silence.

Every append makes a new version and a fragment, so the writer compacts now and then: fragments are merged, the text
index takes up the rows added since (until then they are searched one by one), and old versions are dropped, or they
would soon be larger than the rows. Dropping them pulls files from under a running search, so searches and writes take
turns.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import FTS
from lancedb.query import MatchQuery
from numpy.typing import NDArray

from memtier.errors import CorruptMemoryError, IncompatibleMemoryError, MemtierError, StorageError, StorageFullError
from memtier_backends.index_schema import (
    HIT_COLUMNS,
    check_rows,
    check_vector,
    landmark_column,
    rows_schema,
    rows_table,
)
from memtier_backends.records import IndexHit, IndexRow, row_digest

__all__ = ["LanceIndex"]

_TABLE = "blocks"
# What a panic of Lance's Rust code becomes, in a call and in a future; classes that no module exports. Damaged bytes
# cause them, and the library works on afterwards.
_PANICS = {"PanicException", "RustPanic"}
# A version is dropped once it is this old. LanceDB warns of zero, for the sake of other writers: there are none.
_VERSION_AGE = timedelta(milliseconds=1)


class LanceIndex:
    """MemoryIndex in a LanceDB folder.

    Words are compared in lower case and without accents, and not stemmed: memory is of any language.
    """

    @classmethod
    async def open(cls, folder: Path, layers: Sequence[int], *, compact_every_adds: int = 64) -> LanceIndex:
        """Open a session's index; one that is not there is made.

        Args:
            folder: the database; made absolute, because LanceDB takes a relative path for the address of its cloud.
            layers: landmark size of each memory layer.
            compact_every_adds: `add` compacts after this many appends.

        Raises:
            IncompatibleMemoryError: it was made for other landmarks.
            CorruptMemoryError: it cannot be opened; remove the folder and send the rows again.
        """
        folder = Path(await anyio.Path(folder).absolute())
        schema = rows_schema(layers)
        async with _told(folder, "open"):
            database = await lancedb.connect_async(str(folder))
            if await anyio.Path(folder, f"{_TABLE}.lance").exists():
                table = await database.open_table(_TABLE)
                found = await table.schema()
            else:
                table = await database.create_table(_TABLE, schema=schema)
                found = schema
            if found.names != schema.names or found.types != schema.types:
                raise IncompatibleMemoryError(
                    f"the index {folder} has columns {_columns(found)}; {_columns(schema)} were expected. It was made "
                    "for another model or memory config: open the session with that one, or remove the folder."
                )
            if not await table.list_indices():
                await table.create_index("text", config=_text_index())
            index = cls(folder, tuple(layers), database, table, compact_every_adds)
            index._last_block = await index._read_last_block()
        return index

    def __init__(
        self,
        folder: Path,
        layers: tuple[int, ...],
        database: lancedb.AsyncConnection,
        table: lancedb.AsyncTable,
        compact_every_adds: int,
    ) -> None:
        """Use `open`."""
        self.folder = folder
        self._layers = layers
        self._schema = rows_schema(layers)
        self._database = database
        self._table = table
        self._compact_every_adds = compact_every_adds
        self._adds = 0
        self._closed = False
        # The highest block that may be in the table: rows beyond it are new, rows up to it are looked up.
        self._last_block = -1
        self._lock = anyio.Lock()

    async def add(self, rows: Sequence[IndexRow]) -> None:
        check_rows(rows, self._layers)
        if not rows:
            return
        async with self._writing("add rows"):
            unique: dict[int, IndexRow] = {}
            for row in rows:
                unique.setdefault(row.block, row)
            for block in await self._known(list(unique)):
                del unique[block]
            if unique:
                # Before the append: if it fails half-way, the rows that are sent again are looked up.
                self._last_block = max(self._last_block, *unique)
                await self._table.add(rows_table(list(unique.values()), self._schema))
                self._adds += 1
            if self._adds >= self._compact_every_adds:
                await self._compact()

    async def search_text(self, query: str, k: int, *, first_block: int = 0) -> list[IndexHit]:
        if k <= 0 or not query.strip():
            return []
        async with self._turn("search the text"):
            # MatchQuery takes words, not a query language: quotes and operators are characters like others.
            words = MatchQuery(query, "text")  # pyright: ignore[reportCallIssue]  (its defaults are pydantic fields)
            search = self._table.query().nearest_to_text(words)
            if first_block:
                search = search.where(f"block >= {int(first_block)}")
            found = await search.select([*HIT_COLUMNS, "_score"]).limit(k).to_list()
        return self._best([(row, row["_score"]) for row in found], k)

    async def search_landmarks(self, layer: int, vector: NDArray[np.float32], k: int) -> list[IndexHit]:
        check_vector(layer, vector, self._layers)
        if k <= 0:
            return []
        column = landmark_column(layer)
        async with self._turn("search landmarks"):
            search = self._table.query().nearest_to(np.asarray(vector, np.float32)).column(column)
            search = search.distance_type("dot").bypass_vector_index()
            found = await search.select([*HIT_COLUMNS, column, "_distance"]).limit(k).to_list()
        # Computed again: the distance is 1 - score, which rounds small scores away.
        return self._best([(row, float(np.asarray(row[column], np.float32) @ vector)) for row in found], k)

    async def count(self, first_block: int = 0) -> int:
        async with self._turn("count"):
            return await self._table.count_rows(f"block >= {int(first_block)}" if first_block else None)

    async def rows(self, start_block: int, end_block: int) -> pa.Table:
        async with self._turn("read rows"):
            chosen = self._table.query().where(f"block >= {int(start_block)} AND block < {int(end_block)}")
            table = await chosen.select(self._schema.names).to_arrow()
        for row in table.select(HIT_COLUMNS).to_pylist():
            self._check(row)
        return table.sort_by("block")

    async def drop_from(self, block: int) -> None:
        async with self._writing("drop rows"):
            await self._table.delete(f"block >= {int(block)}")
            self._last_block = await self._read_last_block()

    async def drop_before(self, block: int) -> None:
        async with self._writing("drop rows"):
            await self._table.delete(f"block < {int(block)}")

    async def compact(self) -> None:
        async with self._writing("compact"):
            await self._compact()

    async def fragments(self) -> int:
        async with self._turn("count fragments"):
            stats: Any = await self._table.stats()
        # A dict, though its type says otherwise.
        return stats["fragment_stats"]["num_fragments"]

    async def close(self) -> None:
        """Close; harmless when closed already."""
        async with self._lock:
            self._closed = True
            self._table.close()
            self._database.close()

    @asynccontextmanager
    async def _turn(self, action: str) -> AsyncIterator[None]:
        async with self._lock:
            if self._closed:
                raise StorageError(f"cannot {action}: the index {self.folder} is closed; open it again.")
            async with _told(self.folder, action):
                yield

    @asynccontextmanager
    async def _writing(self, action: str) -> AsyncIterator[None]:
        """A write once begun is finished: LanceDB would go on with it in a thread of its own."""
        async with self._turn(action):
            with anyio.CancelScope(shield=True):
                yield

    async def _compact(self) -> None:
        await self._table.optimize(cleanup_older_than=_VERSION_AGE, delete_unverified=True)
        # Merging itself leaves versions behind, down to the fragments it merged; only the newest is of use.
        await self._table.optimize(cleanup_older_than=_VERSION_AGE, delete_unverified=True)
        self._adds = 0

    async def _known(self, blocks: list[int]) -> list[int]:
        """Which of these blocks the table has."""
        old = [block for block in blocks if block <= self._last_block]
        if not old:
            return []
        chosen = self._table.query().where(f"block IN ({', '.join(map(str, old))})").select(["block"])
        return (await chosen.to_arrow())["block"].to_pylist()

    async def _read_last_block(self) -> int:
        blocks = (await self._table.query().select(["block"]).to_arrow())["block"]
        return int(np.max(blocks.to_numpy())) if len(blocks) else -1

    def _best(self, scored: list[tuple[dict[str, Any], float]], k: int) -> list[IndexHit]:
        hits: list[IndexHit] = []
        for row, score in scored:
            self._check(row)
            hits.append(IndexHit(row["block"], row["start"], row["end"], row["text"], float(score), row["created_at"]))
        return sorted(hits, key=lambda hit: (-hit.score, -hit.block))[:k]

    def _check(self, row: Mapping[str, Any]) -> None:
        if row_digest(row["block"], row["start"], row["end"], row["text"], row["created_at"]) != row["digest"]:
            raise CorruptMemoryError(
                f"row {row['block']} of the index {self.folder} is damaged. {_advice(self.folder)}"
            )


def _text_index() -> FTS:
    return FTS(with_position=False, stem=False, remove_stop_words=False, lower_case=True, ascii_folding=True)


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)


def _advice(folder: Path) -> str:
    return (
        f"The index is derived and nothing is lost with it: remove the folder {folder}, and it is made again when the "
        "session is opened next."
    )


@asynccontextmanager
async def _told(folder: Path, action: str) -> AsyncIterator[None]:
    """Tell LanceDB's errors as ours. It raises RuntimeError, OSError and ValueError alike, and its Rust code panics."""
    try:
        yield
    except MemtierError:
        raise
    except (RuntimeError, OSError, ValueError, pa.ArrowException) as error:
        raise _storage_error(folder, action, error) from error
    except BaseException as error:
        if type(error).__name__ not in _PANICS:
            raise
        raise _storage_error(folder, action, error) from error


def _storage_error(folder: Path, action: str, error: BaseException) -> StorageError:
    told = str(error)
    first_line = told.splitlines()[0] if told else type(error).__name__
    if "No space left" in told or "os error 28" in told or "Disk quota exceeded" in told:
        return StorageFullError(
            f"cannot {action} in the index {folder}: no space is left. Nothing acknowledged is lost; free some space "
            "and call again."
        )
    if "Permission denied" in told or "Too many open files" in told or "Read-only file system" in told:
        return StorageError(f"cannot {action} in the index {folder}: {first_line}. Mend that and call again.")
    return CorruptMemoryError(f"cannot {action} in the index {folder}: {first_line}. {_advice(folder)}")
