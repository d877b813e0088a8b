"""The reconcile pass on a real database with a fake cluster."""

import inspect
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from service.contracts.jobs import FINAL, Desired, FailureKind, LogLine
from service.contracts.jobs import JobState as S
from service.contracts.tokens import code_fits
from service.db.tables import JobRow
from service.dispatch import record
from service.domain.decide import ClusterJob, ClusterState
from service.domain.names import submission_id
from service.domain.wishes import Verb
from service.errors import StaleAttemptError
from service.jobs.wishes import ask
from tests.fakes.control_plane import RULES, ControlPlane, control_plane
from tests.fakes.launcher import CrashError, FakeLauncher


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with control_plane(tmp_path) as made:
        yield made


async def ask_cancel(plane: ControlPlane, job_id: str) -> None:
    async with plane.sessions.begin() as session:
        await ask(session, job_id, Verb.CANCEL, now=plane.now)


async def running(plane: ControlPlane, **changes: Any) -> str:
    """A job whose first attempt has reported."""
    job_id = await plane.submit(**changes)
    await plane.reconciler().run_once()
    await plane.report(job_id, 1)
    return job_id


async def test_queued__is_launched_with_the_code_of_the_attempt_alone(plane: ControlPlane) -> None:
    job_id = await plane.submit()
    await plane.reconciler().run_once()
    sent = plane.launcher.submissions[submission_id(job_id, 1)]
    job, (attempt,) = await plane.job(job_id), await plane.attempts(job_id)
    assert list(sent.command) == [
        "python",
        "-m",
        "workers",
        "--url",
        "http://api:8000",
        "--attempt",
        f"{job_id}/1",
    ]
    assert set(sent.env) == {"CIM_CLAIM_CODE"}
    assert code_fits(sent.env["CIM_CLAIM_CODE"], secret=RULES.secret, job_id=job_id, attempt=1)
    assert (job.state, job.attempt) == (S.LAUNCHING, 1)
    assert attempt.launched_at is not None


async def test_dependency__waits_then_starts(plane: ControlPlane) -> None:
    first = await running(plane, name="tok")
    second = await plane.submit(inputs_wait=[first])
    reconciler = plane.reconciler()
    await reconciler.run_once()
    assert (await plane.job(second)).reason == f"waiting for job {first} (tok)"
    await plane.finish(first, 1)
    await reconciler.run_once()
    assert (await plane.job(second)).state is S.LAUNCHING


async def test_dependency__that_failed_fails_the_job_with_its_reason(plane: ControlPlane) -> None:
    first = await running(plane, name="tok")
    second = await plane.submit(inputs_wait=[first])
    await plane.finish(first, 1, outcome="failed", failure={"kind": "user", "message": "no image in /x"})
    await plane.reconciler().run_once()
    job = await plane.job(second)
    assert (job.state, job.failure_kind) == (S.FAILED, FailureKind.USER)
    assert job.reason == f"job {first} (tok), which this one needs, failed: no image in /x"
    assert await plane.attempts(second) == []


async def test_admission__counts_what_runs_and_goes_on_when_it_ends(plane: ControlPlane) -> None:
    plane.launcher.total = FakeLauncher(cpus=1).total
    first = await running(plane)
    second = await plane.submit()
    await plane.reconciler().run_once()
    assert (await plane.job(second)).reason == "waiting for resources: it needs 1 CPUs and 0 of 1 are free"
    await plane.finish(first, 1)
    await plane.reconciler().run_once()
    assert (await plane.job(second)).state is S.LAUNCHING


async def test_lost_driver__is_retried_with_its_last_lines_kept(plane: ControlPlane) -> None:
    job_id = await running(plane)
    name = submission_id(job_id, 1)
    plane.launcher.end(name, ClusterState.FAILED, exit_code=-9, log="starting\nout of luck")
    reconciler = plane.reconciler()
    await reconciler.run_once()
    assert (await plane.job(job_id)).state is S.RUNNING  # its own last word may be under way
    plane.advance(6)
    await reconciler.run_once()
    job, (attempt,) = await plane.job(job_id), await plane.attempts(job_id)
    assert (job.state, job.failure_kind) == (S.RETRYING, FailureKind.INFRASTRUCTURE)
    assert attempt.outcome == "failed"
    assert "exit status -9" in (attempt.message or "")
    assert "out of luck" in (attempt.message or "")
    kept = plane.store.get_bytes(f"jobs/{job_id}/logs/attempt-1/ray-000001.jsonl").decode().splitlines()
    assert [LogLine.model_validate_json(line).message for line in kept] == ["starting", "out of luck"]
    plane.advance(7)
    await reconciler.run_once()
    assert (await plane.job(job_id)).attempt == 2
    with pytest.raises(StaleAttemptError):
        await plane.report(job_id, 1)


async def test_lost_driver__whose_last_lines_no_database_holds_is_lost_all_the_same(
    plane: ControlPlane,
) -> None:
    job_id = await running(plane)
    said = ClusterJob(state=ClusterState.FAILED, message="ended by caf\udce9\x00", exit_code=1)
    plane.launcher.jobs[submission_id(job_id, 1)] = said
    plane.launcher.logs[submission_id(job_id, 1)] = ["cannot read caf\udce9.jpg\x00"]
    reconciler = plane.reconciler()
    for _ in range(2):
        await reconciler.run_once()
        plane.advance(6)
    (attempt,) = await plane.attempts(job_id)
    assert (await plane.job(job_id)).state is S.RETRYING
    assert "ended by caf\\udce9\ufffd" in (attempt.message or "")
    assert "cannot read caf\\udce9.jpg\ufffd" in (attempt.message or "")


async def test_lost_driver__the_last_attempt_fails_the_job(plane: ControlPlane) -> None:
    job_id = await running(plane, max_attempts=1)
    plane.launcher.forget_everything()
    reconciler = plane.reconciler()
    for _ in range(2):
        await reconciler.run_once()
        plane.advance(6)
    job = await plane.job(job_id)
    assert job.state is S.FAILED
    assert "attempt 1 failed (infrastructure), failure 1 of 1, no attempt is left" in job.reason
    assert "no longer knows" in job.reason


async def test_stalled__is_stopped_before_the_next_attempt(plane: ControlPlane) -> None:
    job_id = await running(plane)
    plane.advance(61)
    reconciler = plane.reconciler()
    await reconciler.run_once()
    job = await plane.job(job_id)
    assert (job.state, job.failure_kind) == (S.RETRYING, FailureKind.STALLED)
    assert plane.launcher.jobs[submission_id(job_id, 1)].state is ClusterState.STOPPED


async def test_stalled__a_report_that_came_after_the_look_counts(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await running(plane)
    plane.advance(61)
    status = plane.launcher.status

    async def slowly(submission: str) -> ClusterJob | None:
        await plane.report(job_id, 1)
        return await status(submission)

    monkeypatch.setattr(plane.launcher, "status", slowly)
    await plane.reconciler().run_once()
    assert (await plane.job(job_id)).state is S.RUNNING
    assert plane.launcher.jobs[submission_id(job_id, 1)].state is ClusterState.RUNNING


async def test_retrying__never_starts_beside_a_living_earlier_attempt(plane: ControlPlane) -> None:
    job_id = await running(plane)
    await plane.finish(job_id, 1, outcome="failed", failure={"kind": "storage", "message": "refused"})
    plane.advance(60)
    await plane.reconciler().run_once()
    assert plane.launcher.jobs[submission_id(job_id, 1)].state is ClusterState.STOPPED
    assert (await plane.job(job_id)).attempt == 1
    await plane.reconciler().run_once()
    assert (await plane.job(job_id)).attempt == 2


async def test_cancel__a_worker_that_does_not_stop_is_stopped_by_force(plane: ControlPlane) -> None:
    job_id = await running(plane)
    await ask_cancel(plane, job_id)
    assert (await plane.report(job_id, 1)).directive == "stop"
    reconciler = plane.reconciler()
    plane.advance(19)
    await reconciler.run_once()
    assert not plane.launcher.jobs[submission_id(job_id, 1)].state.ended
    plane.advance(1)
    await reconciler.run_once()
    await reconciler.run_once()
    job, (attempt,) = await plane.job(job_id), await plane.attempts(job_id)
    assert job.state is S.CANCELLED
    assert attempt.outcome == "stopped"
    assert attempt.stop_sent_at is not None
    assert attempt.ray_ended_at is not None


async def test_pause_wish__stops_too_and_a_cancel_may_follow(plane: ControlPlane) -> None:
    job_id = await running(plane)
    async with plane.sessions.begin() as session:
        job = await session.get_one(JobRow, job_id)
        job.desired, job.desired_at = Desired.PAUSE, plane.now
    reconciler = plane.reconciler()
    for _ in range(4):
        await reconciler.run_once()
        plane.advance(10)
    assert (await plane.job(job_id)).state is S.PAUSED
    await ask_cancel(plane, job_id)
    assert (await plane.job(job_id)).state is S.CANCELLED


async def test_finished__a_driver_that_lingers_is_stopped_after_a_grace(plane: ControlPlane) -> None:
    job_id = await running(plane)
    await plane.finish(job_id, 1)
    reconciler, name = plane.reconciler(), submission_id(job_id, 1)
    await reconciler.run_once()
    assert not plane.launcher.jobs[name].state.ended
    plane.advance(20)
    await reconciler.run_once()
    assert plane.launcher.jobs[name].state is ClusterState.STOPPED
    await reconciler.run_once()
    asked = plane.launcher.calls["status"]
    await reconciler.run_once()
    assert plane.launcher.calls["status"] == asked  # seen to be gone once, it is never asked for again
    assert (await plane.job(job_id)).state is S.SUCCEEDED


async def test_ray_away__fails_nothing_that_reports_and_the_waiting_say_so(plane: ControlPlane) -> None:
    job_id = await running(plane)
    waiting = await plane.submit()
    plane.launcher.away = True
    reconciler = plane.reconciler()
    for _ in range(3):
        plane.advance(1000)
        await plane.report(job_id, 1)
        await reconciler.run_once()
    assert (await plane.job(job_id)).state is S.RUNNING
    assert "cannot be asked" in (await plane.job(waiting)).reason
    plane.launcher.away = False
    await plane.report(job_id, 1)
    await reconciler.run_once()
    assert (await plane.job(job_id)).state is S.RUNNING
    assert (await plane.job(waiting)).state is S.LAUNCHING


async def test_submit__a_lost_reply_is_adopted(plane: ControlPlane) -> None:
    job_id = await plane.submit()
    plane.launcher.lose_next_reply = True
    reconciler = plane.reconciler()
    await reconciler.run_once()
    await reconciler.run_once()
    assert plane.launcher.num_started == {submission_id(job_id, 1): 1}
    assert (await plane.attempts(job_id))[0].launched_at is not None


async def test_one_broken_job__does_not_stop_the_others(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, fine = await plane.submit(), await plane.submit()
    submit = plane.launcher.submit

    async def fail_for_broken(submission: Any) -> None:
        if broken in submission.id:
            raise RuntimeError("a bug")
        await submit(submission)

    monkeypatch.setattr(plane.launcher, "submit", fail_for_broken)
    await plane.reconciler().run_once()
    assert list(plane.launcher.num_started) == [submission_id(fine, 1)]


class Crashes:
    """Kills the dispatcher at the n-th step: before or after each call to the cluster or write."""

    def __init__(self, at: int) -> None:
        self.left, self.happened = at, False

    def step(self, *_: object) -> None:
        if self.left == 0:
            self.happened = True
            self.left = -1
            raise CrashError
        self.left -= 1

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.step()
            result = await function(*args, **kwargs)
            self.step()
            return result

        return wrapped


async def _worker(plane: ControlPlane, job_id: str, *, cancelled: bool) -> None:
    """The first attempt's driver dies without a word; the second one finishes, or hears the stop."""
    for number in (1, 2):
        job = plane.launcher.jobs.get(submission_id(job_id, number))
        row = await plane.job(job_id)
        if job is None or job.state.ended or row.state not in (S.LAUNCHING, S.RUNNING):
            continue
        await plane.report(job_id, number)
        if number == 1:
            plane.launcher.end(submission_id(job_id, 1), ClusterState.FAILED, log="dead")
        elif cancelled:
            await ask_cancel(plane, job_id)
        else:
            await plane.finish(job_id, 2)


@pytest.mark.parametrize("cancelled", [False, True], ids=["finishes", "is cancelled"])
async def test_crash__at_every_single_step_ends_in_one_submission_and_one_final_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, cancelled: bool
) -> None:
    writes = {n: f for n, f in inspect.getmembers(record, inspect.iscoroutinefunction) if n[0] != "_"}
    at, num_crashes = 0, 0
    while True:
        crashes = Crashes(at)
        for name, function in writes.items():
            monkeypatch.setattr(record, name, crashes.around(function))
        folder = tmp_path / str(at)
        folder.mkdir()
        async with control_plane(folder) as plane:
            plane.launcher.on_call = crashes.step
            job_id = await plane.submit()
            await _drive(plane, job_id, cancelled=cancelled)
            states = await plane.moves_of(job_id)
            assert states.count("launching") == 2, f"crash {at}: {states}"
            assert states[-1] == ("cancelled" if cancelled else "succeeded")
            assert plane.launcher.num_started == {submission_id(job_id, n): 1 for n in (1, 2)}
            first, second = await plane.attempts(job_id)
            assert (first.outcome, second.outcome) == ("failed", "stopped" if cancelled else "succeeded")
            assert first.ray_ended_at is not None
            assert second.ray_ended_at is not None
        if not crashes.happened:
            break
        num_crashes, at = num_crashes + 1, at + 1
    assert num_crashes > 20


async def _drive(plane: ControlPlane, job_id: str, *, cancelled: bool) -> None:
    reconciler = plane.reconciler()
    for _ in range(40):
        try:
            await reconciler.run_once()
        except CrashError:
            reconciler = plane.reconciler()
        await _worker(plane, job_id, cancelled=cancelled)
        plane.advance(3)
        ended = all(attempt.ray_ended_at for attempt in await plane.attempts(job_id))
        if ended and (await plane.job(job_id)).state in FINAL:
            return


async def test_database_away__ends_the_pass_at_the_first_write(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        await plane.submit()
    asked: list[object] = []

    async def away(*told: object, **_: object) -> None:
        asked.append(told)
        raise OperationalError("SELECT 1", {}, ConnectionError("refused"))

    monkeypatch.setattr(record, "raise_fence", away)
    with pytest.raises(OperationalError):
        await plane.reconciler().run_once()
    assert len(asked) == 1
    assert "Traceback" not in caplog.text
