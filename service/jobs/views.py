"""Rows as the contracts that clients see."""

from collections.abc import Iterable, Mapping, Sequence

from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.jobs import AttemptView, EventView, FileEntry, JobView, MetricPoint, Progress
from service.db import queries
from service.db.failures import is_outage
from service.db.tables import AttemptRow, EventRow, FileRow, JobRow, MetricRow
from service.jobs.damaged import damaged_view


async def to_views(
    session: AsyncSession, rows: Sequence[JobRow | str], *, mlflow_url: str | None
) -> list[JobView]:
    """Jobs with their attempts; of one that is an id alone, and of one that makes no sense, what can be read.

    `mlflow_url` is MLflow's address as a browser reaches it.
    """
    whole = [row for row in rows if isinstance(row, JobRow)]
    attempts = await _attempts(session, [row.id for row in whole if row.attempt != 0])
    return [await _any_view(session, row, attempts, mlflow_url=mlflow_url) for row in rows]


async def _attempts(session: AsyncSession, job_ids: Sequence[str]) -> dict[str, list[AttemptRow]]:
    """Attempts by job; a job whose attempts cannot be read is left out."""
    try:
        found = await queries.attempts(session, job_ids) if job_ids else []
    except Exception as error:
        if is_outage(error):
            raise
        if len(job_ids) == 1:
            return {}
        middle = len(job_ids) // 2
        return await _attempts(session, job_ids[:middle]) | await _attempts(session, job_ids[middle:])
    attempts: dict[str, list[AttemptRow]] = {job_id: [] for job_id in job_ids}
    for attempt in found:
        attempts[attempt.job_id].append(attempt)
    return attempts


async def _any_view(
    session: AsyncSession,
    row: JobRow | str,
    attempts: Mapping[str, list[AttemptRow]],
    *,
    mlflow_url: str | None,
) -> JobView:
    if isinstance(row, str):
        return await damaged_view(session, row)
    try:
        return _view(row, attempts[row.id] if row.attempt != 0 else [], mlflow_url=mlflow_url)
    except (ValueError, TypeError, LookupError, AttributeError):  # ValidationError is a ValueError
        return await damaged_view(session, row.id)


async def to_view(session: AsyncSession, row: JobRow | str, *, mlflow_url: str | None) -> JobView:
    """One job with its attempts."""
    return (await to_views(session, [row], mlflow_url=mlflow_url))[0]


def to_event(row: EventRow) -> EventView:
    """One event."""
    return EventView(id=row.id, at=row.at, src=row.src, dst=row.dst, actor=row.actor, message=row.message)


def to_point(row: MetricRow) -> MetricPoint:
    """One point of a curve."""
    return MetricPoint(step=row.step, key=row.key, value=row.value)


def to_file(row: FileRow) -> FileEntry:
    """One artifact."""
    return FileEntry(path=row.path, size=row.size, sha256=row.sha256)


def _view(row: JobRow, attempts: Iterable[AttemptRow], *, mlflow_url: str | None) -> JobView:
    run = row.mlflow_run_id
    return JobView(
        id=row.id,
        name=row.name,
        kind=row.kind,
        state=row.state,
        desired=row.desired,
        reason=row.reason,
        failure_kind=row.failure_kind,
        priority=row.priority,
        labels=row.labels,
        spec=row.spec,
        resolved=row.resolved,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        attempts=[_attempt(attempt) for attempt in attempts],
        progress=Progress.model_validate(row.progress),
        metrics={key: value for key, (_, value) in row.latest.items()},
        mlflow_run_id=run,
        mlflow_url=f"{mlflow_url.rstrip('/')}/#/runs/{run}" if mlflow_url and run else None,
        result=row.result,
    )


def _attempt(row: AttemptRow) -> AttemptView:
    return AttemptView(
        number=row.number,
        submission_id=row.submission_id,
        started_at=row.started_at,
        ended_at=row.ended_at,
        outcome=row.outcome,
        failure_kind=row.failure_kind,
        message=row.message,
        resumed_from_step=row.resumed_from_step,
    )
