"""Whatever stands in the rows of one job, the others come to their ends."""

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from service.contracts.jobs import JobState as S
from service.contracts.jobs import MetricPoint
from service.contracts.work import Checkpoint
from service.dispatch.forwarder import Forwarder
from service.dispatch.tracker import Outcome
from service.domain.names import checkpoint_prefix, submission_id
from service.domain.wishes import Verb
from service.jobs.wishes import ask
from service.jobs.work import commit_checkpoint
from tests.fakes import poison
from tests.fakes.control_plane import RULES, ControlPlane, control_plane
from tests.fakes.garbage_scene import collector
from tests.fakes.launcher import FakeLauncher
from tests.fakes.tracker import FakeTracker

NUM_HEALTHY = 10
_MOST_PASSES = 8
_RULES = dataclasses.replace(RULES, max_active=200)


class PoisonContract:
    """On the database of the fixture `database_url`."""

    @pytest.fixture
    async def plane(self, database_url: str, tmp_path: Path) -> AsyncIterator[ControlPlane]:
        async with control_plane(tmp_path, database_url=database_url) as made:
            made.launcher = FakeLauncher(cpus=1000)
            yield made

    @pytest.mark.parametrize("column", poison.COLUMNS)
    async def test_poison__in_one_job_keeps_no_other_from_its_end(
        self, plane: ControlPlane, column: str
    ) -> None:
        victims = await self._victims(plane, column)
        await poison.open_the_gates(plane.sessions)
        planted = [await poison.plant(plane.sessions, column, *victim) for victim in victims.items()]
        assert any(planted)
        healthy = [await plane.submit(f"healthy-{n}") for n in range(NUM_HEALTHY)]
        reconciler, tracker = plane.reconciler(_RULES), FakeTracker()
        sender, sweeper = self._forwarder(plane, tracker), collector(plane)
        for _ in range(_MOST_PASSES):
            await reconciler.run_once()
            await sender.run_once()
            await sweeper.run_once()
            if not await self._work(plane, healthy):
                break
            plane.advance(2)
        assert [(await plane.job(job_id)).state for job_id in healthy] == [S.SUCCEEDED] * NUM_HEALTHY
        outcomes = [tracker.runs[f"run-{job_id}"].outcome for job_id in healthy]
        assert outcomes == [Outcome.FINISHED] * NUM_HEALTHY

    async def _victims(self, plane: ControlPlane, column: str) -> dict[str, Any]:
        """Queued, running, stopping and ended jobs for each poisonous value, and the value."""
        async with plane.sessions() as session:
            dialect = session.get_bind().dialect.name
        victims: dict[str, Any] = {}
        for value in poison.values(column, dialect):
            running, stopping, ended = [await plane.submit("victim") for _ in range(3)]
            await plane.reconciler(_RULES).run_once()
            for job_id in (running, stopping, ended):
                await self._begin(plane, job_id, checkpoints=3 if column.startswith("checkpoints") else 1)
            await self._ask(plane, stopping, Verb.CANCEL)
            await plane.finish(ended, 1, outcome="failed", failure={"kind": "user", "message": "no images"})
            queued = [await plane.submit("victim"), await plane.submit("victim", inputs_wait=[ended])]
            victims |= dict.fromkeys((running, stopping, ended, *queued), value)
        return victims

    async def _begin(self, plane: ControlPlane, job_id: str, *, checkpoints: int) -> None:
        """Leave a row of every kind. Of three checkpoints one may go."""
        picture = plane.put(job_id, "samples/step-1.png", b"png")
        await plane.report(job_id, 1, MetricPoint(key="loss", step=1, value=0.5), files=(picture,))
        for step in range(1, checkpoints + 1):
            prefix = checkpoint_prefix(1, step)
            file = plane.put(job_id, f"{prefix}/state.json", b"{}")
            saved = Checkpoint(step=step, prefix=prefix, files=[file])
            await commit_checkpoint(plane.sessions, plane.store, job_id, 1, saved, now=plane.now)

    async def _ask(self, plane: ControlPlane, job_id: str, verb: Verb) -> None:
        async with plane.sessions.begin() as session:
            await ask(session, job_id, verb, now=plane.now)

    async def _work(self, plane: ControlPlane, healthy: list[str]) -> int:
        """Let the workers of the healthy jobs do their part; how many were not closed before."""
        left = 0
        for job_id in healthy:
            job = await plane.job(job_id)
            state, left = job.state, left + (not job.mlflow_closed)
            if state is S.LAUNCHING:
                await plane.report(job_id, 1, MetricPoint(key="loss", step=1, value=0.5))
            elif state is S.RUNNING:
                await plane.finish(job_id, 1)
                plane.launcher.jobs.pop(submission_id(job_id, 1), None)
        return left

    def _forwarder(self, plane: ControlPlane, tracker: FakeTracker) -> Forwarder:
        return Forwarder(
            plane.sessions,
            tracker,
            plane.store,
            lease=plane.lease,
            public_url="http://api:8000",
            monotonic=lambda: plane.now.timestamp(),
        )
