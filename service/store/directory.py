"""An object store in a folder: each object is a file of the same path."""

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from service.store.base import (
    CHUNK_BYTES,
    TEMPORARY,
    Entries,
    Entry,
    MissingObjectError,
    ObjectStore,
    StoreError,
    StoreFullError,
    Upload,
    Uploads,
    check_key,
    check_prefix,
)

FULL = (errno.ENOSPC, errno.EDQUOT)
_TRIES = 100  # to make a file in a folder that is deleted meanwhile, because it was empty


class DirectoryStore(ObjectStore):
    """Files are written beside their place, synced, then renamed: a reader sees all or nothing."""

    def __init__(self, root: Path) -> None:
        if not root.is_absolute():
            raise ValueError(f"the object store's folder must be an absolute path, got {str(root)!r}")
        self._root = root

    def put_bytes(self, key: str, data: bytes) -> None:
        """Store `data` under `key`."""
        with self._replacing(key) as file, self._explained(key):
            file.write(data)

    def put_file(self, key: str, path: Path) -> None:
        """Store the local file `path` under `key`."""
        with path.open("rb") as source, self._replacing(key) as file:
            # The read stands outside: a local file that breaks is not the store's failure.
            while chunk := source.read(CHUNK_BYTES):
                with self._explained(key):
                    file.write(chunk)

    def get_file(self, key: str, path: Path) -> None:
        """Write the object to the local file `path`, whole or not at all; its folder is made."""
        chunks = self.read(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            with part.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def read(self, key: str) -> Iterator[bytes]:
        """The object in chunks. A missing object raises here, not at the first chunk."""
        if self.stat(key) is None:
            raise MissingObjectError(f"there is no {key!r} in the object store")
        return self._chunks(key)

    def list(self, prefix: str = "") -> Entries:
        """Every object below `prefix`, by key; empty when there is none."""
        prefix = check_prefix(prefix)
        entries = []
        with self._explained(prefix):
            for folder, _, names in os.walk(self._root / prefix):
                paths = (Path(folder, name) for name in names if not name.startswith(TEMPORARY))
                entries += [entry for path in paths if (entry := self._entry(path)) is not None]
        return sorted(entries, key=lambda entry: entry.key)

    def stat(self, key: str) -> Entry | None:
        """Key and size, or None when there is no such object."""
        with self._explained(key):
            return self._entry(self._path(key))

    def delete(self, keys: Iterable[str]) -> None:
        """Delete these objects. One that is not there is fine; after a failure some may be left."""
        for key in keys:
            path = self._path(key)
            with self._explained(key):
                with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
                    path.unlink()
                self._delete_empty(path.parent)

    def delete_prefix(self, prefix: str) -> None:
        """Delete every object below `prefix`. Nothing there is fine; an empty prefix is refused."""
        folder = self._path(prefix.removesuffix("/"))
        with self._explained(prefix):
            if folder.is_dir():
                shutil.rmtree(folder)

    def uploads(self, prefix: str = "") -> Uploads:
        """Every write below `prefix` that has not ended, by key: under way, or its writer was killed."""
        prefix = check_prefix(prefix)
        found = []
        with self._explained(prefix):
            for folder, _, names in os.walk(self._root / prefix):
                parts = (Path(folder, name) for name in names if name.startswith(TEMPORARY))
                found += [upload for part in parts if (upload := self._upload(part)) is not None]
        return sorted(found, key=lambda upload: (upload.key, upload.id))

    def abort(self, upload: Upload) -> None:
        """End an upload without an object; its writer fails if it still lives. One that has ended is fine."""
        assert upload.id.startswith(TEMPORARY), f"not an upload of this store: {upload}"
        folder = self._root / check_prefix(upload.key)
        with self._explained(upload.key):
            (folder / upload.id).unlink(missing_ok=True)
            self._delete_empty(folder)

    def presign(self, key: str, *, expires_s: int = 3600) -> str | None:  # noqa: ARG002
        """None: a folder has no addresses."""
        check_key(key)
        return None

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def _entry(self, path: Path) -> Entry | None:
        if not path.is_file():
            return None
        try:
            return Entry(path.relative_to(self._root).as_posix(), path.stat().st_size)
        except FileNotFoundError:  # deleted between the two looks
            return None

    def _upload(self, part: Path) -> Upload | None:
        try:
            found = part.stat()
        except FileNotFoundError:  # it became an object
            return None
        folder = part.parent.relative_to(self._root).as_posix()
        touched_at = datetime.fromtimestamp(found.st_mtime, UTC)
        return Upload("" if folder == "." else folder, part.name, found.st_size, touched_at)

    def _delete_empty(self, folder: Path) -> None:
        """Delete the folder and those above it that hold nothing; a listing would walk them for ever."""
        while folder != self._root:
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass  # by somebody else
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                return
            folder = folder.parent

    def _chunks(self, key: str) -> Iterator[bytes]:
        with self._explained(key), self._path(key).open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    @contextmanager
    def _replacing(self, key: str) -> Iterator[BinaryIO]:
        """A new file that takes the key's place when the block ends well, and vanishes otherwise."""
        path = self._path(key)
        part = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        with self._explained(key):
            file = _made(part)
        try:
            yield file
            with self._explained(key):
                file.flush()
                os.fsync(file.fileno())
                file.close()
                part.replace(path)
                _sync_folder(path.parent)
        finally:
            _close(file)
            part.unlink(missing_ok=True)

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                raise StoreFullError(self._full_message(key, error)) from error
            reason = error.strerror or str(error)
            raise StoreError(f"the object store in {self._root} failed at {key!r}: {reason}") from error

    def _full_message(self, key: str, error: OSError) -> str:
        free = shutil.disk_usage(self._root).free if self._root.is_dir() else 0
        return (
            f"no room for {key!r} in the object store {self._root}: {error.strerror}, {free} bytes free; "
            "free some space there or set CIM_STORE_URL to a larger disk"
        )


def _made(part: Path) -> BinaryIO:
    """The new file, with its folder."""
    for _ in range(_TRIES - 1):
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            return part.open("xb")
        except (FileNotFoundError, FileExistsError):  # mkdir says the latter of a folder that has just gone
            continue
    return part.open("xb")


def _close(file: BinaryIO) -> None:
    # A full disk makes close() fail once more on the bytes still in the buffer.
    try:
        file.close()
    except OSError as error:
        if error.errno not in FULL:
            raise


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
