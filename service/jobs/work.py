"""What the worker of an attempt asks and tells. Every call may be repeated.

The fence: a call counts only while its attempt is the job's latest and the job is not final. The
job's row is locked from that check until what was told is committed, so nothing slips through
between the two.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.allowed import Allowed
from service.contracts.jobs import FINAL, Desired, FileEntry, JobState, MetricPoint
from service.contracts.work import Assignment, Checkpoint, Report, ReportReply, StoreAddress
from service.db import moves, queries
from service.db.engine import Sessions
from service.db.failures import is_outage
from service.db.tables import AttemptRow, CheckpointRow, FileRow, JobRow, MetricRow
from service.domain.names import checkpoint_prefix, job_prefix
from service.errors import BrokenManifestError, DamagedJobError, NotFoundError, StaleAttemptError
from service.jobs import manifest
from service.store.base import ObjectStore

# Kind of a job: what it takes from another one, and where its spec says from which.
_INPUTS = {"pretrain": ("tokenizer", ("model", "tokenizer", "source")), "evaluate": ("encoder", ("encoder",))}


async def assignment(
    session: AsyncSession, job_id: str, number: int, *, store: StoreAddress, allowed: Allowed
) -> Assignment:
    """All that the worker needs, with the last committed checkpoint of this or an earlier attempt."""
    job, attempt = await current(session, job_id, number)
    checkpoint = await queries.last_checkpoint(session, job_id)
    if attempt.last_report_at is None and checkpoint is not None:
        attempt.resumed_from_step = checkpoint.step
    return Assignment(
        job_id=job_id,
        attempt=number,
        spec=job.resolved,
        submitted=job.spec,
        inputs=_inputs(job),
        store=store,
        checkpoint=_checkpoint(checkpoint),
        allowed=list(allowed.prefixes),
    )


async def report(
    session: AsyncSession, job_id: str, number: int, told: Report, *, now: datetime
) -> ReportReply:
    """Take progress, metrics and finished files; say whether to go on."""
    job, attempt = await current(session, job_id, number)
    if job.state is JobState.LAUNCHING:
        message = f"attempt {number} is running"
        await moves.move(session, moves.seen(job), JobState.RUNNING, actor="worker", message=message, now=now)
    attempt.last_report_at = now
    attempt.advanced_at = now - timedelta(seconds=told.idle_s)
    attempt.last_step = told.progress.step
    job.progress = told.progress.model_dump()
    job.updated_at = now
    if told.plan is not None:
        job.resolved = {**job.resolved, "plan": told.plan}
    await record(session, job, number, told.metrics, told.files, now=now)
    goes_on = job.desired is Desired.RUN and job.state is not JobState.STOPPING
    return ReportReply(directive="continue" if goes_on else "stop")


async def commit_checkpoint(
    sessions: Sessions, store: ObjectStore, job_id: str, number: int, told: Checkpoint, *, now: datetime
) -> None:
    """Make a checkpoint real, once all its files are seen in the object store with their checksums.

    Raises BrokenManifestError where one is not, or where the manifest names another attempt's files.
    """
    place = checkpoint_prefix(number, told.step)
    if told.prefix != place or not told.files:
        raise BrokenManifestError(
            f"the checkpoint of attempt {number} at step {told.step} must hold files below {place}, "
            f"got {len(told.files)} below {told.prefix!r}"
        )
    if strays := [entry.path for entry in told.files if not entry.path.startswith(f"{told.prefix}/")]:
        raise BrokenManifestError(f"{strays[0]} does not lie below {told.prefix}")
    async with sessions.begin() as session:
        await current(session, job_id, number)
        if await _is_known(session, job_id, number, told):
            return
        if await _is_overtaken(session, job_id, number, told.step):
            return
    await manifest.verify(store, job_id, told.files)
    async with sessions.begin() as session:
        await current(session, job_id, number)
        if await _is_overtaken(session, job_id, number, told.step):
            return
        row = {
            "job_id": job_id,
            "attempt": number,
            "step": told.step,
            "prefix": told.prefix,
            "files": [entry.model_dump() for entry in told.files],
            "at": now,
        }
        if await session.get(CheckpointRow, (job_id, number, told.step)) is None:
            message = f"attempt {number} committed a checkpoint at step {told.step}"
            moves.note(session, job_id, actor="worker", message=message, now=now)
        await queries.upsert(session, CheckpointRow, [row], key=("job_id", "attempt", "step"))


async def _is_known(session: AsyncSession, job_id: str, number: int, told: Checkpoint) -> bool:
    """Whether this is a repetition, whose files need not be read again."""
    row = await session.get(CheckpointRow, (job_id, number, told.step))
    return row is not None and row.files == [entry.model_dump() for entry in told.files]


async def _is_overtaken(session: AsyncSession, job_id: str, number: int, step: int) -> bool:
    """Whether this can only be a late repetition: its files may be gone, and must not be named again.

    An attempt commits in the order of its steps, so a step below a committed one that has no row
    has had one, which went as garbage. `service.domain.garbage` relies on this.
    """
    if await session.get(CheckpointRow, (job_id, number, step)) is not None:
        return False
    newest = await queries.newest_step(session, job_id, number)
    return newest is not None and step < newest


async def current(session: AsyncSession, job_id: str, number: int) -> tuple[JobRow, AttemptRow]:
    """The locked job and its attempt.

    Raises StaleAttemptError unless the attempt is the job's latest and may still write.
    """
    job, attempt = await locked(session, job_id, number)
    if attempt.number != job.attempt:
        raise StaleAttemptError(f"attempt {number} of job {job_id} was replaced by attempt {job.attempt}")
    if job.state in FINAL or attempt.ended_at is not None:
        raise StaleAttemptError(f"attempt {number} of job {job_id} is over, the job is {job.state}")
    return job, attempt


async def locked(session: AsyncSession, job_id: str, number: int) -> tuple[JobRow, AttemptRow]:
    """The locked job and one of its attempts, whatever their state. Raises DamagedJobError."""
    try:
        job = await queries.job(session, job_id, lock=True)
        attempt = await queries.attempt(session, job_id, number, fresh=True)
    except Exception as error:
        if is_outage(error):
            raise
        raise DamagedJobError(f"the stored record of job {job_id} is damaged: {error}") from error
    if job is None or attempt is None:
        raise NotFoundError(f"job {job_id} has no attempt {number}")
    return job, attempt


async def record(
    session: AsyncSession,
    job: JobRow,
    number: int,
    points: Sequence[MetricPoint],
    files: Sequence[FileEntry],
    *,
    now: datetime,
) -> None:
    """Store points and files in the place of those of the same key and step, or path."""
    if points:
        in_order = sorted(points, key=lambda point: point.step)
        job.latest = {**job.latest, **{point.key: [point.step, point.value] for point in in_order}}
    whose = {"job_id": job.id, "attempt": number, "at": now}
    metrics = [{**whose, **point.model_dump()} for point in points]
    # A tracker takes a point that comes again at another moment for another point.
    await queries.upsert(session, MetricRow, metrics, key=("job_id", "key", "step"), first=["at"])
    entries = [{**whose, **entry.model_dump()} for entry in files]
    await queries.upsert(session, FileRow, entries, key=("job_id", "path"))


def _inputs(job: JobRow) -> dict[str, str]:
    """Where the artifacts that the spec refers to lie: a prefix in the store, or the address given."""
    if job.kind not in _INPUTS:
        return {}
    name, place = _INPUTS[job.kind]
    address: Any = job.resolved
    for key in place:
        address = address.get(key)
        if address is None:  # a method of pre-training that has no tokenizer
            return {}
    target = address.removeprefix("job:")
    return {name: f"{job_prefix(target)}/{name}" if address.startswith("job:") else address}


def _checkpoint(row: CheckpointRow | None) -> Checkpoint | None:
    if row is None:
        return None
    files = [FileEntry.model_validate(entry) for entry in row.files]
    return Checkpoint(step=row.step, prefix=row.prefix, files=files)
