"""What the user wants of a job: that it ends, pauses, goes on, or is tried again."""

from datetime import datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from service.db import moves
from service.db.failures import is_outage
from service.db.tables import JobRow
from service.domain.wishes import Verb, Wish, wish
from service.errors import ConflictError, DamagedJobError, ServiceError
from service.jobs.damaged import end_damaged
from service.jobs.references import find, find_id

_TRIES = 5
# What a job that ended must forget when its user lets it run again.
_REOPENED = {
    "finished_at": None,
    "failure_kind": None,
    "result": None,
    "not_before": None,
    # Its MLflow run is looked up and opened again by the forwarder.
    "mlflow_run_id": None,
    "mlflow_closed": False,
}


async def ask_any(session: AsyncSession, ref: str, verb: Verb, *, now: datetime) -> JobRow | str:
    """`ask`; a job whose record is damaged can be cancelled, and nothing else. Then its id is returned."""
    try:
        async with session.begin_nested():
            return await ask(session, ref, verb, now=now)
    except ServiceError as error:
        if verb is not Verb.CANCEL or not isinstance(error, DamagedJobError):
            raise
    except Exception as error:
        if is_outage(error):
            raise
        if verb is not Verb.CANCEL:
            raise DamagedJobError(f"the stored record of the job is damaged: {error}") from error
    job_id = await find_id(session, ref)
    await end_damaged(session, job_id, now=now)
    return job_id


async def ask(session: AsyncSession, ref: str, verb: Verb, *, now: datetime) -> JobRow:
    """Carry out `verb`: at once where the job holds no workers, else by way of the wish.

    Repeating it changes nothing.

    Raises:
        IllegalMoveError: the verb does not fit the job's state.
        ConflictError: the job moved each time this looked.
    """
    row = await find(session, ref)
    for _ in range(_TRIES):
        wanted = wish(verb, row.state, row.desired)
        if wanted is None or (wanted.now and row.not_before is None):
            return row
        changed = await _write(session, row, wanted, now=now)
        await session.refresh(row)
        if changed:
            return row
    raise ConflictError(f"job {row.id} kept moving; ask again")


async def _write(session: AsyncSession, row: JobRow, wanted: Wish, *, now: datetime) -> bool:
    values: dict[str, Any] = {"desired": wanted.desired, "desired_at": now}
    if wanted.fresh:
        values |= {**_REOPENED, "forgiven_attempts": row.attempt}
    if wanted.now:
        values["not_before"] = None
    if wanted.dst is not None:
        return await moves.move(
            session,
            moves.seen(row),
            wanted.dst,
            actor="user",
            message=wanted.message,
            now=now,
            values=values,
        )
    # Another version, though no move: of two wishes at one moment the second has to look again.
    values |= {"version": row.version + 1, "updated_at": now}
    if not await moves.write(session, moves.seen(row), values):
        return False
    moves.note(session, row.id, actor="user", message=wanted.message, now=now)
    return True
