"""The end of an attempt, as its worker tells it, and what becomes of the job."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.jobs import Desired, FailureKind, FileEntry, JobState, MetricPoint
from service.contracts.work import Failure, Finish
from service.db import moves, queries
from service.db.engine import Sessions
from service.db.tables import AttemptRow, JobRow
from service.db.usage import usage
from service.domain import retry
from service.domain.usage import Usage
from service.errors import BrokenManifestError, ConflictError
from service.jobs import manifest
from service.jobs.work import current, locked, record
from service.store.base import ObjectStore

_UNPLANNED = frozenset({"evaluate"})  # kinds of jobs that train nothing


@dataclass(frozen=True, kw_only=True)
class End:
    """Where the job goes, and the columns that are written with the move."""

    state: JobState
    message: str
    values: dict[str, Any] = field(default_factory=dict)


async def finish(
    sessions: Sessions,
    store: ObjectStore,
    job_id: str,
    number: int,
    told: Finish,
    *,
    backoff: retry.Backoff,
    now: datetime,
) -> None:
    """End the attempt. A repetition of what ended it changes nothing.

    Raises:
        BrokenManifestError: a success that did not come to its last step, or a file of which is not in
            the object store with its checksum.
        StaleAttemptError: the attempt may no longer write.
    """
    async with sessions.begin() as session:
        if await _is_repeated(session, job_id, number, told):
            return
        job, _ = await current(session, job_id, number)
        _check_complete(job, told)
    files = await _real_files(store, job_id, told)
    async with sessions.begin() as session:
        if await _is_repeated(session, job_id, number, told):
            return
        job, attempt = await current(session, job_id, number)
        await _end(session, job, attempt, told, files=files, backoff=backoff, now=now)


def end_of(job: JobRow, told: Finish, used: Usage, *, backoff: retry.Backoff, now: datetime) -> End:
    """What becomes of a job whose attempt ends like this; `used` is without that attempt's own failure."""
    if told.outcome == "succeeded":
        return _succeeded(told)
    if job.desired is Desired.CANCEL:
        return End(state=JobState.CANCELLED, message=f"cancelled by the user at step {told.step}")
    if told.outcome == "stopped" and job.state is JobState.STOPPING:
        return _stopped(told, used, pausing=job.desired is Desired.PAUSE)
    failure = failure_of(told)
    failed = retry.Failed(
        job_id=job.id,
        attempt=job.attempt,
        num_failures=used.num_failures + 1,
        max_attempts=job.max_attempts,
    )
    verdict = retry.decide(failure.kind, failure.message, failed, backoff=backoff)
    values: dict[str, Any] = {"failure_kind": failure.kind}
    if not verdict.retry:
        return End(state=JobState.FAILED, message=verdict.reason, values=values)
    if job.state is JobState.STOPPING:
        # What its user wants by now, the next pass of the dispatcher looks up.
        return End(state=JobState.PAUSED, message=f"paused after: {failure.message}", values=values)
    values["not_before"] = now + timedelta(seconds=verdict.delay_s)
    return End(state=JobState.RETRYING, message=verdict.reason, values=values)


def _stopped(told: Finish, used: Usage, *, pausing: bool) -> End:
    """Somebody here asked for it: the user, or the spec's own limit."""
    if pausing or not used.over_runtime:
        return End(state=JobState.PAUSED, message=f"paused by the user at step {told.step}")
    message = f"stopped at step {told.step}; {used.over_runtime}"
    return End(state=JobState.FAILED, message=message, values={"failure_kind": FailureKind.USER})


def failure_of(told: Finish) -> Failure:
    """Why an attempt that did not succeed ended."""
    if told.failure is not None:
        return told.failure
    if told.outcome == "stopped":
        # Nobody here asked for it, so somebody outside did.
        return Failure(kind=FailureKind.PREEMPTED, message=f"stopped from outside at step {told.step}")
    return Failure(kind=FailureKind.INFRASTRUCTURE, message="the worker failed without saying why")


def _succeeded(told: Finish) -> End:
    result = {
        "step": told.step,
        "metrics": dict(told.metrics),
        "num_files": len(told.files),
        "size_bytes": sum(entry.size for entry in told.files),
    }
    if told.warnings:
        result["warnings"] = told.warnings
    values = {"result": result, "failure_kind": None}
    message = "; warning: ".join([f"succeeded at step {told.step}", *told.warnings])
    return End(state=JobState.SUCCEEDED, message=message, values=values)


def _check_complete(job: JobRow, told: Finish) -> None:
    """Raise BrokenManifestError for a success that by its own words, or by the job's plan, is none."""
    if told.outcome != "succeeded":
        return
    if told.step != told.total_steps:
        raise BrokenManifestError(
            f"a success must come to its last step, got step {told.step} of {told.total_steps}"
        )
    planned = (job.resolved.get("plan") or {}).get("total_steps")
    if job.kind not in _UNPLANNED and told.step != planned:
        raise BrokenManifestError(
            f"a success must come to step {planned} of the job's plan, got step {told.step}"
        )
    if manifest.RESULT not in {entry.path for entry in told.files}:
        raise BrokenManifestError(f"a success must name {manifest.RESULT} among its files")


async def _is_repeated(session: AsyncSession, job_id: str, number: int, told: Finish) -> bool:
    _, attempt = await locked(session, job_id, number)
    return attempt.ended_at is not None and attempt.outcome == told.outcome


async def _real_files(store: ObjectStore, job_id: str, told: Finish) -> list[FileEntry]:
    """The files that are to be recorded. A success needs all; another end keeps what is there."""
    if told.outcome == "succeeded":
        await manifest.verify(store, job_id, told.files)
        return told.files
    return await manifest.true_ones(store, job_id, told.files)


async def _end(
    session: AsyncSession,
    job: JobRow,
    attempt: AttemptRow,
    told: Finish,
    *,
    files: Sequence[FileEntry],
    backoff: retry.Backoff,
    now: datetime,
) -> None:
    used = usage(
        await queries.attempts(session, [job.id]),
        forgiven=job.forgiven_attempts,
        limits=job.resolved.get("limits"),
        now=now,
    )
    end = end_of(job, told, used, backoff=backoff, now=now)
    attempt.ended_at, attempt.last_report_at = now, now
    attempt.outcome, attempt.last_step = told.outcome, told.step
    preempted = told.outcome == "stopped" and job.state is not JobState.STOPPING
    if told.outcome == "failed" or preempted:
        failure = failure_of(told)
        attempt.failure_kind, attempt.message = failure.kind, failure.message
    job.progress = {**job.progress, "step": told.step, "eta_s": None, "message": ""}
    points = [MetricPoint(step=told.step, key=key, value=value) for key, value in told.metrics.items()]
    await record(session, job, attempt.number, points, files, now=now)
    moved = await moves.move(
        session,
        moves.seen(job),
        end.state,
        actor="worker",
        message=end.message,
        now=now,
        values=end.values,
    )
    if not moved:
        raise ConflictError(f"job {job.id} moved meanwhile")
