"""The dispatcher's reads: rows in, plain facts out. Short transactions, nothing is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.jobs import FINAL, JobState
from service.db import moves, queries
from service.db.engine import Sessions, only_reads
from service.db.tables import AttemptRow, JobRow
from service.db.usage import usage
from service.domain.decide import Dependency, JobSeen
from service.domain.names import submission_id
from service.domain.queueing import Needs

_OPEN = frozenset(JobState) - FINAL
_LEFTOVERS_A_PASS = 50


@dataclass(frozen=True, kw_only=True)
class Observed:
    """One open job: the facts for the decision, and what the guarded write needs."""

    seen: moves.Seen
    job: JobSeen
    reason: str
    max_attempts: int

    @property
    def submission_id(self) -> str:
        """The latest attempt's id in the cluster."""
        return submission_id(self.job.id, self.job.attempt)


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """An attempt whose job has gone on without it, but whose process was not yet seen to end."""

    job_id: str
    attempt: int
    submission_id: str
    over_since: datetime


async def open_jobs(sessions: Sessions, *, now: datetime) -> list[Observed]:
    """Every job that is not final, with its attempts and the jobs it needs."""
    async with sessions.begin() as session:
        await only_reads(session)
        rows = await queries.jobs_in(session, _OPEN)
        attempts = await _attempts(session, rows)
        needed = await queries.jobs_by_id(session, {i for row in rows for i in row.inputs_wait})
    return [_observed(row, attempts.get(row.id, []), needed, now=now) for row in rows]


async def leftovers(sessions: Sessions) -> list[Leftover]:
    """Attempts that should be over, and were not yet seen to be."""
    over = or_(JobRow.state.in_(FINAL), AttemptRow.number < JobRow.attempt)
    query = (
        select(AttemptRow, JobRow.updated_at)
        .join(JobRow, JobRow.id == AttemptRow.job_id)
        .where(AttemptRow.ray_ended_at.is_(None), over)
        .order_by(AttemptRow.started_at)
        .limit(_LEFTOVERS_A_PASS)
    )
    async with sessions.begin() as session:
        await only_reads(session)
        found = (await session.execute(query)).all()
    return [
        Leftover(
            job_id=row.job_id,
            attempt=row.number,
            submission_id=row.submission_id,
            over_since=row.ended_at or moved_at,
        )
        for row, moved_at in found
    ]


async def _attempts(session: AsyncSession, rows: Sequence[JobRow]) -> dict[str, list[AttemptRow]]:
    """The attempts of each job that has any, in order."""
    started = [row.id for row in rows if row.attempt > 0]
    of: dict[str, list[AttemptRow]] = {}
    for attempt in await queries.attempts(session, started) if started else []:
        of.setdefault(attempt.job_id, []).append(attempt)
    return of


def _observed(
    row: JobRow, attempts: Sequence[AttemptRow], needed: Mapping[str, JobRow], *, now: datetime
) -> Observed:
    attempt = attempts[-1] if attempts else None
    job = JobSeen(
        id=row.id,
        state=row.state,
        desired=row.desired,
        attempt=row.attempt,
        needs=needs_of(row),
        priority=row.priority,
        created_at=row.created_at,
        since=_since(row, attempt),
        retry_at=row.not_before,
        reported_at=attempt.last_report_at if attempt else None,
        advanced_at=attempt.advanced_at if attempt else None,
        used=usage(row, attempts, now=now),
        submitted=attempt is not None and attempt.launched_at is not None,
        dependencies=tuple(_dependency(i, needed.get(i)) for i in row.inputs_wait),
    )
    return Observed(seen=moves.seen(row), job=job, reason=row.reason, max_attempts=row.max_attempts)


def _since(row: JobRow, attempt: AttemptRow | None) -> datetime:
    """When the clock of the job's state began to run."""
    if attempt is None or row.state is JobState.STOPPING:
        return row.desired_at
    return attempt.last_report_at or attempt.started_at


def _dependency(job_id: str, row: JobRow | None) -> Dependency:
    if row is None:
        return Dependency(job_id=job_id, name="deleted", state=JobState.FAILED, reason="it no longer exists")
    return Dependency(job_id=row.id, name=row.name, state=row.state, reason=row.reason)


def needs_of(row: JobRow) -> Needs:
    """CPUs and GPUs of all workers of a job."""
    resources = row.resolved["resources"]
    workers = resources["workers"]
    return Needs(
        cpus=workers * resources["cpus_per_worker"],
        gpus=workers * resources["gpus_per_worker"],
    )
