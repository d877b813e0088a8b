"""The dispatcher's reads: rows in, plain facts out. Short transactions, nothing is written."""

from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, func, or_, select, true
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from service.contracts.jobs import FINAL, JobState
from service.db import moves
from service.db.apart import read_apart
from service.db.engine import Sessions, only_reads
from service.db.failures import is_outage
from service.db.tables import AttemptRow, EventRow, JobRow
from service.db.usage import usage
from service.domain.decide import Dependency, JobSeen
from service.domain.names import submission_id
from service.domain.queueing import Needs

_LEFTOVERS_A_PASS = 50
_ROWS_A_TURN = 1000
_BUSY = frozenset(JobState) - FINAL - {JobState.QUEUED}
# Not whole rows: a pass over ten thousand jobs shall not read ten thousand specs.
_JOBS = select(
    JobRow.id,
    JobRow.state,
    JobRow.version,
    JobRow.desired,
    JobRow.desired_at,
    JobRow.reason,
    JobRow.priority,
    JobRow.inputs_wait,
    JobRow.attempt,
    JobRow.max_attempts,
    JobRow.forgiven_attempts,
    JobRow.not_before,
    JobRow.created_at,
    JobRow.resolved["resources"].label("resources"),
    JobRow.resolved["limits"].label("limits"),
)
_BUSY_JOBS = _JOBS.where(JobRow.state.in_(_BUSY)).order_by(JobRow.created_at, JobRow.id)
_QUEUE = _JOBS.where(JobRow.state == JobState.QUEUED).order_by(
    JobRow.priority.desc(), JobRow.created_at, JobRow.id
)
_NUMBERS = ("version", "priority", "attempt", "max_attempts", "forgiven_attempts")
_ATTEMPTS = (
    select(
        AttemptRow.job_id,
        AttemptRow.number,
        AttemptRow.started_at,
        AttemptRow.launched_at,
        AttemptRow.last_report_at,
        AttemptRow.advanced_at,
        AttemptRow.ended_at,
        AttemptRow.failure_kind,
    )
    .join(JobRow, JobRow.id == AttemptRow.job_id)
    .order_by(AttemptRow.job_id, AttemptRow.number)
)
# When the stops under way began, whoever asked for them.
_STOPS = (
    select(EventRow.job_id, func.max(EventRow.at).label("at"))
    .join(JobRow, JobRow.id == EventRow.job_id)
    .where(JobRow.state == JobState.STOPPING, EventRow.dst == JobState.STOPPING)
    .group_by(EventRow.job_id)
)
LEFTOVERS = (
    select(AttemptRow, JobRow.updated_at)
    .join(JobRow, JobRow.id == AttemptRow.job_id)
    .where(
        AttemptRow.ray_ended_at.is_(None),
        # A pause may have been granted while the cluster did not answer.
        or_(JobRow.state.in_(FINAL | {JobState.PAUSED}), AttemptRow.number < JobRow.attempt),
    )
    .order_by(AttemptRow.started_at)
    .limit(_LEFTOVERS_A_PASS)
)


@dataclass(frozen=True, kw_only=True)
class Observed:
    """One open job: the facts for the decision, and what the guarded write needs."""

    seen: moves.Seen
    job: JobSeen
    reason: str
    max_attempts: int

    @property
    def submission_id(self) -> str:
        """The latest attempt's id in the cluster."""
        return submission_id(self.job.id, self.job.attempt)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The open jobs at one moment, and why some of them cannot be told about, by id."""

    jobs: tuple[Observed, ...]
    unreadable: Mapping[str, Exception] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """An attempt whose job has gone on without it, but whose process was not yet seen to end."""

    job_id: str
    attempt: int
    submission_id: str
    over_since: datetime


@dataclass(frozen=True, kw_only=True)
class _Which:
    """The jobs that are looked at: these alone, or all but some."""

    only: Sequence[str] | None = None
    without: Collection[str] = ()

    def holds(self, column: InstrumentedAttribute[str]) -> ColumnElement[bool]:
        """The condition on the column that names the job."""
        if self.only is not None:
            return column.in_(self.only)
        return column.not_in(self.without) if self.without else true()


async def open_jobs(
    sessions: Sessions, *, now: datetime, most_queued: int | None = None, without: Collection[str] = ()
) -> Observation:
    """Every job that is not final and not in `without`, with its attempts and the jobs it needs.

    The queue comes first, in the order in which it is served; of it the first `most_queued` alone.
    """
    all_of = _Which(without=without)
    try:
        async with sessions.begin() as session:
            await only_reads(session)
            jobs = await _read(session, all_of, most_queued=most_queued, now=now)
            return Observation(jobs=tuple(jobs))
    except Exception as error:
        if is_outage(error):
            raise
    # Some row is the reason. Ids can be read: nothing else stands in the answer of this query.
    async with sessions.begin() as session:
        await only_reads(session)
        ids: list[str] = []
        for query in (_QUEUE.limit(most_queued), _BUSY_JOBS):
            of_those = query.where(all_of.holds(JobRow.id)).with_only_columns(JobRow.id)
            ids += await session.scalars(of_those)

    async def read(session: AsyncSession, some: Sequence[str]) -> Sequence[Observed]:
        return await _read(session, _Which(only=some), most_queued=None, now=now)

    found, faults = await read_apart(sessions, ids, read)
    return Observation(jobs=tuple(found), unreadable=faults)


async def leftovers(sessions: Sessions, *, without: Collection[str] = ()) -> list[Leftover]:
    """Attempts that should be over, and were not yet seen to be; not of jobs in `without`.

    One whose row cannot be read is passed over: it burns time, but can write nothing.
    """
    query = LEFTOVERS.where(_Which(without=without).holds(AttemptRow.job_id))
    try:
        async with sessions.begin() as session:
            await only_reads(session)
            return await _leftovers(session, query)
    except Exception as error:
        if is_outage(error):
            raise
    async with sessions.begin() as session:
        await only_reads(session)
        ids = sorted(set(await session.scalars(query.with_only_columns(AttemptRow.job_id))))

    async def read(session: AsyncSession, some: Sequence[str]) -> Sequence[Leftover]:
        return await _leftovers(session, LEFTOVERS.where(AttemptRow.job_id.in_(some)))

    return (await read_apart(sessions, ids, read))[0]


async def _leftovers(session: AsyncSession, query: Select[AttemptRow, datetime]) -> list[Leftover]:
    return [
        Leftover(
            job_id=row.job_id,
            attempt=row.number,
            submission_id=row.submission_id,
            over_since=row.ended_at or moved_at,
        )
        for row, moved_at in await session.execute(query)
    ]


async def _read(
    session: AsyncSession, which: _Which, *, most_queued: int | None, now: datetime
) -> list[Observed]:
    """These jobs. Raises where a row of one cannot be read, or holds what makes no sense."""
    of_those = which.holds(JobRow.id)
    first = _QUEUE.where(of_those).limit(most_queued)
    queue = [row async for part in _in_parts(session, first) for row in part]
    busy = {row.id: row async for part in _in_parts(session, _BUSY_JOBS.where(of_those)) for row in part}
    stops = {row.job_id: row.at for row in await session.execute(_STOPS.where(of_those))}
    queued = [row for row in queue if row.id not in busy]  # one may have moved in between
    rows = [*queued, *busy.values()]
    attempts = await _attempts(session, which, again=[row.id for row in queued if row.attempt])
    needed = await _dependencies(session, sorted({i for row in rows for i in _ids(row.inputs_wait)}))
    return [
        _observed(row, attempts.get(row.id, []), needed, stopping_since=stops.get(row.id), now=now)
        for row in rows
    ]


async def _in_parts(
    session: AsyncSession, query: Select[*tuple[Any, ...]]
) -> AsyncIterator[Sequence[Row[Any]]]:
    """The rows in portions: between two of them others in this process get their turn."""
    rows = await session.stream(query, execution_options={"yield_per": _ROWS_A_TURN})
    async for part in rows.partitions():
        yield part


async def _attempts(
    session: AsyncSession, which: _Which, *, again: Sequence[str]
) -> dict[str, list[Row[Any]]]:
    """The attempts of all busy jobs and of those that are queued again, by job."""
    of: dict[str, list[Row[Any]]] = {}
    busy = JobRow.state.in_(_BUSY) & which.holds(JobRow.id)
    for condition in (busy, *(JobRow.id.in_(some) for some in _portions(again))):
        async for part in _in_parts(session, _ATTEMPTS.where(condition)):
            for attempt in part:
                of.setdefault(attempt.job_id, []).append(attempt)
    return of


async def _dependencies(session: AsyncSession, ids: Sequence[str]) -> dict[str, Row[Any]]:
    found: dict[str, Row[Any]] = {}
    for some in _portions(ids):
        query = select(JobRow.id, JobRow.name, JobRow.state, JobRow.reason).where(JobRow.id.in_(some))
        found |= {row.id: row for row in await session.execute(query)}
    return found


def _portions(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """A statement cannot name any number of them."""
    return (ids[first : first + _ROWS_A_TURN] for first in range(0, len(ids), _ROWS_A_TURN))


def _observed(
    row: Row[Any],
    attempts: Sequence[Row[Any]],
    needed: Mapping[str, Row[Any]],
    *,
    stopping_since: datetime | None,
    now: datetime,
) -> Observed:
    for name in _NUMBERS:
        _whole(name, getattr(row, name))
    attempt = next((one for one in attempts if one.number == row.attempt), None)
    if row.attempt and attempt is None:  # it could never be lost, and would hold its place for ever
        raise LookupError(f"attempt {row.attempt} has no row")
    job = JobSeen(
        id=row.id,
        state=row.state,
        desired=row.desired,
        attempt=row.attempt,
        needs=needs_of(row.resources),
        priority=row.priority,
        created_at=row.created_at,
        since=_since(row, attempt, stopping_since),
        retry_at=row.not_before,
        reported_at=attempt.last_report_at if attempt else None,
        advanced_at=attempt.advanced_at if attempt else None,
        used=usage(attempts, forgiven=row.forgiven_attempts, limits=row.limits, now=now),
        submitted=attempt is not None and attempt.launched_at is not None,
        dependencies=tuple(_dependency(i, needed.get(i)) for i in _ids(row.inputs_wait)),
    )
    seen = moves.Seen(row.id, row.state, row.version)
    return Observed(seen=seen, job=job, reason=row.reason, max_attempts=row.max_attempts)


def _since(row: Row[Any], attempt: Row[Any] | None, stopping_since: datetime | None) -> datetime:
    """When the clock of the job's state began to run."""
    moment: datetime = row.desired_at
    if row.state is JobState.STOPPING:
        # Not the user's wish alone stops a job, and a second wish gives its workers no second grace.
        moment = stopping_since or moment
    elif attempt is not None:
        moment = attempt.last_report_at or attempt.launched_at or attempt.started_at
    return moment


def _dependency(job_id: str, row: Row[Any] | None) -> Dependency:
    if row is None:
        return Dependency(job_id=job_id, name="deleted", state=JobState.FAILED, reason="it no longer exists")
    return Dependency(job_id=row.id, name=row.name, state=row.state, reason=row.reason)


def _ids(listed: Any) -> list[str]:
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        raise TypeError(f"inputs_wait must be a list of ids, got {listed!r}")
    return listed


def needs_of(resources: Mapping[str, Any]) -> Needs:
    """CPUs and GPUs of all workers of a job. Raises TypeError or KeyError for what are no resources."""
    workers, cpus, gpus = (
        _whole(name, resources[name]) for name in ("workers", "cpus_per_worker", "gpus_per_worker")
    )
    return Needs(cpus=workers * cpus, gpus=workers * gpus)


def _whole(name: str, value: object) -> int:
    # SQLite keeps whatever it is given, and a text multiplied by a number is a longer text.
    if not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    return value
