"""Stops that run into their grace, and a cluster that says nothing: passes of the reconciler."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from service.contracts.jobs import FailureKind
from service.contracts.jobs import JobState as S
from service.domain.decide import ClusterState
from service.domain.names import submission_id
from service.domain.wishes import Verb
from service.errors import StaleAttemptError
from service.jobs.wishes import ask
from tests.fakes.control_plane import ControlPlane, control_plane

# As tests/fakes/control_plane.py sets them.
STALL_AFTER_S, STOP_GRACE_S, START_DEADLINE_S = 60, 20, 600


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with control_plane(tmp_path) as made:
        yield made


async def wish(plane: ControlPlane, job_id: str, verb: Verb) -> None:
    async with plane.sessions.begin() as session:
        await ask(session, job_id, verb, now=plane.now)


async def running(plane: ControlPlane, **changes: Any) -> str:
    """A job whose first attempt has reported."""
    job_id = await plane.submit(**changes)
    await plane.reconciler().run_once()
    await plane.report(job_id, 1)
    return job_id


def runs(plane: ControlPlane, job_id: str, attempt: int = 1) -> bool:
    """Whether the cluster runs the attempt's driver."""
    return plane.launcher.jobs[submission_id(job_id, attempt)].state is ClusterState.RUNNING


def limited(hours: float) -> dict[str, Any]:
    resources = {"workers": 1, "gpus_per_worker": 0, "cpus_per_worker": 1}
    return {"kind": "tokenizer", "name": "t", "resources": resources, "limits": {"runtime_hours": hours}}


async def test_runtime_limit__leaves_the_workers_their_grace_for_a_checkpoint(plane: ControlPlane) -> None:
    job_id = await running(plane, resolved=limited(0.01))
    reconciler = plane.reconciler()
    plane.advance(36)
    await plane.report(job_id, 1)
    await reconciler.run_once()
    assert (await plane.job(job_id)).state is S.STOPPING
    for _ in range(STOP_GRACE_S - 1):
        plane.advance(1)
        assert (await plane.report(job_id, 1)).directive == "stop"
        await reconciler.run_once()
        assert runs(plane, job_id)
    plane.advance(1)
    await reconciler.run_once()
    assert not runs(plane, job_id)
    await reconciler.run_once()
    job = await plane.job(job_id)
    assert (job.state, job.failure_kind) == (S.FAILED, FailureKind.USER)
    assert job.reason.startswith("limits.runtime_hours")


async def test_runtime_limit__a_worker_that_uses_its_grace_ends_the_job(plane: ControlPlane) -> None:
    job_id = await running(plane, resolved=limited(0.01))
    plane.advance(36)
    reconciler = plane.reconciler()
    await reconciler.run_once()
    plane.advance(1)
    await reconciler.run_once()
    await plane.finish(job_id, 1, outcome="stopped", step=7)
    assert "stopped at step 7; limits.runtime_hours" in (await plane.job(job_id)).reason


@pytest.mark.parametrize(("verb", "state"), [(Verb.CANCEL, S.CANCELLED), (Verb.PAUSE, S.PAUSED)])
async def test_stop__ends_although_the_cluster_stays_silent_and_clears_up_when_it_answers(
    plane: ControlPlane, verb: Verb, state: S
) -> None:
    job_id = await running(plane)
    reconciler = plane.reconciler()
    plane.launcher.away = True
    await wish(plane, job_id, verb)
    plane.advance(STALL_AFTER_S - 1)
    await reconciler.run_once()
    assert (await plane.job(job_id)).state is S.STOPPING
    plane.advance(1)
    await reconciler.run_once()
    job, (attempt,) = await plane.job(job_id), await plane.attempts(job_id)
    assert (job.state, attempt.outcome, attempt.ray_ended_at) == (state, "stopped", None)
    assert "does not answer" in job.reason
    with pytest.raises(StaleAttemptError):
        await plane.report(job_id, 1)

    plane.launcher.away = False
    assert runs(plane, job_id)
    plane.advance(STOP_GRACE_S)
    for _ in range(2):
        await reconciler.run_once()
    assert not runs(plane, job_id)
    assert (await plane.attempts(job_id))[0].ray_ended_at is not None
    assert (await plane.job(job_id)).state is state


async def test_stop__that_ended_in_silence_may_be_resumed_and_starts_beside_nobody(
    plane: ControlPlane,
) -> None:
    job_id = await running(plane)
    reconciler = plane.reconciler()
    plane.launcher.away = True
    await wish(plane, job_id, Verb.PAUSE)
    plane.advance(STALL_AFTER_S)
    await reconciler.run_once()
    await wish(plane, job_id, Verb.RESUME)
    await reconciler.run_once()
    plane.launcher.away = False
    for _ in range(3):
        plane.advance(STOP_GRACE_S)
        await reconciler.run_once()
        assert (await plane.job(job_id)).attempt == 1 or not runs(plane, job_id)
    assert (await plane.job(job_id)).attempt == 2
    assert runs(plane, job_id, 2)


async def test_silence__of_cluster_and_worker_is_a_stall_and_nothing_starts_before_an_answer(
    plane: ControlPlane,
) -> None:
    job_id = await running(plane)
    reconciler = plane.reconciler()
    plane.launcher.away = True
    for _ in range(3):
        plane.advance(STALL_AFTER_S - 1)
        await reconciler.run_once()
        assert (await plane.job(job_id)).state is S.RUNNING
        await plane.report(job_id, 1)
    plane.advance(STALL_AFTER_S)
    for _ in range(9):
        await reconciler.run_once()
        plane.advance(START_DEADLINE_S)
    job, attempts = await plane.job(job_id), await plane.attempts(job_id)
    assert (job.state, job.failure_kind, len(attempts)) == (S.RETRYING, FailureKind.STALLED, 1)
    assert "Ray does not answer" in (attempts[0].message or "")

    plane.launcher.away = False
    await reconciler.run_once()
    assert not runs(plane, job_id)
    await reconciler.run_once()
    assert (await plane.job(job_id)).attempt == 2


async def test_launch__that_never_reached_a_silent_cluster_uses_up_no_attempt(plane: ControlPlane) -> None:
    job_id = await plane.submit(max_attempts=1)
    reconciler = plane.reconciler()
    plane.launcher.on_call = lambda moment, call: setattr(plane.launcher, "away", call == "submit")
    await reconciler.run_once()
    assert (await plane.attempts(job_id))[0].launched_at is None
    plane.launcher.on_call = lambda moment, call: None
    for _ in range(3):
        plane.advance(START_DEADLINE_S)
        plane.launcher.away = True
        await reconciler.run_once()
    plane.launcher.away = False
    for _ in range(3):
        await reconciler.run_once()
        plane.advance(1)
    assert (await plane.job(job_id)).state is S.LAUNCHING
    assert plane.launcher.num_started == {submission_id(job_id, 1): 1}
    plane.advance(START_DEADLINE_S)
    await reconciler.run_once()
    assert (await plane.job(job_id)).state is S.FAILED


async def test_silence__does_not_hold_up_a_pass_that_looks_after_what_should_be_over(
    plane: ControlPlane,
) -> None:
    for _ in range(5):
        await plane.finish(await running(plane), 1)
    plane.launcher.away = True
    asked = plane.launcher.calls["status"]
    await plane.reconciler().run_once()
    assert plane.launcher.calls["status"] == asked + 3
