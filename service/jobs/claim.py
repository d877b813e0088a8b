"""Who speaks for an attempt: the first worker that comes with its code, and nobody after it."""

import hmac
from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.tokens import token_fits
from service.contracts.work import Claim
from service.db import moves, queries
from service.db.engine import Sessions, only_reads
from service.errors import AttemptClaimedError
from service.jobs.work import current


async def claim(sessions: Sessions, job_id: str, number: int, told: Claim, *, now: datetime) -> None:
    """Let the worker that made `told` speak for the attempt. Repeating it is harmless.

    Raises:
        AttemptClaimedError: another worker does; the job's events say that somebody tried.
        StaleAttemptError: the attempt may no longer write.
    """
    async with sessions.begin() as session:
        _, attempt = await current(session, job_id, number)
        if attempt.token_hash is None:
            attempt.token_hash = told.token_hash
        if hmac.compare_digest(attempt.token_hash, told.token_hash):
            return
        await _note_intruder(session, job_id, number, now=now)
    # Raised outside: the event must be committed.
    raise AttemptClaimedError(
        f"attempt {number} of job {job_id} belongs to another worker already; end without writing anything"
    )


async def speaks_for(sessions: Sessions, job_id: str, number: int, token: str) -> bool:
    """Whether `token` is the one that the attempt was claimed with."""
    async with sessions.begin() as session:
        await only_reads(session)
        attempt = await queries.attempt(session, job_id, number)
    digest = attempt.token_hash if attempt is not None else None
    return digest is not None and token_fits(token, digest=digest)


async def _note_intruder(session: AsyncSession, job_id: str, number: int, *, now: datetime) -> None:
    """Once an attempt: whoever has the code could fill the table otherwise."""
    message = f"a second worker tried to claim attempt {number}"
    if not await queries.has_event(session, job_id, message):
        moves.note(session, job_id, actor="worker", message=message, now=now)
