"""A dispatcher falls asleep at any step; another one does its work to the end; then the first wakes up."""

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from service.contracts.jobs import FINAL, Desired, MetricPoint
from service.contracts.jobs import JobState as S
from service.db import leases, moves
from service.db.leases import LeaseLostError
from service.db.tables import JobRow, LeaseRow
from service.dispatch import record
from service.dispatch.forwarder import Forwarder
from service.domain.decide import Limits
from service.domain.names import submission_id
from tests.fakes.control_plane import LEASE, RULES, ControlPlane, control_plane
from tests.fakes.tracker import FakeTracker

LIMITS = Limits(start_deadline_s=600, stall_after_s=20, stop_grace_s=10, lost_grace_s=5)
STORY = [
    *("queued", "launching", "running", "retrying"),  # the worker stalls
    *("launching", "running", "stopping", "cancelled"),  # its user has enough, and it does not hear
]
CLUSTER = ("submit", "status", "stop", "log_tail", "capacity")


async def take_over(plane: ControlPlane) -> None:
    """From here on, `plane` has the lease of another dispatcher."""
    async with plane.sessions.begin() as session:
        await session.execute(update(LeaseRow).values(expires_at=datetime(2000, 1, 1, tzinfo=UTC)))
        lease = await leases.take(session, LEASE, owner="the other one", lasts_s=3600)
    assert lease is not None
    plane.lease = lease


async def worker(plane: ControlPlane, job_id: str) -> None:
    job = await plane.job(job_id)
    name = submission_id(job_id, job.attempt)
    if name not in plane.launcher.jobs or plane.launcher.jobs[name].state.ended:
        return
    if job.state is S.LAUNCHING:
        await plane.report(job_id, job.attempt)
    elif job.state is S.RUNNING and job.attempt == 2:
        async with plane.sessions.begin() as session:
            row = await session.get_one(JobRow, job_id)
            row.desired, row.desired_at = Desired.CANCEL, plane.now


async def drive(plane: ControlPlane, job_id: str) -> None:
    """A dispatcher's life until nothing is left to do."""
    reconciler = plane.reconciler(replace(RULES, limits=LIMITS))
    for _ in range(40):
        await reconciler.run_once()
        await worker(plane, job_id)
        plane.advance(7)
        ended = all(attempt.ray_ended_at for attempt in await plane.attempts(job_id))
        if ended and (await plane.job(job_id)).state in FINAL:
            return
    raise AssertionError(f"no end in sight: {await plane.moves_of(job_id)}")


async def everything(plane: ControlPlane, job_id: str) -> list[Any]:
    """All that a dispatcher could have written."""
    rows = [await plane.job(job_id), *await plane.attempts(job_id)]
    columns = [{key: value for key, value in vars(row).items() if key[0] != "_"} for row in rows]
    return [*columns, await plane.moves_of(job_id)]


class Sleep:
    """Before the n-th call to the cluster or write, which is after the one before, `meanwhile` happens."""

    def __init__(self, at: int, meanwhile: Callable[[], Awaitable[None]]) -> None:
        self.left, self.meanwhile = at, meanwhile

    async def step(self) -> None:
        self.left -= 1
        if self.left == -1:
            await self.meanwhile()

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        async def wrapped(*args: Any, **kwargs: Any) -> Any:
            await self.step()
            return await function(*args, **kwargs)

        return wrapped


async def test_sleeper__at_every_single_step_writes_nothing_after_the_take_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, num_refused = 0, 0
    while True:
        folder = tmp_path / str(at)
        folder.mkdir()
        async with control_plane(folder) as plane:
            slept, refused = await _sleep_at(plane, at, monkeypatch)
        num_refused, at = num_refused + refused, at + 1
        if not slept:
            break
    assert at > 20, "too short a story"
    assert num_refused > 10, "the sleeper has hardly anything to write"


async def _sleep_at(plane: ControlPlane, at: int, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, bool]:
    """Whether there was such a step, and whether the sleeper met the other's lease afterwards."""
    job_id = await plane.submit()
    left: list[Any] = []

    async def meanwhile() -> None:
        await take_over(plane)
        await drive(plane, job_id)
        left.extend(await everything(plane, job_id))

    refused = False
    with monkeypatch.context() as patched:
        sleep = Sleep(at, meanwhile)
        for name, function in inspect.getmembers(record, inspect.iscoroutinefunction):
            if not name.startswith("_"):
                patched.setattr(record, name, sleep.around(function))
        for name in CLUSTER:
            patched.setattr(plane.launcher, name, sleep.around(getattr(plane.launcher, name)))
        try:
            await drive(plane, job_id)
        except LeaseLostError:
            refused = True
    assert await plane.moves_of(job_id) == STORY, f"step {at}"
    assert plane.launcher.num_started == {submission_id(job_id, n): 1 for n in (1, 2)}
    if left:
        assert await everything(plane, job_id) == left, f"step {at}"
    return bool(left), refused


async def test_lost_driver__is_not_stopped_where_the_write_is_refused(plane: ControlPlane) -> None:
    job_id = await plane.submit()
    reconciler = plane.reconciler(replace(RULES, limits=LIMITS))
    await reconciler.run_once()
    await plane.report(job_id, 1)
    plane.advance(21)
    await take_over(plane)
    with pytest.raises(LeaseLostError):
        await reconciler.run_once()
    assert not plane.launcher.jobs[submission_id(job_id, 1)].state.ended
    assert (await plane.job(job_id)).state is S.RUNNING


async def test_submit_again__not_for_a_job_that_moved_since_it_was_looked_at(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await plane.submit()
    plane.launcher.away = True  # the fence is raised, but the cluster does not hear of it
    plane.launcher.on_call = lambda moment, call: setattr(plane.launcher, "away", call == "submit")
    await plane.reconciler().run_once()
    assert (await plane.job(job_id)).state is S.LAUNCHING
    status = plane.launcher.status

    async def cancelled_meanwhile(submission: str) -> Any:
        async with plane.sessions.begin() as session:
            seen = moves.seen(await session.get_one(JobRow, job_id))
            await moves.move(session, seen, S.STOPPING, actor="user", message="", now=plane.now)
        return await status(submission)

    monkeypatch.setattr(plane.launcher, "status", cancelled_meanwhile)
    plane.launcher.on_call = lambda moment, call: None
    plane.launcher.away = False
    await plane.reconciler().run_once()
    assert plane.launcher.calls["status"] == 1
    assert plane.launcher.num_started == {}


async def test_force__is_not_used_where_the_write_is_refused(plane: ControlPlane) -> None:
    job_id = await plane.submit()
    reconciler = plane.reconciler()
    await reconciler.run_once()
    await plane.report(job_id, 1)
    await plane.finish(job_id, 1, outcome="failed", failure={"kind": "storage", "message": "refused"})
    await take_over(plane)
    with pytest.raises(LeaseLostError):
        await reconciler.run_once()
    assert not plane.launcher.jobs[submission_id(job_id, 1)].state.ended


def forwarder(plane: ControlPlane, tracker: FakeTracker) -> Forwarder:
    return Forwarder(plane.sessions, tracker, plane.store, lease=plane.lease, public_url="http://api")


async def sleepy_forwarder(plane: ControlPlane, tracker: FakeTracker, call: str, job_id: str) -> list[Any]:
    """It loses its lease in `call`, and says so; what was written by then."""
    sleeper = forwarder(plane, tracker)
    original, written = getattr(tracker, call), []

    async def sleep(*args: Any, **kwargs: Any) -> Any:
        await take_over(plane)
        written.extend(await everything(plane, job_id))
        return await original(*args, **kwargs)

    setattr(tracker, call, sleep)
    with pytest.raises(LeaseLostError):
        await sleeper.run_once()
    setattr(tracker, call, original)
    return written


async def test_forwarder__after_a_take_over_makes_no_run_and_sends_no_picture(plane: ControlPlane) -> None:
    job_id, tracker = await plane.submit(), FakeTracker()
    await plane.reconciler().run_once()
    sleeper = forwarder(plane, tracker)
    await take_over(plane)
    with pytest.raises(LeaseLostError):
        await sleeper.run_once()
    assert tracker.runs == {}

    await forwarder(plane, tracker).run_once()
    sample = plane.put(job_id, "samples/step-1.png", b"a picture")
    await plane.report(job_id, 1, files=(sample,))
    with pytest.raises(LeaseLostError):
        await sleeper.run_once()
    assert tracker.runs[f"run-{job_id}"].pictures == {}


@pytest.mark.parametrize("call", ["ensure_run", "log_points", "log_picture", "close"])
async def test_forwarder__asleep_in_a_call_writes_nothing_afterwards(plane: ControlPlane, call: str) -> None:
    job_id, tracker = await plane.submit(), FakeTracker()
    await plane.reconciler().run_once()
    sample = plane.put(job_id, "samples/step-1.png", b"a picture")
    await plane.report(job_id, 1, MetricPoint(key="loss", step=1, value=1.0), files=(sample,))
    await plane.finish(job_id, 1)
    written = await sleepy_forwarder(plane, tracker, call, job_id)
    assert await everything(plane, job_id) == written


async def test_forwarder__a_sleeper_gives_no_run_up(plane: ControlPlane) -> None:
    job_id, tracker = await plane.submit(), FakeTracker()
    await plane.reconciler().run_once()
    await forwarder(plane, tracker).run_once()
    await plane.report(job_id, 1, MetricPoint(key="loss", step=1, value=1.0))
    tracker.deleted.add(f"run-{job_id}")
    written = await sleepy_forwarder(plane, tracker, "log_points", job_id)
    assert await everything(plane, job_id) == written
    assert not (await plane.job(job_id)).mlflow_closed


@pytest.fixture
async def plane(tmp_path: Path) -> Any:
    async with control_plane(tmp_path) as made:
        yield made
