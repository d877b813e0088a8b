"""What happened to a job."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence

from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.jobs import FINAL, EventView
from service.db import queries
from service.db.engine import Sessions, only_reads
from service.db.tables import EventRow
from service.jobs.views import to_event

_ROWS_A_READ = 1000
_ROW = re.compile(r"[0-9]{1,18}")


async def events(sessions: Sessions, job_id: str) -> list[EventView]:
    """All of a job's events, oldest first."""
    found: list[EventView] = []
    async with sessions.begin() as session:
        await only_reads(session)
        while rows := await _after(session, job_id, found[-1].id if found else 0):
            found += [to_event(row) for row in rows]
    return found


async def follow(sessions: Sessions, job_id: str, *, after: int, poll_s: float) -> AsyncIterator[EventView]:
    """Events with an id above `after`, and those to come, until the job is final and all are told.

    Between two looks, `poll_s` seconds apart, no connection to the database is held.
    """
    while True:
        async with sessions.begin() as session:
            await only_reads(session)
            # The state is read before the events: whatever made it final is then among them.
            state = await queries.state(session, job_id)
            rows = await _after(session, job_id, after)
        for row in rows:
            yield to_event(row)
            after = row.id
        if not rows:
            if state is None or state in FINAL:
                return
            await asyncio.sleep(poll_s)


def from_cursor(text: str | None) -> int:
    """The event that a broken stream ended with; what is none means the beginning."""
    return int(text) if text and _ROW.fullmatch(text) else 0


async def _after(session: AsyncSession, job_id: str, after: int) -> Sequence[EventRow]:
    return await queries.events(session, job_id, after=after, limit=_ROWS_A_READ)
