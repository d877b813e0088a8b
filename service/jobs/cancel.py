"""The wish that a job should end."""

from datetime import datetime

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.jobs import FINAL, Desired, JobState
from service.db import moves
from service.db.tables import JobRow
from service.domain.lifecycle import HOLDS_WORKERS
from service.errors import ConflictError
from service.jobs.references import find

_TRIES = 5


async def cancel(session: AsyncSession, ref: str, *, now: datetime) -> JobRow:
    """Cancel a job that holds no workers at once; ask one that does to stop with a checkpoint.

    Repeating it, and cancelling a final job, changes nothing.

    Raises ConflictError if the job moved each time this looked.
    """
    row = await find(session, ref)
    for _ in range(_TRIES):
        if row.state in FINAL or row.desired is Desired.CANCEL:
            return row
        changed = await _ask(session, row, now=now)
        await session.refresh(row)
        if changed:
            return row
    raise ConflictError(f"job {row.id} kept moving; ask again")


async def _ask(session: AsyncSession, row: JobRow, *, now: datetime) -> bool:
    wish = {"desired": Desired.CANCEL, "desired_at": now}
    if row.state is JobState.STOPPING:
        # It was to be paused: only the wish changes.
        told = await session.scalar(
            update(JobRow)
            .where(JobRow.id == row.id, JobRow.version == row.version)
            .values(**wish, updated_at=now)
            .returning(JobRow.id)
            .execution_options(synchronize_session=False)
        )
        return told is not None
    busy = row.state in HOLDS_WORKERS
    return await moves.move(
        session,
        moves.seen(row),
        JobState.STOPPING if busy else JobState.CANCELLED,
        actor="user",
        message="cancelled by the user, waiting for its workers to stop" if busy else "cancelled by the user",
        now=now,
        values=wish,
    )
