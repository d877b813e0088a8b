"""Carries what the database holds over to the tracker, from high-water marks.

The marks are in the database and move only after the tracker has taken what lies below them. So an
outage of the tracker loses nothing, costs no training step, and never holds up a launch. Every write
is guarded by a lease; what a forwarder without it still sends, the tracker has or may have.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.jobs import FINAL, JobState
from service.db import moves, queries
from service.db.apart import read_apart
from service.db.engine import Sessions, only_reads
from service.db.leases import GuardedSessions, Lease, LeaseLostError
from service.db.tables import FileRow, JobRow
from service.dispatch.tracker import (
    MAX_BATCH,
    NewRun,
    Outcome,
    Picture,
    Point,
    Tracker,
    TrackerRefusedError,
    TrackerUnavailableError,
)
from service.dispatch.troubles import Troubles
from service.domain.names import job_prefix
from service.store.base import MissingObjectError, ObjectStore, StoreError

logger = logging.getLogger(__name__)

_JOBS_A_PASS = 500
# A job with a backlog of hours takes part of each pass, not all of it.
_READS_A_TURN = 20  # of points, MAX_BATCH each
_FILES_A_TURN = 20
_ANY_KEY = "jobs/none"
UNFINISHED = (
    select(JobRow.id)
    .where(JobRow.attempt > 0, JobRow.mlflow_closed.is_(False))
    .order_by(JobRow.updated_at.desc())
)
# Written with a guard: a job that its user has retried meanwhile is to be recorded on.
_CLOSED = {"mlflow_closed": True}
_SAMPLE = re.compile(r"samples/step-(\d+)\.png")
_OUTCOMES = {
    JobState.SUCCEEDED: Outcome.FINISHED,
    JobState.FAILED: Outcome.FAILED,
    JobState.CANCELLED: Outcome.KILLED,
}

_HOW_TO_LOAD = """
Load the encoder with plain timm, after `cim download {job_id} --to {folder}`:

```python
import timm

encoder = timm.create_model("local-dir:{folder}/encoder", pretrained=True)
```
"""


class Forwarder:
    """Keeps one run a job up to date."""

    def __init__(
        self,
        sessions: Sessions,
        tracker: Tracker,
        store: ObjectStore,
        *,
        lease: Lease,
        public_url: str,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sessions, self._tracker, self._store = sessions, tracker, store
        self._guarded = GuardedSessions(sessions=sessions, lease=lease)
        self._public_url = public_url
        self._troubles = Troubles(self._guarded, what="MLflow does not get all of it", monotonic=monotonic)
        self._away: set[type[Exception]] = set()  # what was said to be away
        self._turn: list[str] = []  # jobs that this round has not come to yet

    async def run_once(self) -> None:
        """Bring the runs of all jobs that were ever launched up to date.

        What goes wrong for one of them is that job's trouble alone. Raises LeaseLostError once another
        dispatcher may be at it, and what the database raises when it is away.
        """
        self._troubles.begin()
        away: set[type[Exception]] = set()
        for job in await self._unfinished():
            async with self._troubles.turn(job.id):
                try:
                    await self._forward_or_give_up(job)
                except (TrackerUnavailableError, StoreError) as error:
                    if not await self._is_away(error):
                        raise
                    away.add(type(error))
            if TrackerUnavailableError in away:
                break  # it is down for the others too
        self._away = away
        await self._troubles.end()

    async def _unfinished(self) -> list[JobRow]:
        """The next jobs in turn: newest first alone, busy ones could hold up one that has ended for ever."""
        if not self._turn:
            async with self._sessions.begin() as session:
                await only_reads(session)
                self._turn = list(await session.scalars(UNFINISHED))
        turn, self._turn = self._turn[:_JOBS_A_PASS], self._turn[_JOBS_A_PASS:]
        resting = self._troubles.resting
        found, faults = await read_apart(self._sessions, [i for i in turn if i not in resting], _jobs)
        for job_id, error in faults.items():
            await self._troubles.note(job_id, error)
        return [job for job in found if not job.mlflow_closed]

    async def _is_away(self, error: TrackerUnavailableError | StoreError) -> bool:
        """Whether what failed for one job fails at anything; if so, say it, once an outage."""
        try:
            if isinstance(error, StoreError):
                await asyncio.to_thread(self._store.stat, _ANY_KEY)
            else:
                await self._tracker.check()
        except (TrackerUnavailableError, StoreError) as found:
            if type(error) not in self._away:
                logger.warning("what MLflow lacks waits: %s", found)
                self._away.add(type(error))
            return True
        return False

    async def _forward_or_give_up(self, job: JobRow) -> None:
        try:
            await self._forward(job)
        except TrackerRefusedError as error:
            await self._give_up(job, str(error))

    async def _forward(self, job: JobRow) -> None:
        """`job` was read before its points and files: if it was final then, they are complete."""
        run_id = job.mlflow_run_id or await self._begin(job)
        complete = await self._forward_points(job, run_id)
        complete &= await self._forward_pictures(job, run_id)
        if complete and job.state in FINAL:
            await self._close(job, run_id)

    async def _begin(self, job: JobRow) -> str:
        run = NewRun(
            job_id=job.id,
            name=job.name,
            started_at=job.created_at,
            description=describe(job, public_url=self._public_url),
            tags=_tags(job, public_url=self._public_url),
            params=flatten(job.resolved),
        )
        await self._check_lease()
        run_id = await self._tracker.ensure_run(run)
        try:
            await self._write(job.id, mlflow_run_id=run_id)
        except LeaseLostError:
            await self._undo_late_begin(job.id)
            raise
        return run_id

    async def _undo_late_begin(self, job_id: str) -> None:
        """We slept past the lease before the run was made, or opened again: leave what another one has done.

        Where the row names no run yet, the next holder finds ours by its tag, or removes it at the end.
        """
        async with self._sessions.begin() as session:
            await only_reads(session)
            job = await queries.job(session, job_id)
        if job is None or job.mlflow_run_id is None:
            return
        await self._tracker.keep_only(job.mlflow_run_id, job_id=job.id)
        if job.mlflow_closed and job.state in FINAL:
            await self._end(job, job.mlflow_run_id)

    async def _forward_points(self, job: JobRow, run_id: str) -> bool:
        """Send what is new, as much as one turn allows; whether that was all."""
        mark = job.mlflow_metric_mark
        for _ in range(_READS_A_TURN):
            async with self._sessions.begin() as session:
                await only_reads(session)
                rows = await queries.metrics_beyond(session, job.id, mark=mark, limit=MAX_BATCH)
            if not rows:
                return True
            points = [Point(key=row.key, step=row.step, value=row.value, at=row.at) for row in rows]
            await self._tracker.log_points(run_id, points)
            mark = rows[-1].id
            await self._write(job.id, mlflow_metric_mark=mark)
        return False

    async def _forward_pictures(self, job: JobRow, run_id: str) -> bool:
        """Send what is new, as much as one turn allows; whether that was all."""
        async with self._sessions.begin() as session:
            await only_reads(session)
            rows = await queries.files_beyond(session, job.id, mark=job.mlflow_file_mark, limit=_FILES_A_TURN)
        for row in rows:
            await self._forward_picture(row, run_id)
            await self._write(job.id, mlflow_file_mark=row.id)
        return len(rows) < _FILES_A_TURN

    async def _forward_picture(self, row: FileRow, run_id: str) -> None:
        sample = _SAMPLE.fullmatch(row.path)
        if sample is None:
            return
        try:
            png = await asyncio.to_thread(self._store.get_bytes, f"{job_prefix(row.job_id)}/{row.path}")
        except MissingObjectError:
            logger.warning("job %s: %s is gone from the object store", row.job_id, row.path)
            return
        await self._check_lease()
        picture = Picture(series="samples", step=int(sample[1]), png=png, at=row.at)
        await self._tracker.log_picture(run_id, picture)

    async def _close(self, job: JobRow, run_id: str) -> None:
        await self._end(job, run_id)
        # A dispatcher that slept between its check of the lease and its call may have made another one.
        await self._check_lease()
        await self._tracker.keep_only(run_id, job_id=job.id)
        async with self._guarded.begin() as session:
            await moves.write(session, moves.seen(job), _CLOSED)

    async def _end(self, job: JobRow, run_id: str) -> None:
        description = describe(job, public_url=self._public_url)
        ended_at = job.finished_at or job.updated_at
        await self._tracker.close(run_id, _OUTCOMES[job.state], ended_at=ended_at, description=description)

    async def _give_up(self, job: JobRow, why: str) -> None:
        """The run was deleted, or the like: say so once, and let the job go on without it.

        What is there is closed first, so that it does not say for ever that the job runs.
        """
        told = f"no longer recorded in MLflow: {why}"
        description = f"{describe(job, public_url=self._public_url)}\n\n**{told}**"
        await self._check_lease()
        await self._tracker.abandon(
            job.id,
            _OUTCOMES.get(job.state, Outcome.KILLED),
            ended_at=job.finished_at or job.updated_at,
            description=description,
        )
        logger.warning("job %s is %s", job.id, told)
        async with self._guarded.begin() as session:
            await moves.write(session, moves.seen(job), _CLOSED)
            moves.note(session, job.id, actor="dispatcher", message=told, now=datetime.now(UTC))

    async def _check_lease(self) -> None:
        """Before what the tracker does not tell apart when two do it at the same moment."""
        async with self._guarded.begin():
            return

    async def _write(self, job_id: str, **columns: Any) -> None:
        async with self._guarded.begin() as session:
            await session.execute(update(JobRow).where(JobRow.id == job_id).values(**columns))


async def _jobs(session: AsyncSession, some: Sequence[str]) -> Sequence[JobRow]:
    found = await queries.jobs_by_id(session, some)
    return [found[job_id] for job_id in some if job_id in found]


def flatten(tree: Mapping[str, Any], *, prefix: str = "") -> dict[str, str]:
    """Dotted path to value; lists stay whole, as JSON."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, prefix=f"{path}.")
        elif isinstance(value, str):
            flat[path] = value
        else:
            flat[path] = json.dumps(value)
    return flat


def describe(job: JobRow, *, public_url: str) -> str:
    """The run's page in Markdown: what it is, where its job and its artifacts are."""
    api = f"{public_url}/v1/jobs/{job.id}"
    links = {
        "the job": api,
        "artifacts": f"{api}/artifacts",
        "events": f"{api}/events",
        "API": f"{public_url}/docs",
    }
    lines = [
        f"**{job.kind}** job `{job.name}` (`{job.id}`): {job.reason or job.state}",
        "",
        "- " + " · ".join(f"[{text}]({address})" for text, address in links.items()),
        f"- artifacts lie under `{job_prefix(job.id)}/` of the object store",
    ]
    if job.kind == "pretrain" and job.state is JobState.SUCCEEDED:
        lines.append(_HOW_TO_LOAD.format(job_id=job.id, folder=job.name))
    return "\n".join(lines)


def _tags(job: JobRow, *, public_url: str) -> dict[str, str]:
    labels = {f"label.{key}": str(value) for key, value in job.labels.items()}
    return {**labels, "cim.kind": job.kind, "cim.job": f"{public_url}/v1/jobs/{job.id}"}
