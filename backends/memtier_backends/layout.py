"""Where a session lies on disk: <store>/<tenant>/<session>/, both names hashes of the ids.

So an id may hold anything: slashes, dots, any script. The ids themselves are kept in the journal's meta; a folder's
name says nothing about who its memory belongs to.
"""

from __future__ import annotations

import re
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

from memtier.errors import ConfigError, CorruptMemoryError
from memtier_backends.files import TEMPORARY_SUFFIX, flush_folder, storage_errors
from memtier_backends.records import DIGEST_BYTES

__all__ = [
    "SessionPaths",
    "check_never_begun",
    "check_store",
    "drop_partial",
    "remove_session",
    "session_folder",
    "session_folders",
    "sweep_removed",
    "traces",
]

_FOLDER = re.compile(rf"[0-9a-f]{{{2 * DIGEST_BYTES}}}")
_REMOVED_PREFIX = ".removed-"
_PARTIAL_PREFIX = ".partial-"
RESCUED_PREFIX = ".rescued-"


@dataclass(frozen=True, slots=True)
class SessionPaths:
    """What a session's folder holds."""

    folder: Path

    @property
    def lock(self) -> Path:
        return self.folder / "lock"

    @property
    def journal(self) -> Path:
        return self.folder / "journal.sqlite3"

    @property
    def segments(self) -> Path:
        return self.folder / "segments"

    @property
    def snapshots(self) -> Path:
        return self.folder / "snapshots"

    @property
    def index(self) -> Path:
        return self.folder / "index.lance"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def quarantine(self) -> Path:
        return self.folder / "quarantine"

    def checkpoint(self, name: str) -> SessionPaths:
        """Where the checkpoint of that name lies, whether or not it exists. Raises ConfigError as `session_folder`."""
        return SessionPaths(self.checkpoints / _hashed("checkpoint", name))

    def checkpoint_folders(self) -> list[SessionPaths]:
        """Every checkpoint, in no particular order; the names are in their journals."""
        if not self.checkpoints.is_dir():
            return []
        return [SessionPaths(path) for path in sorted(self.checkpoints.iterdir()) if _FOLDER.fullmatch(path.name)]

    def partial(self) -> Path:
        """A new name for a copy that is being made; `drop_partial` removes what a crash left of one."""
        return self.folder / f"{_PARTIAL_PREFIX}{uuid4().hex}"


def check_store(store: str | Path) -> Path:
    """The store's absolute path.

    Raises:
        ConfigError: a URL, an empty path, a path that is not a folder, or a platform without POSIX locks.
    """
    if sys.platform not in ("linux", "darwin"):
        raise ConfigError(f"the platform is {sys.platform}; a store needs a local POSIX disk: Linux or macOS.")
    text = str(store)
    if "://" in text:
        raise ConfigError(f"store is {text!r}, a URL; it must be a folder on a local disk, for example './memory'.")
    # Path("") is the working folder, which nobody means by an empty store.
    if not text or "\0" in text:
        raise ConfigError(f"store is {text!r}; it must be the path of a folder, for example './memory'.")
    path = Path(text).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"store is {str(path)!r}, which is a file; it must be a folder. Choose another path.")
    return path


def session_folder(store: str | Path, tenant: str, session: str) -> Path:
    """The folder of a session, whether or not it exists. Ids that differ in any character have different folders.

    Raises:
        ConfigError: an id is empty or not a string; see also `check_store`.
    """
    return _tenant_folder(store, tenant) / _hashed("session", session)


def session_folders(store: str | Path, tenant: str) -> list[Path]:
    """Folders of a tenant's sessions, sorted; the ids are in their journals."""
    folder = _tenant_folder(store, tenant)
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir())


def remove_session(folder: Path) -> None:
    """Remove a session's folder with all in it. Call as the owner of its lock.

    It is renamed first, so that a crash leaves no half session; `sweep_removed` removes what such a crash left.
    """
    with storage_errors(f"remove the session folder {folder}"):
        if folder.exists():
            folder.rename(folder.with_name(f"{_REMOVED_PREFIX}{uuid4().hex}"))
            flush_folder(folder.parent)
    sweep_removed(folder.parent)


def sweep_removed(folder: Path) -> None:
    """Remove what removals that were cut off left in a folder. Several processes may do so at once.

    Args:
        folder: a tenant's, the store's, or that of a session's checkpoints; there need be none.

    Raises:
        StorageError: something cannot be removed.
    """
    with storage_errors(f"remove what a removal left in {folder}"):
        left = list(folder.glob(f"{_REMOVED_PREFIX}*"))
        for path in left:
            while path.exists():
                # what another process removed under our hands is gone, and so we get on
                with suppress(FileNotFoundError):
                    shutil.rmtree(path)
        if left:
            with suppress(FileNotFoundError):
                flush_folder(folder)


def traces(folder: Path) -> list[str]:
    """What lies in a folder that only a session with a journal leaves there; nothing where no session ever began.

    A lock, empty folders and an index are left by one that died before it began.
    """
    paths = SessionPaths(folder)
    found = [path.name for path in (paths.segments, paths.snapshots, paths.quarantine) if _holds_anything(path)]
    found += [paths.checkpoints.name] if paths.checkpoint_folders() else []
    return sorted([*found, *(path.name for path in folder.glob(f"{RESCUED_PREFIX}*"))])


def check_never_begun(folder: Path) -> None:
    """Refuse a folder without a journal in which there was one: a new session there would drop what is left of it.

    Raises:
        CorruptMemoryError: names what is left.
    """
    with storage_errors(f"look into the session folder {folder}"):
        left = traces(folder)
    if left:
        raise CorruptMemoryError(
            f"the journal {SessionPaths(folder).journal} is missing, and {', '.join(left)} beside it are of a session. "
            "Restore the file from a backup, run: memtier doctor --rebuild, or delete the session."
        )


def drop_partial(folder: Path) -> None:
    """Remove copies and journals that were begun in a session's folder and never finished. Call as the owner of its
    lock.
    """
    with storage_errors(f"clean the session folder {folder}"):
        for path in folder.glob(f"{_PARTIAL_PREFIX}*"):
            shutil.rmtree(path)
        for path in folder.glob(f".{SessionPaths(folder).journal.name}.*{TEMPORARY_SUFFIX}*"):
            path.unlink()


def _holds_anything(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _tenant_folder(store: str | Path, tenant: str) -> Path:
    return check_store(store) / _hashed("tenant", tenant)


def _hashed(kind: str, identity: str) -> str:
    if not isinstance(identity, str) or not identity:
        raise ConfigError(f"the {kind} id is {identity!r}; it must be a string of at least one character.")
    data = identity.encode("utf-8", "surrogatepass")
    return blake2b(data, digest_size=DIGEST_BYTES, person=kind.encode()).hexdigest()
