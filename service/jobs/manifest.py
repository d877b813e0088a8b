"""What a manifest says, held against what the object store has: every byte is read.

A size alone would take a file for whole that a broken disk or a replaced attempt has written over.
docs/decisions/manifests.md says what that costs.
"""

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from service.contracts.jobs import FileEntry
from service.domain.names import job_prefix
from service.errors import BrokenManifestError
from service.store.base import MissingObjectError, ObjectStore

T = TypeVar("T")

RESULT = "result.json"  # the last file of every success, whatever the kind of the job

# Threads of their own: gigabytes of checkpoints must not keep short requests from the loop's.
_threads = ThreadPoolExecutor(4, thread_name_prefix="manifest")


async def verify(store: ObjectStore, job_id: str, files: Sequence[FileEntry]) -> None:
    """Raise BrokenManifestError for the first file that the store does not hold as its line says."""
    await _aside(lambda: _check_all(store, job_id, files))


async def true_ones(store: ObjectStore, job_id: str, files: Sequence[FileEntry]) -> list[FileEntry]:
    """The files that the store holds as their lines say."""
    return await _aside(lambda: [entry for entry in files if _fault(store, job_id, entry) is None])


async def _aside(work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(_threads, work)


def _check_all(store: ObjectStore, job_id: str, files: Iterable[FileEntry]) -> None:
    for entry in files:
        if fault := _fault(store, job_id, entry):
            raise BrokenManifestError(fault)


def _fault(store: ObjectStore, job_id: str, entry: FileEntry) -> str | None:
    """What is wrong with one file. Raises StoreError where the store does not answer."""
    key = f"{job_prefix(job_id)}/{entry.path}"
    found = store.stat(key)
    if found is None:
        return f"{entry.path} is not in the object store"
    if found.size != entry.size:
        return f"{entry.path} has {found.size} bytes in the object store, the manifest says {entry.size}"
    digest = hashlib.sha256()
    try:
        for chunk in store.read(key):
            digest.update(chunk)
    except MissingObjectError:
        return f"{entry.path} has just vanished from the object store"
    if digest.hexdigest() != entry.sha256:
        return f"{entry.path} differs from its manifest: its SHA-256 is not {entry.sha256}"
    return None
