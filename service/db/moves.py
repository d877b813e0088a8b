"""The only code that writes `jobs.state`: a job's first state, and every move after it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import func, update
from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.jobs import FINAL, Desired, JobState
from service.db.tables import EventRow, JobRow
from service.domain import lifecycle

Actor = Literal["user", "worker", "dispatcher"]


@dataclass(frozen=True, slots=True)
class Seen:
    """A job as the caller last read it."""

    id: str
    state: JobState
    version: int


def seen(job: JobRow) -> Seen:
    """What `job` looked like when it was read."""
    return Seen(job.id, job.state, job.version)


def enqueue(session: AsyncSession, *, job_id: str, now: datetime, values: Mapping[str, Any]) -> JobRow:
    """Add a new job, queued, with its first event. `values` are the other columns."""
    row = JobRow(
        id=job_id,
        state=JobState.QUEUED,
        desired=Desired.RUN,
        desired_at=now,
        version=0,
        created_at=now,
        updated_at=now,
        attempt=0,
        progress={},
        latest={},
        **values,
    )
    session.add(row)
    session.add(EventRow(job=row, at=now, dst=JobState.QUEUED, actor="user", message="submitted"))
    return row


async def move(
    session: AsyncSession,
    seen: Seen,
    dst: JobState,
    *,
    actor: Actor,
    message: str,
    now: datetime,
    values: Mapping[str, Any] | None = None,
) -> bool:
    """Move a job on and record why, in the caller's transaction.

    `message` becomes the job's reason, unless `values`, further columns of the job to write with
    the move, brings its own. When a job starts and ends is noted here.

    Returns:
        False if the job has moved since the caller looked. Nothing is written then, and whatever
        the caller computed from the stale row must be dropped. Rows already loaded are not
        refreshed: read them again (`queries.job(..., fresh=True)`).

    Raises:
        IllegalMoveError: the table does not know this move.
    """
    lifecycle.check(seen.state, dst, by_user=actor == "user")
    columns: dict[str, Any] = {"reason": message, **(values or {})}
    columns |= {"state": dst, "version": seen.version + 1, "updated_at": now}
    if dst in FINAL:
        columns["finished_at"] = now
    if dst is JobState.RUNNING:
        columns["started_at"] = func.coalesce(JobRow.started_at, now)
    if not await write(session, seen, columns):
        return False
    session.add(EventRow(job_id=seen.id, at=now, src=seen.state, dst=dst, actor=actor, message=message))
    return True


async def write(session: AsyncSession, seen: Seen, columns: Mapping[str, Any]) -> bool:
    """Write columns of a job; False, and nothing, if it has moved since the caller looked."""
    # Guarded by the version, not the state: a retried job is `launching` twice.
    won = await session.scalar(
        update(JobRow)
        .where(JobRow.id == seen.id, JobRow.version == seen.version)
        .values(**columns)
        .returning(JobRow.id)
        .execution_options(synchronize_session=False)
    )
    return won is not None


async def write_reasons(session: AsyncSession, told: Sequence[tuple[Seen, str]], *, now: datetime) -> None:
    """Write why jobs wait; those that have moved since the caller looked keep theirs."""
    alike: dict[tuple[str, int], list[str]] = {}
    for seen, text in told:
        alike.setdefault((text, seen.version), []).append(seen.id)
    for (text, version), ids in alike.items():  # few: most of a queue waits for its turn
        await session.execute(
            update(JobRow)
            .where(JobRow.id.in_(ids), JobRow.version == version)
            .values(reason=text, updated_at=now)
            .execution_options(synchronize_session=False)
        )


def note(session: AsyncSession, job_id: str, *, actor: Actor, message: str, now: datetime) -> None:
    """Record something that happened to a job without moving it."""
    session.add(EventRow(job_id=job_id, at=now, actor=actor, message=message))
