"""Removes what `service.domain.garbage` lets go of: first the rows, then the objects.

A crash in between leaves objects that no row names, which the next pass finds; never a row whose
files are gone. Passes may overlap, and one that was stopped for an hour may go on.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from typing import Any

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from cim_core.config import Duration
from cim_core.durations import exact_steps
from service.contracts.specs import Checkpoints
from service.db import moves, queries
from service.db.engine import Sessions, only_reads
from service.db.tables import AttemptRow, CheckpointRow, JobRow
from service.domain import garbage as domain
from service.domain.garbage import AttemptSeen, Committed, Garbage, JobFiles, Retention
from service.domain.names import ATTEMPTS, SHARED, job_prefix, log_prefix
from service.store.base import Entry, ObjectStore, Upload, below

_JOBS_A_READ = 500


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One look at everything."""

    now: datetime
    before: datetime  # what was over by then has had its grace
    deletes: bool  # False: only say what would go


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What went, or would go, from one place of the object store."""

    place: str  # jobs/ID, or what jobs share
    steps: tuple[int, ...] = ()  # of committed checkpoints
    keys: tuple[str, ...] = ()
    num_uploads: int = 0  # writes that never ended
    size_bytes: int = 0

    def __bool__(self) -> bool:
        return bool(self.steps or self.keys or self.num_uploads)


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What the object store holds of one job."""

    entries: Mapping[str, Entry]  # by path
    uploads: tuple[Upload, ...]  # not touched since the grace

    @classmethod
    def of(cls, store: ObjectStore, job_id: str, *, logs_of: Iterable[int], before: datetime) -> "_Found":
        """Look, at the logs of these attempts alone: those of a live one may be 43,000 a day. Blocks."""
        prefix = job_prefix(job_id)
        places = [f"{prefix}/{ATTEMPTS}", *(log_prefix(job_id, number) for number in logs_of)]
        entries = {below(entry.key, prefix): entry for place in places for entry in store.list(place)}
        return cls(entries=entries, uploads=_stale(store, prefix, before=before))


@dataclass(frozen=True, kw_only=True)
class _Judged:
    """What may go of a job whose latest attempt is `attempt`."""

    attempt: int
    garbage: Garbage
    dropped: list[CheckpointRow]


async def jobs(sessions: Sessions) -> AsyncIterator[str]:
    """The id of every job that may have something to remove."""
    last = ""
    while True:
        async with sessions.begin() as session:
            await only_reads(session)
            ids = await queries.jobs_to_clean(session, after=last, limit=_JOBS_A_READ)
        for last in ids:
            yield last
        if len(ids) < _JOBS_A_READ:
            return


async def sweep_job(sessions: Sessions, store: ObjectStore, job_id: str, *, look: Pass) -> Removed:
    """Remove what may go of one job.

    Raises StoreError where the object store fails; what is left then goes with a later pass.
    """
    # Objects first: whatever is written after this look is not judged by it.
    logs_of = await _ended(sessions, job_id, before=look.before)
    found = await asyncio.to_thread(_Found.of, store, job_id, logs_of=logs_of, before=look.before)
    async with sessions.begin() as session:
        await only_reads(session)
        judged = await _judge(session, job_id, found, look=look)
    if look.deletes:
        if judged.garbage.checkpoints:
            judged = await _drop(sessions, job_id, found, look=look)
        await asyncio.to_thread(_delete, store, job_id, judged.garbage, found)
        if judged.garbage.settled:
            await _note_clean(sessions, job_id, judged.attempt)
    return _removed(job_id, judged.garbage, found)


async def sweep_shared(store: ObjectStore, *, look: Pass) -> Removed:
    """Remove writes that never ended from what jobs share; raises StoreError."""
    uploads = await asyncio.to_thread(_stale, store, SHARED, before=look.before)
    if look.deletes:
        await asyncio.to_thread(_abort, store, uploads)
    size_bytes = sum(upload.size for upload in uploads)
    return Removed(place=SHARED, num_uploads=len(uploads), size_bytes=size_bytes)


def removed_text(removed: Removed) -> str:
    """`checkpoints at steps 10, 20; 6 files; 12.3 MB`."""
    parts = [steps_text(removed.steps)] if removed.steps else []
    if removed.keys:
        parts.append(_counted(len(removed.keys), "file"))
    if removed.num_uploads:
        parts.append(_counted(removed.num_uploads, "unfinished write"))
    return f"{'; '.join(parts)}; {removed.size_bytes / 1e6:.1f} MB"


def retention_of(resolved: Mapping[str, Any]) -> Retention | None:
    """Which checkpoints the spec keeps; None as long as the plan does not say how many steps that is."""
    told: Mapping[str, Any] = resolved.get("checkpoints", {})
    keep_last = told.get("keep_last", Checkpoints().keep_last)
    if told.get("keep_every") is None:
        return Retention(keep_last=keep_last)
    every, plan = Duration(**told["keep_every"]), resolved.get("plan")
    if plan is None:
        return None
    period = exact_steps(every, batch_size=plan["batch_size"], num_images=plan["num_images"])
    return Retention(keep_last=keep_last, keep_every=max(period, Fraction(1)))


async def _ended(sessions: Sessions, job_id: str, *, before: datetime) -> list[int]:
    """The attempts that have been over since `before`, but for those that are known to be clean."""
    async with sessions.begin() as session:
        await only_reads(session)
        job = await _job(session, job_id)
        over = domain.ended(await _attempts(session, job), before=before)
    return sorted(number for number in over if number > job.clean_attempt)


async def _drop(sessions: Sessions, job_id: str, found: _Found, *, look: Pass) -> _Judged:
    """Judge again with the job locked; from then on the checkpoints that may go do not exist."""
    async with sessions.begin() as session:
        judged = await _judge(session, job_id, found, look=look, lock=True)
        for row in judged.dropped:
            await session.delete(row)
        if judged.dropped:
            told = f"removed {steps_text(row.step for row in judged.dropped)}"
            moves.note(session, job_id, actor="dispatcher", message=told, now=look.now)
    return judged


async def _judge(
    session: AsyncSession, job_id: str, found: _Found, *, look: Pass, lock: bool = False
) -> _Judged:
    job = await _job(session, job_id, lock=lock)
    # In this order: an attempt that is seen to be over has already named all that it ever will.
    attempts = await _attempts(session, job)
    rows = {_committed(row): row for row in await queries.checkpoints(session, job_id)}
    files = JobFiles(
        attempts=attempts,
        checkpoints=tuple(rows),
        named=frozenset(row.path for row in await queries.files(session, job_id)),
        stored=frozenset(found.entries),
        uploads=frozenset(_path(upload, job_id) for upload in found.uploads),
    )
    garbage = domain.garbage(files, retention_of(job.resolved), before=look.before)
    dropped = [rows[checkpoint] for checkpoint in garbage.checkpoints]
    return _Judged(attempt=job.attempt, garbage=garbage, dropped=dropped)


async def _job(session: AsyncSession, job_id: str, *, lock: bool = False) -> JobRow:
    job = await queries.job(session, job_id, lock=lock)
    assert job is not None, f"jobs are never deleted, {job_id} was"
    return job


async def _attempts(session: AsyncSession, job: JobRow) -> tuple[AttemptSeen, ...]:
    return tuple(_seen(job, row) for row in await queries.attempts(session, [job.id]))


def _seen(job: JobRow, attempt: AttemptRow) -> AttemptSeen:
    # The latest attempt of a final job has ended too; were it not so, a retry would let it write again.
    superseded = attempt.number < job.attempt
    return AttemptSeen(
        number=attempt.number,
        over_since=attempt.ended_at or (job.updated_at if superseded else None),
        gone=attempt.ray_ended_at is not None,
    )


def _committed(row: CheckpointRow) -> Committed:
    paths = frozenset(str(entry["path"]) for entry in row.files)
    return Committed(step=row.step, attempt=row.attempt, paths=paths)


def steps_text(steps: Iterable[int]) -> str:
    """`checkpoints at steps 10, 20`."""
    listed = [str(step) for step in sorted(steps)]
    plural = "s" * (len(listed) > 1)
    return f"checkpoint{plural} at step{plural} {', '.join(listed)}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number > 1)}"


async def _note_clean(sessions: Sessions, job_id: str, attempt: int) -> None:
    async with sessions.begin() as session:
        await session.execute(
            update(JobRow)
            .where(JobRow.id == job_id, JobRow.clean_attempt < attempt)
            .values(clean_attempt=attempt)
        )


def _delete(store: ObjectStore, job_id: str, garbage: Garbage, found: _Found) -> None:
    store.delete([found.entries[path].key for path in garbage.paths])
    _abort(store, _abandoned(job_id, garbage, found))


def _abandoned(job_id: str, garbage: Garbage, found: _Found) -> list[Upload]:
    return [upload for upload in found.uploads if _path(upload, job_id) in garbage.uploads]


def _path(upload: Upload, job_id: str) -> str:
    """Where the upload lies below the job's prefix; empty at its top."""
    return upload.key.removeprefix(job_prefix(job_id)).removeprefix("/")


def _abort(store: ObjectStore, uploads: Iterable[Upload]) -> None:
    for upload in uploads:
        store.abort(upload)


def _stale(store: ObjectStore, prefix: str, *, before: datetime) -> tuple[Upload, ...]:
    return tuple(upload for upload in store.uploads(prefix) if upload.touched_at <= before)


def _removed(job_id: str, garbage: Garbage, found: _Found) -> Removed:
    entries = [found.entries[path] for path in garbage.paths]
    uploads = _abandoned(job_id, garbage, found)
    return Removed(
        place=job_prefix(job_id),
        steps=tuple(checkpoint.step for checkpoint in garbage.checkpoints),
        keys=tuple(entry.key for entry in entries),
        num_uploads=len(uploads),
        size_bytes=sum(entry.size for entry in entries) + sum(upload.size for upload in uploads),
    )
