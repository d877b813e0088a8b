"""Reads, and the writes that replace a row of the same key. Nothing here touches `jobs.state`."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, Text, and_, case, func, or_, select, tuple_, type_coerce
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.jobs import JobState
from service.db.failures import is_outage
from service.db.tables import (
    AttemptRow,
    Base,
    CheckpointRow,
    EventRow,
    FileRow,
    JobRow,
    MetricRow,
    SubmissionRow,
)
from service.domain.names import JOB_ID_LENGTH

# Both dialects spell `ON CONFLICT` alike, but SQLAlchemy gives them no common type.
_LATEST = datetime(9999, 12, 31, tzinfo=UTC)
Row = TypeVar("Row")
INSERT: Mapping[str, Any] = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}


@dataclass(frozen=True, kw_only=True)
class JobFilter:
    """Which jobs a list shows; None and empty mean all."""

    states: Collection[JobState] = ()
    kinds: Collection[str] = ()
    name: str | None = None
    labels: Mapping[str, str] | None = None
    text: str | None = None  # part of the name or id


async def job(
    session: AsyncSession, job_id: str, *, fresh: bool = False, lock: bool = False
) -> JobRow | None:
    """The job of a full id.

    `fresh` reads again what this session already holds. `lock` does that too and keeps others
    from writing the row until the transaction ends (on SQLite a writer is alone anyway).
    """
    return await session.get(JobRow, job_id, populate_existing=fresh or lock, with_for_update=lock or None)


async def jobs_by_id(session: AsyncSession, job_ids: Collection[str]) -> dict[str, JobRow]:
    """Those of the jobs that exist, by id."""
    rows = await session.scalars(select(JobRow).where(JobRow.id.in_(job_ids)))
    return {row.id: row for row in rows}


async def exists(session: AsyncSession, job_id: str) -> bool:
    """Whether there is a job of that id."""
    return await session.scalar(select(JobRow.id).where(JobRow.id == job_id)) is not None


async def state(session: AsyncSession, job_id: str) -> JobState | None:
    """The job's state; None where there is no such job."""
    found: JobState | None = await session.scalar(select(JobRow.state).where(JobRow.id == job_id))
    return found


async def jobs_starting_with(session: AsyncSession, prefix: str, *, limit: int) -> list[tuple[str, str]]:
    """Ids and names of jobs whose id starts with `prefix`, newest first."""
    if len(prefix) > JOB_ID_LENGTH:
        return []
    query = starting_with(prefix).with_only_columns(JobRow.id, JobRow.name).limit(limit)
    return [(row.id, row.name) for row in await session.execute(query)]


async def latest_named(session: AsyncSession, name: str) -> str | None:
    """The id of the newest job of that name."""
    found: str | None = await session.scalar(_newest(select(JobRow.id).where(JobRow.name == name)).limit(1))
    return found


async def page(
    session: AsyncSession, wanted: JobFilter, *, limit: int, before: tuple[datetime, str] | None
) -> list[JobRow | str]:
    """At most `limit` jobs, newest first, older than the job at `before` (its creation, its id).

    Of one whose row cannot be read there is the id alone.
    """
    query = newest(wanted, dialect=session.get_bind().dialect.name)
    if before is not None:
        query = query.where(tuple_(JobRow.created_at, JobRow.id) < before)
    try:
        return [*await session.scalars(query.limit(limit))]
    except Exception as error:
        if is_outage(error):
            raise
    # What was created at no moment of ours has no place in the order.
    placed = query.where(JobRow.created_at.between(datetime.min.replace(tzinfo=UTC), _LATEST))
    ids = (await session.scalars(placed.with_only_columns(JobRow.id).limit(limit))).all()
    return [await _job_or_id(session, job_id) for job_id in ids]


async def _job_or_id(session: AsyncSession, job_id: str) -> JobRow | str:
    try:
        row = await job(session, job_id)
    except Exception as error:
        if is_outage(error):
            raise
        return job_id
    return row or job_id


async def attempt(
    session: AsyncSession, job_id: str, number: int, *, fresh: bool = False
) -> AttemptRow | None:
    """One attempt of a job."""
    return await session.get(AttemptRow, (job_id, number), populate_existing=fresh)


async def attempts(session: AsyncSession, job_ids: Collection[str]) -> Sequence[AttemptRow]:
    """All attempts of these jobs, in order."""
    query = select(AttemptRow).where(AttemptRow.job_id.in_(job_ids))
    return (await session.scalars(query.order_by(AttemptRow.job_id, AttemptRow.number))).all()


async def last_checkpoint(session: AsyncSession, job_id: str) -> CheckpointRow | None:
    """The committed checkpoint that has come furthest."""
    query = select(CheckpointRow).where(CheckpointRow.job_id == job_id)
    row: CheckpointRow | None = await session.scalar(
        query.order_by(CheckpointRow.step.desc(), CheckpointRow.attempt.desc()).limit(1)
    )
    return row


async def checkpoints(session: AsyncSession, job_id: str) -> Sequence[CheckpointRow]:
    """Every committed checkpoint of a job."""
    return (await session.scalars(select(CheckpointRow).where(CheckpointRow.job_id == job_id))).all()


async def newest_step(session: AsyncSession, job_id: str, attempt: int) -> int | None:
    """The step of the attempt's newest committed checkpoint."""
    step: int | None = await session.scalar(
        select(func.max(CheckpointRow.step)).where(
            CheckpointRow.job_id == job_id, CheckpointRow.attempt == attempt
        )
    )
    return step


async def jobs_to_clean(session: AsyncSession, *, after: str, limit: int) -> Sequence[str]:
    """Ids beyond `after`, in order, of jobs with an attempt that may have left something behind."""
    query = select(JobRow.id).where(JobRow.attempt > JobRow.clean_attempt, JobRow.id > after)
    return (await session.scalars(query.order_by(JobRow.id).limit(limit))).all()


async def events(session: AsyncSession, job_id: str, *, after: int, limit: int) -> Sequence[EventRow]:
    """Events of a job with an id above `after`, in order."""
    query = select(EventRow).where(EventRow.job_id == job_id, EventRow.id > after)
    return (await session.scalars(query.order_by(EventRow.id).limit(limit))).all()


async def has_event(session: AsyncSession, job_id: str, message: str) -> bool:
    """Whether a job has an event of exactly that message."""
    query = select(EventRow.id).where(EventRow.job_id == job_id, EventRow.message == message)
    return await session.scalar(query.limit(1)) is not None


async def metrics(
    session: AsyncSession, job_id: str, *, key: str | None = None, after_step: int = -1, limit: int
) -> Sequence[MetricRow]:
    """Points of a job's curves (or of one) beyond `after_step`, by step and key."""
    query = select(MetricRow).where(MetricRow.job_id == job_id, MetricRow.step > after_step)
    if key is not None:
        query = query.where(MetricRow.key == key)
    return (await session.scalars(query.order_by(MetricRow.step, MetricRow.key).limit(limit))).all()


async def metrics_beyond(session: AsyncSession, job_id: str, *, mark: int, limit: int) -> Sequence[MetricRow]:
    """Points that came in after row `mark`, in the order in which they came."""
    query = select(MetricRow).where(MetricRow.job_id == job_id, MetricRow.id > mark)
    return (await session.scalars(query.order_by(MetricRow.id).limit(limit))).all()


async def files(session: AsyncSession, job_id: str) -> Sequence[FileRow]:
    """Every artifact of a job, by path."""
    query = select(FileRow).where(FileRow.job_id == job_id).order_by(FileRow.path)
    return (await session.scalars(query)).all()


async def files_beyond(session: AsyncSession, job_id: str, *, mark: int, limit: int) -> Sequence[FileRow]:
    """Artifacts that came in after row `mark`, in the order in which they came."""
    query = select(FileRow).where(FileRow.job_id == job_id, FileRow.id > mark)
    return (await session.scalars(query.order_by(FileRow.id).limit(limit))).all()


async def claim_key(session: AsyncSession, submission: Mapping[str, Any]) -> SubmissionRow | None:
    """Insert the row of an idempotency key, or return the one that was there before.

    Two submits at once: the second waits here until the first is committed, then sees it.
    """
    insert = INSERT[session.get_bind().dialect.name]
    statement = insert(SubmissionRow).values(**submission).on_conflict_do_nothing()
    mine = await session.scalar(statement.returning(SubmissionRow.key))
    return None if mine is not None else await session.get(SubmissionRow, submission["key"])


async def upsert(
    session: AsyncSession,
    table: type[Base],
    rows: Sequence[Mapping[str, Any]],
    *,
    key: Sequence[str],
    first: Collection[str] = (),
) -> None:
    """Insert `rows`, all of the same columns; one whose `key` exists takes the place of the old one.

    The columns of `first` stay as they were first written.
    """
    if not rows:
        return
    # PostgreSQL may not touch a row twice in one statement, so the last of each key counts.
    unique = list({tuple(row[name] for name in key): dict(row) for row in rows}.values())
    statement = INSERT[session.get_bind().dialect.name](table.__table__)
    others = {name: statement.excluded[name] for name in unique[0] if name not in (*key, *first)}
    await session.execute(statement.on_conflict_do_update(index_elements=list(key), set_=others), unique)


def _newest(query: Select[Row]) -> Select[Row]:
    return query.order_by(JobRow.created_at.desc(), JobRow.id.desc())


def starting_with(prefix: str) -> Select[JobRow]:
    """Jobs whose id starts with these hexadecimal digits, newest first."""
    # Ids are hexadecimal: whatever begins with the prefix lies before its "g", and the primary key finds it.
    return _newest(select(JobRow).where(JobRow.id >= prefix, JobRow.id < f"{prefix}g"))


def newest(wanted: JobFilter, *, dialect: str) -> Select[JobRow]:
    """The jobs that a list shows, newest first."""
    query = _newest(select(JobRow))
    if wanted.states:
        query = query.where(JobRow.state.in_(wanted.states))
    if wanted.kinds:
        query = query.where(JobRow.kind.in_(wanted.kinds))
    if wanted.name is not None:
        query = query.where(JobRow.name == wanted.name)
    if wanted.labels:
        query = query.where(_has_labels(wanted.labels, dialect=dialect))
    if wanted.text:
        query = query.where(_holds(wanted.text, dialect=dialect))
    return query


def _has_labels(labels: Mapping[str, str], *, dialect: str) -> ColumnElement[bool]:
    if dialect == "postgresql":  # served by ix_jobs_labels
        return type_coerce(JobRow.labels, postgresql.JSONB).contains(dict(labels))
    fits = and_(*(JobRow.labels[key].as_string() == value for key, value in labels.items()))
    return case((func.json_valid(JobRow.labels) == 1, fits), else_=False)


def _holds(part: str, *, dialect: str) -> ColumnElement[bool]:
    held = or_(*(column.icontains(part, autoescape=True) for column in (JobRow.name, JobRow.id)))
    if dialect != "postgresql":
        return held
    # Served by ix_jobs_words; what has all three-letter parts of `part` need not hold it as a whole.
    words = func.cim_trigrams(JobRow.name + " " + JobRow.id, type_=postgresql.ARRAY(Text))
    return and_(words.contains(func.cim_trigrams(part, type_=postgresql.ARRAY(Text))), held)
