"""What an object store does, whichever kind it is.

Keys are relative paths with `/` between their parts. A prefix is a folder: `jobs/a` means what
lies below `jobs/a/`, never `jobs/ab`; the empty prefix means everything.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from service.contracts.jobs import FileEntry
from service.errors import ServiceError

CHUNK_BYTES = 1 << 20
MAX_KEY_BYTES = 1024  # S3's limit
MAX_PART_BYTES = 255  # a file name's limit on most file systems
TEMPORARY = ".cim-part-"  # files of this prefix are being written and are no objects yet


class StoreError(ServiceError):
    """The object store did not do what was asked; trying again later may help."""

    code, status, title = "store_unavailable", 503, "The object store is not available"


class StoreFullError(StoreError):
    """The object store has no room left."""

    code, status, title = "store_full", 507, "The object store is full"


class MissingObjectError(ServiceError):
    """There is no object of that key."""

    code, status, title = "missing_object", 404, "No such file"


class CorruptObjectError(ServiceError):
    """An object is not what its manifest says."""

    code, status, title = "corrupt_object", 500, "A stored file is damaged"


class InvalidKeyError(ServiceError, ValueError):
    """A key is not a plain relative path."""

    code, status, title = "invalid_key", 400, "Not a valid path"


@dataclass(frozen=True, slots=True)
class Entry:
    """One object."""

    key: str
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Upload:
    """A write that was begun and has not ended. It is no object, but takes room."""

    key: str  # of the object that it is to become, or of the folder where that one would lie
    id: str  # tells it from others of the same key
    size: int  # bytes so far
    touched_at: datetime  # when it last grew, by the store's own clock


# A class with a method `list` cannot name the type in its later signatures.
Entries = list[Entry]
Uploads = list[Upload]
FileEntries = list[FileEntry]
Paths = list[Path]


class ObjectStore(ABC):
    """Whole objects under keys. Safe to use from several threads; writes replace atomically.

    Every method raises `InvalidKeyError` for a bad key, `StoreError` when the store fails and
    `StoreFullError` when it has no room; those that read raise `MissingObjectError`.
    """

    @abstractmethod
    def put_bytes(self, key: str, data: bytes) -> None:
        """Store `data` under `key`."""

    @abstractmethod
    def put_file(self, key: str, path: Path) -> None:
        """Store the local file `path` under `key`."""

    @abstractmethod
    def get_file(self, key: str, path: Path) -> None:
        """Write the object to the local file `path`, whole or not at all; its folder is made."""

    @abstractmethod
    def read(self, key: str) -> Iterator[bytes]:
        """The object in chunks. A missing object raises here, not at the first chunk."""

    @abstractmethod
    def list(self, prefix: str = "") -> Entries:
        """Every object below `prefix`, by key; empty when there is none."""

    @abstractmethod
    def stat(self, key: str) -> Entry | None:
        """Key and size, or None when there is no such object."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete these objects. One that is not there is fine; after a failure some may be left."""

    @abstractmethod
    def delete_prefix(self, prefix: str) -> None:
        """Delete every object below `prefix`. Nothing there is fine; an empty prefix is refused."""

    @abstractmethod
    def uploads(self, prefix: str = "") -> Uploads:
        """Every write below `prefix` that has not ended, by key: under way, or its writer was killed."""

    @abstractmethod
    def abort(self, upload: Upload) -> None:
        """End an upload without an object; its writer fails if it still lives. One that has ended is fine."""

    @abstractmethod
    def presign(self, key: str, *, expires_s: int = 3600) -> str | None:
        """An address that anyone may GET for a while, or None where the store has no such thing."""

    def get_bytes(self, key: str) -> bytes:
        """The object in memory."""
        return b"".join(self.read(key))

    def put_folder(self, prefix: str, folder: Path, *, relative_to: str = "") -> FileEntries:
        """Store every regular file below `folder` under `prefix`, in the order of their names.

        Args:
            prefix: Where the folder goes.
            folder: A local folder; links in it are not followed.
            relative_to: A folder that `prefix` lies in, e.g. `jobs/JOB_ID`. The returned paths
                start below it; by default they are whole keys.
        """
        entries = []
        for path in _files_below(folder):
            key = join(prefix, path.relative_to(folder).as_posix())
            entry = file_entry(path, name=below(key, relative_to))
            self.put_file(key, path)
            entries.append(entry)
        return entries

    def get_folder(self, prefix: str, folder: Path, *, files: Sequence[FileEntry] | None = None) -> Paths:
        """Write every object below `prefix` into `folder`, or only `files`, checked.

        Args:
            prefix: A folder of the store.
            folder: A local folder; made if need be, files in it are replaced.
            files: A manifest whose paths are relative to `prefix`. Then exactly these are
                fetched, each compared with its size and SHA-256 (`CorruptObjectError`).
        """
        if files is None:
            names = [below(entry.key, prefix) for entry in self.list(prefix)]
            if not names:
                raise MissingObjectError(f"nothing lies below {prefix!r} in the object store")
        else:
            names = [entry.path for entry in files]
        for name in names:
            self.get_file(join(prefix, name), folder / name)
        for entry in files or ():
            check_file(folder / entry.path, entry)
        return [folder / name for name in names]


def check_key(key: str) -> str:
    """Return `key`, or raise `InvalidKeyError` unless it is a plain relative path."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise InvalidKeyError(f"{key!r} must be a relative path without empty parts, '.' or '..'")
    if "\\" in key or not key.isprintable():
        raise InvalidKeyError(f"{key!r} must not hold backslashes or control characters")
    too_long = any(len(part.encode()) > MAX_PART_BYTES for part in parts)
    if too_long or len(key.encode()) > MAX_KEY_BYTES:
        limits = f"at most {MAX_KEY_BYTES} bytes, {MAX_PART_BYTES} between two slashes"
        raise InvalidKeyError(f"{key[:80]!r}... is too long: {limits}")
    if any(part.startswith(TEMPORARY) for part in parts):
        raise InvalidKeyError(
            f"{key!r}: names that start with {TEMPORARY!r} are kept for files being written"
        )
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` without a last slash; an empty one is fine."""
    prefix = prefix.removesuffix("/")
    return check_key(prefix) if prefix else ""


def join(prefix: str, name: str) -> str:
    """The key of `name` below `prefix`, checked."""
    prefix = check_prefix(prefix)
    return check_key(f"{prefix}/{name}" if prefix else name)


def below(key: str, prefix: str) -> str:
    """`key` relative to the folder `prefix`, which must hold it."""
    prefix = check_prefix(prefix)
    if not prefix:
        return key
    assert key.startswith(f"{prefix}/"), f"{key} does not lie below {prefix}"
    return key[len(prefix) + 1 :]


def sha256_of(path: Path) -> str:
    """SHA-256 of a local file, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path, *, name: str) -> FileEntry:
    """The manifest line of the local file `path` under the relative path `name`."""
    return FileEntry(path=name, size=path.stat().st_size, sha256=sha256_of(path))


def check_file(path: Path, entry: FileEntry) -> None:
    """Raise `CorruptObjectError` unless the local file is what its manifest line says."""
    size = path.stat().st_size
    if size != entry.size:
        raise CorruptObjectError(f"{entry.path} has {size} bytes, its manifest says {entry.size}")
    if sha256_of(path) != entry.sha256:
        raise CorruptObjectError(f"{entry.path} differs from its manifest: the SHA-256 is not {entry.sha256}")


def _files_below(folder: Path) -> list[Path]:
    found = []
    for root, _, names in os.walk(folder, onerror=_raise):
        paths = (Path(root, name) for name in names)
        found += [path for path in paths if path.is_file() and not path.is_symlink()]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _raise(error: OSError) -> None:
    raise error
