"""The artifacts of one job in the object store, and the same place as Ray names it."""

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlparse

import pyarrow.fs

from service.contracts.jobs import FileEntry
from service.contracts.work import Assignment, StoreAddress
from service.store.base import ObjectStore, StoreError, StoreFullError, file_entry
from service.store.open import open_store

log = logging.getLogger(__name__)
T = TypeVar("T")

# A store that is refused or frozen for a few minutes should cost waiting, not an attempt.
TRIES = 7
LONGEST_PAUSE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class JobStore:
    """Writes below `jobs/JOB_ID/`; entries name their path relative to that prefix."""

    store: ObjectStore
    job_id: str
    attempt: int
    url: str

    @classmethod
    def of(cls, assignment: Assignment) -> "JobStore":
        """The place of the assigned job."""
        address = assignment.store
        return cls(
            store=open_address(address), job_id=assignment.job_id, attempt=assignment.attempt, url=address.url
        )

    @property
    def prefix(self) -> str:
        """Key prefix of the job, without a slash at the end."""
        return f"jobs/{self.job_id}"

    @property
    def attempt_prefix(self) -> str:
        """What this attempt alone writes, relative to the job: checkpoints and Ray's own files."""
        return f"attempts/{self.attempt}"

    @property
    def logs_prefix(self) -> str:
        """Key prefix of the job's logs, those of attempt N below `attempt-N`."""
        return f"{self.prefix}/logs"

    @property
    def log_prefix(self) -> str:
        """Key prefix of this attempt's logs."""
        return f"{self.logs_prefix}/attempt-{self.attempt}"

    def put_bytes(self, path: str, data: bytes) -> FileEntry:
        """Store `data` as the job's file `path`. Raises `StoreError`."""
        patiently(lambda: self.store.put_bytes(f"{self.prefix}/{path}", data), what=f"writing {path}")
        return FileEntry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())

    def put_folder(self, path: str, folder: Path) -> list[FileEntry]:
        """Store every file of `folder` below the job's `path`. Raises `StoreError`."""
        entries = []
        for file in sorted(item for item in folder.rglob("*") if item.is_file()):
            relative = f"{path}/{file.relative_to(folder).as_posix()}"
            entries.append(self.put_file(relative, file))
        return entries

    def put_file(self, path: str, file: Path) -> FileEntry:
        """Store one local file as the job's file `path`. Raises `StoreError`."""
        entry = file_entry(file, name=path)
        patiently(lambda: self.store.put_file(f"{self.prefix}/{path}", file), what=f"writing {path}")
        return entry

    def get_file(self, path: str, file: Path) -> None:
        """Fetch the job's file `path`. Raises `StoreError`."""
        patiently(lambda: self.store.get_file(f"{self.prefix}/{path}", file), what=f"reading {path}")


def open_address(address: StoreAddress) -> ObjectStore:
    """The object store at `address`; credentials come from this process's environment."""
    return open_store(address.url, endpoint_url=address.endpoint_url, region=address.region)


def patiently(action: Callable[[], T], *, what: str, pause_s: float = 1.0) -> T:
    """Do `action`, again while the store is away; a full store is not waited for.

    Raises:
        StoreError: the store stayed away for all tries.
    """
    for turn in range(TRIES - 1):
        try:
            return action()
        except StoreFullError:
            raise
        except StoreError as error:
            log.warning("%s failed, trying again (%d of %d): %s", what, turn + 1, TRIES, error)
            time.sleep(min(LONGEST_PAUSE_S, pause_s * 2**turn))
    return action()


def ray_storage(address: StoreAddress, *, prefix: str) -> tuple[str, pyarrow.fs.FileSystem | None]:
    """`storage_path` and `storage_filesystem` for Ray below `prefix` of the store."""
    parsed = urlparse(address.url)
    if parsed.scheme != "s3":
        return f"{address.url.rstrip('/')}/{prefix}", None
    path = "/".join(part for part in (parsed.netloc, parsed.path.strip("/"), prefix) if part)
    return path, _s3(address)


def _s3(address: StoreAddress) -> pyarrow.fs.FileSystem:
    if address.endpoint_url is None:
        return pyarrow.fs.S3FileSystem(region=address.region)
    endpoint = urlparse(address.endpoint_url)
    return pyarrow.fs.S3FileSystem(
        endpoint_override=endpoint.netloc, scheme=endpoint.scheme or "https", region=address.region
    )
