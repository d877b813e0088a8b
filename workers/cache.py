"""Downloads on this node's disk, shared by the worker processes of a job."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from cim_core.data.sources import expand_braces, places
from cim_core.data.unreadable import mendable, shortened
from cim_core.errors import DataError
from service.contracts.allowed import Allowed
from service.contracts.work import StoreAddress
from service.store.base import Entry, ObjectStore, below
from service.store.open import open_store
from workers.allowed import check_address, check_places
from workers.spool import LOGS
from workers.storage import open_address, patiently

OnFile = Callable[[int, int], None]  # (files here, files in all)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of `target` against the other processes of this node."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(target.with_name(target.name + ".lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Delete the downloads of a job on this node; a retry would want them, a job that is over not.

    Log lines that wait for the store stay, for whoever works for the job here next.
    """
    if not any((folder / LOGS).glob("*/*.jsonl")):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.iterdir():
        if path.name != LOGS:
            shutil.rmtree(path, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The downloads of one job on this node. `s3://` is read with the job store's endpoint and region."""

    folder: Path
    address: StoreAddress
    allowed: Allowed  # where addresses may lead; what is a key of the job store is not one
    on_file: OnFile | None = None

    def artifact(self, source: str) -> Path:
        """The folder of an input: a key prefix of the job store, an `s3://` address, or a path.

        Raises:
            DataError: a path that is not there, or an address that holds nothing.
            StoreError: the store stayed away.
        """
        if source.startswith("s3://"):
            return self._from_s3(source)
        path = Path(source.removeprefix("file://"))
        if not path.is_absolute():
            return self._download(open_address(self.address), source.strip("/"), source=source)
        check_address(str(path), self.allowed)
        check_places([path], self.allowed, given=source)
        if not os.path.isdir(path):
            shown = shortened(source)
            raise DataError(f"{shown} is not a folder on the worker's node: give one that every node sees")
        with mendable(source, remedy="make it readable to the user that the workers run as"):
            check_places(path.iterdir(), self.allowed, given=source)
        return path

    def images(self, uri: str) -> str:
        """Where an image set lies on this node, as `scan` takes it: a folder, a tar or a pattern of tars.

        Raises:
            DataError: the address is relative, or holds nothing.
            StoreError: the store stayed away.
        """
        if not uri.startswith("s3://"):
            path = uri.removeprefix("file://")
            if not Path(path).is_absolute():
                raise DataError(f"{uri} is a relative path, and workers run elsewhere: give an absolute one")
            check_address(path, self.allowed)
            if not self.allowed.anywhere_local:
                check_places(places(path), self.allowed, given=uri)
            return path
        head, _, last = uri.rstrip("/").rpartition("/")
        if not (last.endswith(".tar") or set(last) & set("*?[{")):
            return str(self._from_s3(uri))
        return str(self._from_s3(head, patterns=list(expand_braces(last))) / last)

    def _from_s3(self, uri: str, *, patterns: Sequence[str] = ("*",)) -> Path:
        check_address(uri, self.allowed)
        url = "s3://" + uri.removeprefix("s3://").strip("/")
        store = open_store(url, endpoint_url=self.address.endpoint_url, region=self.address.region)
        return self._download(store, "", source=uri, patterns=patterns)

    def _download(
        self, store: ObjectStore, prefix: str, *, source: str, patterns: Sequence[str] = ("*",)
    ) -> Path:
        """Bring every object below `prefix` here, once a node."""
        name = f"{source}\0{patterns}".encode()
        target = self.folder / hashlib.sha256(name).hexdigest()[:16]
        with locked(target):
            entries = patiently(lambda: store.list(prefix), what=f"listing {source}")
            names = {entry.key: below(entry.key, prefix) for entry in entries}
            wanted = [e for e in entries if any(fnmatch(names[e.key], pattern) for pattern in patterns)]
            if not wanted:
                raise DataError(
                    f"nothing is stored at {source}: check the address, or upload the files first"
                )
            for number, entry in enumerate(wanted, start=1):
                self._fetch(store, entry, target / names[entry.key])
                if self.on_file is not None:
                    self.on_file(number, len(wanted))
        return target

    def _fetch(self, store: ObjectStore, entry: Entry, file: Path) -> None:
        # A file is put in place whole, and the folder is this job's alone: the size tells enough.
        if not (file.is_file() and file.stat().st_size == entry.size):
            patiently(lambda: store.get_file(entry.key, file), what=f"reading {entry.key}")
