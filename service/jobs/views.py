"""Rows as the contracts that clients see."""

from collections.abc import Iterable, Sequence

from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.jobs import AttemptView, EventView, FileEntry, JobView, MetricPoint, Progress
from service.db import queries
from service.db.tables import AttemptRow, EventRow, FileRow, JobRow, MetricRow


async def to_views(session: AsyncSession, rows: Sequence[JobRow], *, mlflow_url: str | None) -> list[JobView]:
    """Jobs with their attempts. `mlflow_url` is MLflow's address as a browser reaches it."""
    attempts: dict[str, list[AttemptRow]] = {row.id: [] for row in rows}
    if started := [row.id for row in rows if row.attempt > 0]:
        for attempt in await queries.attempts(session, started):
            attempts[attempt.job_id].append(attempt)
    return [_view(row, attempts[row.id], mlflow_url=mlflow_url) for row in rows]


async def to_view(session: AsyncSession, row: JobRow, *, mlflow_url: str | None) -> JobView:
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
