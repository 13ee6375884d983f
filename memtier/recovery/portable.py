"""One session as one file, to be moved: tokens, turns, blocks and snapshots, each part with its hash; no pickle.

    8 bytes   "memtier\\0"
    4 bytes   format, little endian
    8 bytes   length of the header, little endian
    16 bytes  BLAKE2b of the header
    header    JSON: what the parts are, whose model wrote them, the turns with their numbers (those of turns that were
              forgotten are missing) and what was forgotten of each
    parts     one after another: token ids as int32, then segments, then snapshots

Whoever made a file may have meant harm. Its header is read into a strict schema; sizes must add up to the file's before
anything is read by them; names on disk are never taken from it; a segment must be, byte for byte, what packing its own
blocks gives; the journal is written anew from the turns. A hash says that a file is whole, not who made it.
"""

from __future__ import annotations

import os
import shutil
import stat
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, Literal
from uuid import uuid4

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memtier.blocks import MemorySettings
from memtier.cache import TieredCache
from memtier.config import MOST_SPAN_BLOCKS
from memtier.errors import CorruptMemoryError, IncompatibleMemoryError, MemtierError, SessionError, StorageError
from memtier.folder import EDITION, META, WEIGHTS, SessionFolder, check_writer
from memtier.folder import FORMAT as SESSION_FORMAT
from memtier.tiers.fingerprint import DTYPES
from memtier.tiers.state import unpack_snapshot
from memtier.tiers.weights import WeightsTier
from memtier_backends.files import NO_LINKS, TEMPORARY_SUFFIX, flush, flush_folder, storage_errors
from memtier_backends.journal_sqlite import SqliteJournal
from memtier_backends.layout import SessionPaths, check_never_begun
from memtier_backends.lock import SessionLock
from memtier_backends.records import DIGEST_BYTES, SnapshotRecord
from memtier_backends.segment_store import FileSegmentStore
from memtier_backends.segments import parse_segment
from memtier_backends.tensors import content_hash

__all__ = ["export_session", "exported_id", "import_session"]

MAGIC = b"memtier\0"
FORMAT = 1
PREFIX = len(MAGIC) + 4 + 8 + DIGEST_BYTES
COMMIT_TOKENS = 512
MOST_HEADER_BYTES = 2**30
MOST_PART_BYTES = 2**33
"""More than any session holds in one piece: a file may claim any size, and be full of holes."""

Count = Field(ge=0, le=2**53)
Time = Field(ge=0, lt=2**37, allow_inf_nan=False)
"""Unix time, in years that a calendar can show."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Part(_Strict):
    kind: Literal["tokens", "segment", "snapshot"]
    size: int = Field(ge=0, le=MOST_PART_BYTES)
    hash: str = Field(pattern=rf"^[0-9a-f]{{{2 * DIGEST_BYTES}}}$")
    position: int = Count  # of a snapshot
    blocks: int = Count  # that a snapshot needs, but for those before the next field
    first_block: int = Field(default=0, ge=0, le=2**53)


class _Turn(_Strict):
    number: int = Count
    role: str = Field(min_length=1)
    source: str | None
    metadata: dict[str, Any]
    created_at: float = Time
    retrieval: Literal["on", "off", "random", "recent"]
    span_blocks: int = Field(ge=0, le=MOST_SPAN_BLOCKS)
    forgotten: list[tuple[int, int]] = []
    end: int = Count
    text: str | None
    retained_from: int = Field(default=0, ge=0, le=2**53)


class _Weights(_Strict):
    dtype: str
    hashes: dict[str, str]


class _Header(_Strict):
    id: str = Field(min_length=1)
    created_at: float = Time
    edition: str
    model: dict[str, str]
    memory: dict[str, Any]
    weights: _Weights | None = None
    turns: list[_Turn]
    marks: list[int]
    parts: list[_Part] = Field(min_length=1)


def export_session(session: SessionFolder, path: Path) -> None:
    """Write a session to a new file, which appears whole. All that it wrote so far must be on disk.

    Raises:
        SessionError: there is such a file.
        StorageError: it cannot be written, or a part of the session cannot be read.
    """
    exists = SessionError(f"{path} exists; an export never overwrites. Choose another name, or remove that file.")
    header, tokens = _header_of(session)
    encoded = header.model_dump_json().encode()
    if len(encoded) > MOST_HEADER_BYTES:
        raise StorageError(
            f"the turns of the session take {len(encoded)} bytes; an exported file holds {MOST_HEADER_BYTES} of them. "
            "Close the session and copy the whole store instead."
        )
    with storage_errors(f"export the session to {path}"):
        if path.exists():
            raise exists
        temporary = path.with_name(f".export.{uuid4().hex}{TEMPORARY_SUFFIX}")
        try:
            with temporary.open("xb") as file:
                prefix = MAGIC + FORMAT.to_bytes(4, "little") + len(encoded).to_bytes(8, "little")
                file.write(prefix + _digest(encoded) + encoded + tokens)
                for store, record in _files(session):
                    data = store.get(record.name)
                    if content_hash(data) != record.hash:
                        raise CorruptMemoryError(f"{record.name} is damaged. Run: memtier doctor --rebuild")
                    file.write(data)
                file.flush()
                flush(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise exists from None
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                try:
                    path.open("xb").close()  # the name is ours from here on
                except FileExistsError:
                    raise exists from None
                os.replace(temporary, path)
            temporary.unlink(missing_ok=True)
            flush_folder(path.absolute().parent)
        finally:
            temporary.unlink(missing_ok=True)


def import_session(
    path: Path, folder: Path, identity: dict[str, str], weights: WeightsTier, settings: MemorySettings
) -> None:
    """Make a session of an exported file, in the folder of one that is not there yet, aside and then put in place.

    Raises:
        SessionError: there is such a session, or no such file.
        IncompatibleMemoryError: another model, other sizes or another format; names the field.
        CorruptMemoryError: the file is not as it was written, or the folder holds what is left of another session.
    """
    where = f"the exported session {path}"
    with _opened(path) as file:
        header = _read_header(file, where)
        meta = {
            "format": SESSION_FORMAT,
            "created_at": header.created_at,
            "lineage": uuid4().hex,
            "model": header.model,
        }
        meta |= {"memory": header.memory, **identity}
        if "name" not in header.model:
            raise CorruptMemoryError(f"{where} does not say which model wrote it.")
        try:
            check_writer(meta, weights, settings, where)
        except MemtierError:
            raise
        except (KeyError, ValueError, TypeError) as error:
            raise CorruptMemoryError(f"{where} does not say which model wrote it: {error!r}.") from error
        with SessionLock.acquire(folder):
            paths = SessionPaths(folder)
            if paths.journal.exists():
                raise SessionError(
                    f"session {identity['id']!r} exists already. Give another id, or delete that session first."
                )
            check_never_begun(folder)
            aside = SessionPaths(paths.partial())
            try:
                aside.folder.mkdir()
                _fill(file, header, meta, aside, where, weights, settings)
                _put_in_place(aside, paths)
            except MemoryError as error:
                shutil.rmtree(folder, ignore_errors=True)
                raise CorruptMemoryError(f"{where} has a part that is larger than this machine's memory.") from error
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(aside.folder)


def exported_id(path: Path) -> str:
    """The id that the session of an exported file had. Raises as `import_session`."""
    with _opened(path) as file:
        return _read_header(file, f"the exported session {path}").id


def _header_of(session: SessionFolder) -> tuple[_Header, bytes]:
    journal = session.journal
    meta, position = journal.get_meta(META), journal.position
    tokens = journal.tokens(0, position).astype("<i4").tobytes()
    snapshots = journal.snapshots()
    if max([len(tokens), *(record.size for record in [*journal.segments(), *snapshots])]) > MOST_PART_BYTES:
        raise StorageError(
            f"a part of the session has more than {MOST_PART_BYTES} bytes, which no exported file holds."
        )
    parts = [_Part(kind="tokens", size=len(tokens), hash=content_hash(tokens), position=0, blocks=0)]
    parts += [_Part(kind="segment", size=m.size, hash=m.hash, position=0, blocks=0) for m in journal.segments()]
    parts += [
        _Part(
            kind="snapshot", size=s.size, hash=s.hash, position=s.position, blocks=s.blocks, first_block=s.first_block
        )
        for s in snapshots
    ]
    turns = [
        _Turn(
            number=turn.turn, role=turn.role, source=turn.source, metadata=turn.metadata, created_at=turn.created_at,
            retrieval=turn.retrieval,  # pyright: ignore[reportArgumentType]  checked when the turn began
            span_blocks=turn.span_blocks, forgotten=list(turn.forgotten), end=turn.end, text=turn.text,
            retained_from=turn.retained_from,
        )
        for turn in journal.turns()
    ]  # fmt: skip
    header = _Header(
        id=meta["id"], created_at=meta["created_at"], edition=session.edition,
        model=meta["model"], memory=meta["memory"], weights=journal.get_meta(WEIGHTS),
        turns=turns, marks=journal.marks(0, position), parts=parts,
    )  # fmt: skip
    return header, tokens


def _files(session: SessionFolder) -> Iterator[tuple[Any, Any]]:
    for manifest in session.journal.segments():
        yield session.segments, manifest
    for record in session.journal.snapshots():
        yield session.snapshots, record


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with storage_errors(f"read {path}"):
        try:
            # a pipe would be waited for, and every session with it
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise SessionError(f"there is no file {path}. Give one that session.export wrote.") from error
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise SessionError(f"{path} is no file. Give one that session.export wrote.")
        with open(descriptor, "rb") as file:
            yield file


def _read_header(file: BinaryIO, where: str) -> _Header:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(PREFIX)
    if len(prefix) < PREFIX or not prefix.startswith(MAGIC):
        raise CorruptMemoryError(f"{where} was not written by session.export, or is cut off within its first bytes.")
    version = int.from_bytes(prefix[8:12], "little")
    if version != FORMAT:
        raise IncompatibleMemoryError(
            f"{where} has format {version}; this version of memtier reads format {FORMAT}. Export it again."
        )
    length = int.from_bytes(prefix[12:20], "little")
    if length > MOST_HEADER_BYTES:
        raise CorruptMemoryError(f"{where} says that its header has {length} bytes; none has over {MOST_HEADER_BYTES}.")
    if length > size - PREFIX:
        raise CorruptMemoryError(f"{where} has {size} bytes, and its header alone says {length}: it is cut off.")
    encoded = file.read(length)
    if _digest(encoded) != prefix[20:]:
        raise CorruptMemoryError(f"{where} is damaged: its header does not have the hash that was written.")
    try:
        header = _Header.model_validate_json(encoded)
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptMemoryError(
            f"{where} has a header that is none: {'.'.join(map(str, first['loc']))}: {first['msg']}."
        ) from error
    told = PREFIX + length + sum(part.size for part in header.parts)
    if told != size:
        raise CorruptMemoryError(f"{where} has {size} bytes, and its parts say {told}: it is cut off or was changed.")
    return header


def _put_in_place(aside: SessionPaths, paths: SessionPaths) -> None:
    """The journal last: with it the session is there."""
    with storage_errors(f"put the imported session in {paths.folder}"):
        for part, place in ((aside.segments, paths.segments), (aside.snapshots, paths.snapshots)):
            if part.is_dir():
                os.rename(part, place)
        flush_folder(paths.folder)
        os.rename(aside.journal, paths.journal)
        flush_folder(paths.folder)


def _fill(
    file: BinaryIO, header: _Header, meta: dict[str, Any], paths: SessionPaths, where: str, weights: WeightsTier,
    settings: MemorySettings,
) -> None:  # fmt: skip
    tokens, *rest = header.parts
    vocabulary = weights.codec.vocab_size
    held = header.turns[-1].end if header.turns else 0
    if tokens.kind != "tokens" or tokens.size != 4 * held or any(part.kind == "tokens" for part in rest):
        raise CorruptMemoryError(f"{where} does not begin with the tokens of its turns.")
    ids = np.frombuffer(_read_part(file, tokens, where), "<i4")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise CorruptMemoryError(
            f"{where} has token ids from {ids.min()} to {ids.max()}; this model knows those in [0, {vocabulary})."
        )
    journal = SqliteJournal.open(paths.folder / "scratch.sqlite3", scratch=True)
    try:
        journal.set_meta(META, meta)
        journal.set_meta(WEIGHTS, None if header.weights is None else header.weights.model_dump())
        journal.set_meta(EDITION, header.edition)
        _fill_turns(journal, header, ids, where)
        segments, snapshots = FileSegmentStore(paths.segments), FileSegmentStore(paths.snapshots)
        sizes = header.memory["span_block_tokens"]
        for number, part in enumerate(rest):
            data = _read_part(file, part, where)
            if part.kind == "segment":
                manifest = parse_segment(data, f"part {number + 1} of {where}")
                if manifest.end - manifest.start != manifest.blocks * sizes:
                    raise CorruptMemoryError(f"part {number + 1} of {where} has blocks of another size than {sizes}.")
                segments.put(manifest.name, data)
                if not journal.segments():
                    # older ones were dropped
                    journal.begin_with(manifest.first_block)
                journal.add_segment(manifest)
            else:
                name = f"{part.position:012d}-{part.hash[:16]}.safetensors"
                _check_snapshot(data, part, f"part {number + 1} of {where}", weights, settings)
                snapshots.put(name, data)
                record = SnapshotRecord(part.position, name, part.size, part.hash, part.blocks, part.first_block)
                journal.add_snapshot(record)
        journal.copy_to(paths.journal)
    except ValueError as error:
        # ConfigError of the journal: spans, ids or blocks that do not follow one another
        raise CorruptMemoryError(f"{where} contradicts itself: {error}") from error
    finally:
        journal.close()


def _check_snapshot(data: bytes, part: _Part, name: str, weights: WeightsTier, settings: MemorySettings) -> None:
    """Load it, on no device: it must be one that this model could have made, in whichever dtype it was."""
    refused = None
    for dtype in dict.fromkeys([weights.dtype, *DTYPES.values()]):
        cache = TieredCache(weights.config, settings=settings, device="meta", dtype=dtype)
        try:
            unpack_snapshot(data, name, part.hash, part.position, cache)
        except IncompatibleMemoryError as error:
            refused = refused or error
            continue
        if cache.sealed_blocks > part.blocks:
            raise CorruptMemoryError(
                f"{name} says that it needs {part.blocks} blocks, and it needs {cache.sealed_blocks}."
            )
        return
    assert refused is not None
    raise refused


def _fill_turns(journal: SqliteJournal, header: _Header, ids: np.ndarray, where: str) -> None:
    marks = set(header.marks)
    if header.marks != sorted(marks):
        raise CorruptMemoryError(f"{where} has marks that do not ascend.")
    start = dropped = 0
    for turn in header.turns:
        if not start < turn.end <= ids.size:
            raise CorruptMemoryError(f"{where} has a turn that ends at {turn.end}, after {start} of {ids.size} tokens.")
        if not dropped <= turn.retained_from <= start:
            raise CorruptMemoryError(
                f"{where} has a turn at {start} for which tokens to {turn.retained_from} were old."
            )
        dropped = turn.retained_from
        number = journal.begin_turn(
            role=turn.role, source=turn.source, metadata=turn.metadata, created_at=turn.created_at,
            retrieval=turn.retrieval, span_blocks=turn.span_blocks, retained_from=turn.retained_from, turn=turn.number,
            forgotten=turn.forgotten,
        )  # fmt: skip
        low, high = bisect_left(header.marks, start), bisect_left(header.marks, turn.end)
        cuts = {mark + 1 for mark in header.marks[low:high]}
        edges = sorted({*range(start + COMMIT_TOKENS, turn.end, COMMIT_TOKENS), *cuts, turn.end})
        for end in edges:
            text = turn.text if end == turn.end else None
            journal.commit(number, ids[start:end], text=text, mark=end - 1 in marks)
            start = end
    if start != ids.size:
        raise CorruptMemoryError(f"{where} has {ids.size} tokens, and its turns hold {start}.")


def _read_part(file: BinaryIO, part: _Part, where: str) -> bytes:
    data = file.read(part.size)
    if content_hash(data) != part.hash:
        raise CorruptMemoryError(f"{where} is damaged: a {part.kind} does not have the hash that was written.")
    return data


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=DIGEST_BYTES).digest()
