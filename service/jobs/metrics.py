"""A job's curves."""

from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.jobs import MetricPoint
from service.db import queries
from service.jobs.references import find, find_id
from service.jobs.views import to_point

MOST_POINTS = 100_000


async def metrics(
    session: AsyncSession, ref: str, *, key: str | None, latest: bool, after_step: int
) -> list[MetricPoint]:
    """Points beyond `after_step` by step and key, of all curves or of one; at most `MOST_POINTS`.

    `latest` gives only the last reported point of each.
    """
    if latest:
        job = await find(session, ref)
        points = [MetricPoint(step=step, key=name, value=value) for name, (step, value) in job.latest.items()]
        return [p for p in points if p.step > after_step and key in (None, p.key)]
    job_id = await find_id(session, ref)
    rows = await queries.metrics(session, job_id, key=key, after_step=after_step, limit=MOST_POINTS)
    return [to_point(row) for row in rows]
