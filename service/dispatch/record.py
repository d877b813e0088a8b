"""The dispatcher's writes. Each is one short transaction, guarded by its lease and by what was seen before.

Any of them may raise LeaseLostError; nothing is written then.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.jobs import FINAL, Desired, FailureKind, JobState
from service.db import moves
from service.db.leases import GuardedSessions
from service.db.tables import AttemptRow, JobRow
from service.dispatch.observe import Observed
from service.domain import retry
from service.domain.decide import Change, Lost
from service.domain.names import submission_id
from service.jobs.damaged import end_damaged

_REASONS_AT_ONCE = 1000


async def is_current(sessions: GuardedSessions, seen: moves.Seen) -> bool:
    """Whether the job has not moved since; asked before the cluster is told something about it."""
    async with sessions.begin() as session:
        version = await session.scalar(select(JobRow.version).where(JobRow.id == seen.id))
        return version == seen.version


async def reasons(
    sessions: GuardedSessions, told: Sequence[tuple[moves.Seen, str]], *, now: datetime
) -> None:
    """Let waiting jobs say what they wait for. No events: it may change with every pass."""
    for first in range(0, len(told), _REASONS_AT_ONCE):
        async with sessions.begin() as session:
            await moves.write_reasons(session, told[first : first + _REASONS_AT_ONCE], now=now)


async def tell(sessions: GuardedSessions, job_id: str, text: str, *, now: datetime) -> str:
    """Let a job say what is wrong with it, whatever else its row holds; what its reason was before.

    A final job keeps the reason of its end. For both it is an event.
    """
    async with sessions.begin() as session:
        before = await session.scalar(select(JobRow.reason).where(JobRow.id == job_id))
        await session.execute(
            update(JobRow).where(JobRow.id == job_id, JobRow.state.not_in(FINAL)).values(reason=text)
        )
        moves.note(session, job_id, actor="dispatcher", message=text, now=now)
    return str(before or "")


async def end_unreadable(sessions: GuardedSessions, job_id: str, *, now: datetime) -> None:
    """End a job of which no turn comes to anything, if that is what its user wants."""
    async with sessions.begin() as session:
        if await session.scalar(select(JobRow.desired).where(JobRow.id == job_id)) is Desired.CANCEL:
            await end_damaged(session, job_id, now=now)


async def untell(sessions: GuardedSessions, job_id: str, text: str, *, before: str) -> None:
    """Take back what `tell` has written, unless the job has another reason by now."""
    async with sessions.begin() as session:
        await session.execute(
            update(JobRow).where(JobRow.id == job_id, JobRow.reason == text).values(reason=before)
        )


async def change(sessions: GuardedSessions, observed: Observed, decided: Change, *, now: datetime) -> bool:
    """Move a job; the attempt of one that was stopping ends with it."""
    values = {"failure_kind": decided.failure_kind} if decided.failure_kind else {}
    async with sessions.begin() as session:
        moved = await moves.move(
            session,
            observed.seen,
            decided.dst,
            actor="dispatcher",
            message=decided.reason,
            now=now,
            values=values,
        )
        if moved and observed.job.state is JobState.STOPPING:
            await _end_attempt(session, observed, now=now, values={"outcome": "stopped"})
        return moved


async def raise_fence(sessions: GuardedSessions, observed: Observed, *, now: datetime) -> int | None:
    """Begin the next attempt, from now on the only one that may write.

    Returns:
        Its number, or None if the job has moved meanwhile.
    """
    number = observed.job.attempt + 1
    async with sessions.begin() as session:
        moved = await moves.move(
            session,
            observed.seen,
            JobState.LAUNCHING,
            actor="dispatcher",
            message=f"attempt {number} is starting",
            now=now,
            values={"attempt": number, "not_before": None, "failure_kind": None},
        )
        if not moved:
            return None
        row = AttemptRow(
            job_id=observed.job.id,
            number=number,
            submission_id=submission_id(observed.job.id, number),
            started_at=now,
        )
        session.add(row)
    return number


async def lost(
    sessions: GuardedSessions, observed: Observed, decided: Lost, *, backoff: retry.Backoff, now: datetime
) -> bool:
    """End the attempt as failed, and let the retry rule say what becomes of its job.

    Nothing is written about an attempt that has reported since it was looked at.
    """
    failed = retry.Failed(
        job_id=observed.job.id,
        attempt=observed.job.attempt,
        num_failures=observed.job.used.num_failures + 1,
        max_attempts=observed.max_attempts,
    )
    verdict = retry.decide(decided.kind, decided.message, failed, backoff=backoff)
    values: dict[str, Any] = {"failure_kind": decided.kind}
    if verdict.retry:
        values["not_before"] = now + timedelta(seconds=verdict.delay_s)
    async with sessions.begin() as session:
        # Reports lock the job's row too, so none comes in between.
        await session.execute(select(JobRow.id).where(JobRow.id == observed.job.id).with_for_update())
        reported_at = await session.scalar(
            select(AttemptRow.last_report_at).where(
                AttemptRow.job_id == observed.job.id, AttemptRow.number == observed.job.attempt
            )
        )
        if reported_at != observed.job.reported_at:
            return False
        moved = await moves.move(
            session,
            observed.seen,
            JobState.RETRYING if verdict.retry else JobState.FAILED,
            actor="dispatcher",
            message=verdict.reason,
            now=now,
            values=values,
        )
        if moved:
            await _end_attempt(session, observed, now=now, values=_failed(decided.kind, decided.message))
        return moved


async def submitted(sessions: GuardedSessions, job_id: str, attempt: int, *, now: datetime) -> None:
    """Note that the cluster has taken an attempt."""
    await _stamp(sessions, job_id, attempt, column="launched_at", now=now)


async def stop_sent(sessions: GuardedSessions, job_id: str, attempt: int, *, now: datetime) -> None:
    """Note that the cluster is asked to end an attempt."""
    await _stamp(sessions, job_id, attempt, column="stop_sent_at", now=now)


async def gone(sessions: GuardedSessions, job_id: str, attempt: int, *, now: datetime) -> None:
    """Note that the cluster runs an attempt no longer."""
    await _stamp(sessions, job_id, attempt, column="ray_ended_at", now=now)


def _failed(kind: FailureKind, message: str) -> dict[str, Any]:
    return {"outcome": "failed", "failure_kind": kind, "message": message}


async def _end_attempt(
    session: AsyncSession, observed: Observed, *, now: datetime, values: Mapping[str, Any]
) -> None:
    """End the attempt, unless the worker has done so itself."""
    job = observed.job
    await session.execute(
        update(AttemptRow)
        .where(AttemptRow.job_id == job.id, AttemptRow.number == job.attempt, AttemptRow.ended_at.is_(None))
        .values(ended_at=now, **values)
    )


async def _stamp(sessions: GuardedSessions, job_id: str, attempt: int, *, column: str, now: datetime) -> None:
    """Set a moment once; the first one stays."""
    row = getattr(AttemptRow, column)
    async with sessions.begin() as session:
        await session.execute(
            update(AttemptRow)
            .where(AttemptRow.job_id == job_id, AttemptRow.number == attempt, row.is_(None))
            .values({column: now})
        )
