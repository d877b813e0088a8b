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
from tests.fakes.world import World, open_world

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

    @pytest.mark.parametrize("column", [c for c in poison.COLUMNS if c.startswith(("jobs.", "attempts."))])
    async def test_poison__hides_no_job_and_its_own_can_be_shown_and_ended(
        self, plane: ControlPlane, column: str, database_url: str, tmp_path: Path
    ) -> None:
        (tmp_path / "api").mkdir()
        async with open_world(database_url, tmp_path / "api") as world:
            healthy = [job["id"] for job in await world.submit(*(world.tokenizer(f"h{n}") for n in range(5)))]
            victims = await self._victims(plane, column)
            await poison.open_the_gates(plane.sessions)
            for job_id, value in victims.items():
                await poison.plant(plane.sessions, column, job_id, value)
            healthy += [job["id"] for job in await world.submit(world.tokenizer(labels={"a": "b"}))]
            assert set(await self._listed(world, limit=7)) >= set(healthy)
            assert await self._listed(world, limit=7, label="a=b") == healthy[-1:]
            if column != "jobs.id":
                await self._show_and_end(world, victims, column)

    async def _listed(self, world: World, **query: str | int) -> list[str]:
        found: list[str] = []
        while True:
            answer = await world.client.get("/v1/jobs", params=query)
            assert answer.status_code == 200, answer.text
            page = answer.json()
            found += [job["id"] for job in page["jobs"]]
            if page["next_cursor"] is None:
                return found
            query["cursor"] = page["next_cursor"]

    async def _show_and_end(self, world: World, victims: dict[str, Any], column: str) -> None:
        for job_id in list(victims)[::3]:  # of each value and each state some
            shown = await world.client.get(f"/v1/jobs/{job_id}")
            assert shown.status_code == 200, shown.text
            asked = await world.client.post(f"/v1/jobs/{job_id}/cancel")
            if column not in ("jobs.state", "jobs.version"):
                assert asked.status_code == 202, asked.text
                ended = (await world.show(job_id))["state"]
                assert ended in ("cancelled", "failed", "stopping"), ended
            assert asked.status_code == 202 or asked.json()["code"] == "damaged_job", asked.text
            pausing = await world.client.post(f"/v1/jobs/{job_id}/pause")
            assert pausing.json()["code"] in ("illegal_move", "damaged_job"), pausing.text

    async def _victims(self, plane: ControlPlane, column: str) -> dict[str, Any]:
        """Queued, running, stopping and ended jobs for each poisonous value, and the value."""
        running, stopping, ended = [await plane.submit("victim") for _ in range(3)]
        await plane.reconciler(_RULES).run_once()
        for job_id in (running, stopping, ended):
            await self._begin(plane, job_id)
        async with plane.sessions.begin() as session:
            dialect = session.get_bind().dialect.name
            await ask(session, stopping, Verb.CANCEL, now=plane.now)
        await plane.finish(ended, 1, outcome="failed", failure={"kind": "user", "message": "no images"})
        originals = [running, stopping, ended, await plane.submit("victim")]
        originals.append(await plane.submit("victim", inputs_wait=[ended]))
        victims: dict[str, Any] = {}
        for value in poison.values(column, dialect):
            for job_id in originals:
                victims[twin := await poison.clone(plane.sessions, job_id)] = value
                if (job := plane.launcher.jobs.get(submission_id(job_id, 1))) is not None:
                    plane.launcher.jobs[submission_id(twin, 1)] = job
        return victims

    async def _begin(self, plane: ControlPlane, job_id: str) -> None:
        """Leave a row of every kind. Of three checkpoints one may go."""
        picture = plane.put(job_id, "samples/step-1.png", b"png")
        await plane.report(job_id, 1, MetricPoint(key="loss", step=1, value=0.5), files=(picture,))
        for step in (1, 2, 3):
            prefix = checkpoint_prefix(1, step)
            file = plane.put(job_id, f"{prefix}/state.json", b"{}")
            saved = Checkpoint(step=step, prefix=prefix, files=[file])
            await commit_checkpoint(plane.sessions, plane.store, job_id, 1, saved, now=plane.now)

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
