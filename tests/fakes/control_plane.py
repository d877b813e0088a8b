"""A control plane in one place: real SQLite, a real folder, a fake cluster, a clock that is set."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import event, select

from service.contracts.jobs import FileEntry, MetricPoint, Progress
from service.contracts.work import Finish, Report, ReportReply
from service.db import leases, moves, queries
from service.db.engine import Sessions, create_engine, create_sessions
from service.db.leases import Lease
from service.db.tables import AttemptRow, Base, EventRow, JobRow
from service.dispatch.reconciler import Reconciler, Rules
from service.domain.decide import Limits
from service.domain.names import job_prefix, new_job_id
from service.domain.retry import Backoff
from service.jobs import work
from service.jobs.finish import finish
from service.store.base import ObjectStore
from service.store.directory import DirectoryStore
from tests.fakes.launcher import FakeLauncher

LEASE = "dispatcher"
RULES = Rules(
    limits=Limits(start_deadline_s=600, stall_after_s=60, stop_grace_s=20, lost_grace_s=5),
    backoff=Backoff(first_s=5, longest_s=300),
    max_active=16,
    worker_command=("python", "-m", "workers"),
    public_url="http://api:8000",
    secret="s" * 32,
)


@dataclass
class ControlPlane:
    """What the dispatcher works on, and a worker's voice."""

    sessions: Sessions
    store: ObjectStore
    lease: Lease
    launcher: FakeLauncher = field(default_factory=FakeLauncher)
    now: datetime = datetime(2026, 1, 1, tzinfo=UTC)

    def reconciler(self, rules: Rules = RULES) -> Reconciler:
        """A fresh dispatcher: it remembers nothing."""
        return Reconciler(
            self.sessions,
            self.launcher,
            self.store,
            lease=self.lease,
            rules=rules,
            clock=lambda: self.now,
            monotonic=lambda: self.now.timestamp(),
        )

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += timedelta(seconds=seconds)

    async def submit(self, name: str = "job", *, kind: str = "tokenizer", **changes: Any) -> str:
        """Queue a job of one worker with one CPU; `changes` are columns."""
        job_id = new_job_id()
        resources = {"workers": 1, "gpus_per_worker": 0, "cpus_per_worker": 1}
        values = {
            "name": name,
            "kind": kind,
            "priority": 50,
            "labels": {},
            "spec": {"kind": kind, "name": name},
            "resolved": {"kind": kind, "name": name, "resources": resources},
            "inputs_wait": [],
            "max_attempts": 3,
            **changes,
        }
        async with self.sessions.begin() as session:
            moves.enqueue(session, job_id=job_id, now=self.now, values=values)
        self.advance(0.001)  # ages differ
        return job_id

    async def job(self, job_id: str) -> JobRow:
        """The job as it is."""
        async with self.sessions.begin() as session:
            row = await queries.job(session, job_id)
        assert row is not None
        return row

    async def attempts(self, job_id: str) -> list[AttemptRow]:
        """Its attempts, in order."""
        async with self.sessions.begin() as session:
            return list(await queries.attempts(session, [job_id]))

    async def moves_of(self, job_id: str) -> list[str]:
        """The states it went through."""
        query = select(EventRow.dst).where(EventRow.job_id == job_id, EventRow.dst.is_not(None))
        async with self.sessions.begin() as session:
            return [str(state) for state in await session.scalars(query.order_by(EventRow.id))]

    async def report(
        self, job_id: str, attempt: int, *points: MetricPoint, files: tuple[FileEntry, ...] = ()
    ) -> ReportReply:
        """Speak as the worker."""
        told = Report(progress=Progress(step=1), metrics=list(points), files=list(files))
        async with self.sessions.begin() as session:
            return await work.report(session, job_id, attempt, told, now=self.now)

    async def finish(self, job_id: str, attempt: int, **told: Any) -> None:
        """Speak the worker's last word. A success has told its plan before, and has its result."""
        last = Finish.model_validate({"outcome": "succeeded", "step": 1, **told})
        if last.outcome == "succeeded":
            await self.tell_plan(job_id, attempt, total_steps=last.step)
            files = [*last.files, self.put(job_id, "result.json", b"{}")]
            last = last.model_copy(update={"total_steps": last.step, "files": files})
        backoff = RULES.backoff
        await finish(self.sessions, self.store, job_id, attempt, last, backoff=backoff, now=self.now)

    async def tell_plan(self, job_id: str, attempt: int, *, total_steps: int) -> None:
        """Report how long the training is."""
        told = Report(progress=Progress(step=1), plan={"total_steps": total_steps})
        async with self.sessions.begin() as session:
            await work.report(session, job_id, attempt, told, now=self.now)

    def put(self, job_id: str, path: str, data: bytes) -> FileEntry:
        """Store one artifact."""
        self.store.put_bytes(f"{job_prefix(job_id)}/{path}", data)
        return FileEntry(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())


@asynccontextmanager
async def control_plane(folder: Path, *, database_url: str | None = None) -> AsyncIterator[ControlPlane]:
    """A new one: a store in `folder`, and a database there too, or a migrated one elsewhere."""
    engine = create_engine(database_url or f"sqlite+aiosqlite:///{folder / 'cim.db'}")
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", _without_fsync)
    if database_url is None:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
    sessions = create_sessions(engine)
    try:
        yield ControlPlane(sessions, DirectoryStore(folder / "objects"), await lease_of(sessions))
    finally:
        await engine.dispose()


async def lease_of(sessions: Sessions) -> Lease:
    """The dispatchers' lease, held by the test."""
    async with sessions.begin() as session:
        lease = await leases.take(session, LEASE, owner="test", lasts_s=3600)
    assert lease is not None
    return lease


def _without_fsync(connection: Any, record: object) -> None:
    # The machine does not lose power in a test, and most of a write's time goes there.
    connection.execute("PRAGMA synchronous = OFF")
