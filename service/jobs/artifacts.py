"""A job's files. Only what a manifest names exists, so no path can climb out of the job."""

import mimetypes
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.jobs import FileEntry
from service.db import queries
from service.domain.names import job_prefix
from service.errors import NotFoundError
from service.jobs.references import find_id
from service.jobs.views import to_file
from service.store.base import ObjectStore

_TYPES = {
    ".safetensors": "application/octet-stream",
    ".jsonl": "application/x-ndjson",
    ".md": "text/markdown",
}


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One file: where it lies and what a browser should know of it."""

    key: str
    entry: FileEntry
    content_type: str


async def artifacts(session: AsyncSession, ref: str) -> list[FileEntry]:
    """Every finished file of the job and those of its last checkpoint, by path."""
    return sorted((await _manifest(session, ref))[1].values(), key=lambda entry: entry.path)


async def artifact(session: AsyncSession, ref: str, path: str) -> Artifact:
    """The file at `path`; NotFoundError where no manifest names it."""
    job_id, manifest = await _manifest(session, ref)
    if path not in manifest:
        raise NotFoundError(f"job {job_id} has no artifact {path!r}; its artifacts list says what there is")
    return Artifact(
        key=f"{job_prefix(job_id)}/{path}", entry=manifest[path], content_type=_content_type(path)
    )


def read(store: ObjectStore, found: Artifact, *, start: int, end: int) -> Iterator[bytes]:
    """Bytes `start` to `end` (exclusive) of the file. Blocks; a lost object raises at once."""
    return _cut(store.read(found.key), start=start, end=end)


def _cut(chunks: Iterator[bytes], *, start: int, end: int) -> Iterator[bytes]:
    at = 0
    for chunk in chunks:
        piece = chunk[max(0, start - at) : max(0, end - at)]
        if piece:
            yield piece
        at += len(chunk)
        if at >= end:
            return


async def _manifest(session: AsyncSession, ref: str) -> tuple[str, dict[str, FileEntry]]:
    job_id = await find_id(session, ref)
    checkpoint = await queries.last_checkpoint(session, job_id)
    entries = [FileEntry.model_validate(entry) for entry in checkpoint.files] if checkpoint else []
    entries += [to_file(row) for row in await queries.files(session, job_id)]
    return job_id, {entry.path: entry for entry in entries}


def _content_type(path: str) -> str:
    suffix = "." + path.rpartition(".")[2]
    guessed = _TYPES.get(suffix) or mimetypes.guess_type(path)[0] or "application/octet-stream"
    # Nothing that a job wrote may run as a page of the service.
    return "text/plain" if guessed in ("text/html", "image/svg+xml", "application/xhtml+xml") else guessed
