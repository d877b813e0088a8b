"""A job whose stored record cannot be read as a whole: shown as far as it can be, and ended on request.

A bug, a person or a broken disk may leave such a row. It must not hide the other jobs of a list, and its
user must be able to hear of it and to be rid of it.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.jobs import FINAL, Desired, JobState, JobView
from service.db import moves
from service.db.failures import is_outage
from service.db.moves import Seen
from service.db.tables import JobRow
from service.domain.lifecycle import MOVES
from service.errors import DamagedJobError

UNKNOWN = datetime(1, 1, 1, tzinfo=UTC)  # a moment that nobody can read
# What stands for a part that cannot be read. A job of an unknown state is as good as failed.
_BLANK: dict[str, Any] = {
    "name": "?",
    "kind": "?",
    "state": "failed",
    "desired": Desired.RUN,
    "reason": "",
    "failure_kind": None,
    "priority": 0,
    "labels": {},
    "spec": {},
    "resolved": {},
    "created_at": UNKNOWN,
    "started_at": None,
    "finished_at": None,
    "progress": {},
    "mlflow_run_id": None,
    "result": None,
}


async def damaged_view(session: AsyncSession, job_id: str) -> JobView:
    """The job with what can be read of it; its reason names the rest."""
    known: dict[str, Any] = {**_BLANK, "id": job_id if isinstance(job_id, str) else repr(job_id)}
    broken = []
    for name in _BLANK:
        try:
            value = await _column(session, job_id, name)
            JobView.model_validate({**known, name: value})
        except Exception as error:
            if is_outage(error):
                raise
            broken.append(name)
        else:
            known[name] = value
    told = f"its stored record is damaged ({', '.join(broken) or 'metrics or attempts'})"
    told += "" if known["state"] in FINAL else "; `cim cancel` ends it"
    known["reason"] = f"{told}. Before: {known['reason']}" if known["reason"] else told
    return JobView.model_validate(known)


async def end_damaged(session: AsyncSession, job_id: str, *, now: datetime) -> None:
    """End a job whose record cannot be read, at its user's wish. One that is final stays as it is.

    It may hold workers, whom nobody can ask to stop: its attempt is fenced off and cleared away.

    Raises:
        DamagedJobError: not even its state can be read and written.
    """
    message = "ended by the user, because its stored record was damaged"
    try:
        async with session.begin_nested():
            state = await _column(session, job_id, "state")
            version = await _column(session, job_id, "version")
            if state not in FINAL:
                dst = JobState.CANCELLED if JobState.CANCELLED in MOVES[state] else JobState.FAILED
                seen = Seen(job_id, state, version)
                await moves.move(session, seen, dst, actor="user", message=message, now=now)
    except Exception as error:
        if is_outage(error):
            raise
        raise DamagedJobError(
            f"not even the state of job {job_id} can be read and written ({type(error).__name__}: {error}): "
            "whoever runs the service has to repair its row in the database"
        ) from error


async def _column(session: AsyncSession, job_id: str, name: str) -> Any:
    return await session.scalar(select(getattr(JobRow, name)).where(JobRow.id == job_id))
