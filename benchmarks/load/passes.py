"""A pass of the dispatcher over ten thousand open jobs, on a cluster that costs nothing."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from benchmarks.load.database import for_sqlalchemy, ids_in
from benchmarks.timing import Times
from service.contracts.jobs import JobState
from service.db import leases
from service.db.engine import create_engine, create_sessions
from service.dispatch.launcher import Submission
from service.dispatch.reconciler import Reconciler, Rules
from service.domain.decide import ClusterJob, ClusterState, Limits
from service.domain.names import submission_id
from service.domain.queueing import Needs
from service.domain.retry import Backoff
from service.store.directory import DirectoryStore

_RULES = Rules(
    limits=Limits(start_deadline_s=1e6, stall_after_s=1e6, stop_grace_s=20, lost_grace_s=5),
    backoff=Backoff(first_s=5, longest_s=300),
    max_active=16,
    worker_command=("python", "-m", "workers"),
    public_url="http://127.0.0.1:1",
    secret="b" * 32,
)
_OPEN = "SELECT * FROM jobs WHERE state NOT IN ('succeeded', 'failed', 'cancelled')"


@dataclass
class MemoryCluster:
    """A cluster that answers at once, so that a pass costs what it costs us. Every job runs."""

    running: set[str] = field(default_factory=set)

    async def submit(self, submission: Submission) -> None:
        """Take it."""
        self.running.add(submission.id)

    async def status(self, submission_id: str) -> ClusterJob | None:
        """Running, or unknown."""
        return ClusterJob(state=ClusterState.RUNNING) if submission_id in self.running else None

    async def stop(self, submission_id: str) -> None:
        """End it."""
        self.running.discard(submission_id)

    async def log_tail(self, submission_id: str, *, max_lines: int) -> list[str]:  # noqa: ARG002
        """Nothing."""
        return []

    async def capacity(self) -> Needs:
        """One CPU, which no waiting job gets."""
        return Needs(cpus=1.0)


def measure_pass(uri: str, folder: Path, *, rounds: int = 7) -> tuple[float, Times]:
    """Seconds of the first pass over the open jobs, which tells all why they wait, and of those after it.

    Each is the first of its dispatcher, because that one looks at the whole queue.
    """

    async def passes() -> list[float]:
        engine = create_engine(for_sqlalchemy(uri))
        sessions = create_sessions(engine)
        async with sessions.begin() as session:
            lease = await leases.take(session, "reconcile", owner="benchmark", lasts_s=3600)
        assert lease is not None
        cluster = MemoryCluster({submission_id(i, 1) for i in ids_in(uri, JobState.RUNNING)})
        store = DirectoryStore(folder)
        made = [Reconciler(sessions, cluster, store, lease=lease, rules=_RULES) for _ in range(rounds + 1)]
        seconds = [await _timed(one.run_once) for one in made]
        await engine.dispose()
        return seconds

    first, *others = asyncio.run(passes())
    return first, Times(seconds=tuple(others))


def measure_read(uri: str, *, rounds: int = 7) -> Times:
    """The baseline: seconds to read the open jobs, whole rows, with psycopg alone."""
    with psycopg.connect(uri) as connection:
        return Times(
            seconds=tuple(_clocked(lambda: connection.execute(_OPEN).fetchall()) for _ in range(rounds))
        )


async def _timed(work: Callable[[], Awaitable[None]]) -> float:
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


def _clocked(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
