"""One run that MLflow does not take, or with a backlog of days, holds up no other's."""

import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from service.contracts.jobs import MetricPoint
from service.dispatch import forwarder as module
from service.dispatch.tracker import Outcome, Point, TrackerFailedError, TrackerUnavailableError
from service.store.base import StoreError
from tests.fakes import poison
from tests.fakes.control_plane import ControlPlane, control_plane
from tests.fakes.tracker import FakeTracker
from tests.fakes.tracker_contract import png
from tests.unit.service.test_forwarder import forwarder, launched, points

BROKEN = (
    TrackerUnavailableError("MLflow at http://mlflow: INTERNAL_ERROR"),
    TrackerFailedError("MLflow at http://mlflow: BAD_REQUEST"),
    RuntimeError("a bug in its client"),
)


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with control_plane(tmp_path) as made:
        yield made


class SickTracker(FakeTracker):
    """Does not take the points of one run."""

    def __init__(self, run_id: str, error: Exception) -> None:
        super().__init__()
        self.sick: str | None = run_id
        self.error = error

    async def log_points(self, run_id: str, points: Sequence[Point]) -> None:
        self._check()
        if run_id == self.sick:
            raise self.error
        await super().log_points(run_id, points)


@pytest.mark.parametrize("error", BROKEN, ids=lambda error: type(error).__name__)
async def test_one_run__that_always_fails_is_passed_over_told_and_tried_again(
    plane: ControlPlane, error: Exception
) -> None:
    jobs = [await launched(plane) for _ in range(5)]
    sick, *healthy = jobs[2], *jobs[:2], *jobs[3:]
    tracker = SickTracker(f"run-{sick}", error)
    sender = forwarder(plane, tracker)
    for step in (1, 2, 3):
        for job_id in jobs:
            await plane.report(job_id, 1, *points(step))
        await sender.run_once()
        for job_id in healthy:
            assert len(tracker.runs[f"run-{job_id}"].points) == step
    assert (await plane.job(sick)).reason.startswith(
        f"MLflow does not get all of it (3 tries failed, others follow): {type(error).__name__}: "
    )
    tracker.sick = None
    plane.advance(2)
    await sender.run_once()
    assert len(tracker.runs[f"run-{sick}"].points) == 3
    assert (await plane.job(sick)).reason == "attempt 1 is running"


async def test_outage__is_told_once_and_noted_against_no_job(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    jobs, tracker = [await launched(plane) for _ in range(3)], FakeTracker()
    sender = forwarder(plane, tracker)
    await sender.run_once()
    for outage in range(2):
        tracker.away = True
        for job_id in jobs:
            await plane.report(job_id, 1, *points(outage + 1))
        for _ in range(5):
            await sender.run_once()
        tracker.away = False
        await sender.run_once()
    assert all(len(run.points) == 2 for run in tracker.runs.values())
    assert {(await plane.job(job_id)).reason for job_id in jobs} == {"attempt 1 is running"}
    told = [r.getMessage() for r in caplog.records if r.name.startswith("service.dispatch")]
    assert told == ["what MLflow lacks waits: the tracker does not answer"] * 2


async def test_store__that_is_away_keeps_pictures_back_and_no_points(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jobs, tracker = [await launched(plane) for _ in range(2)], FakeTracker()
    for job_id in jobs:
        picture = plane.put(job_id, "samples/step-1.png", png("red"))
        await plane.report(job_id, 1, *points(1), files=(picture,))

    def away(*_: object) -> bytes:
        raise StoreError("refused")

    sender = forwarder(plane, tracker)
    with monkeypatch.context() as patch:
        patch.setattr(plane.store, "get_bytes", away)
        patch.setattr(plane.store, "stat", away)
        for _ in range(4):
            await sender.run_once()
    assert [len(run.points) for run in tracker.runs.values()] == [1, 1]
    told = [r.getMessage() for r in caplog.records if r.name.startswith("service.dispatch")]
    assert told == ["what MLflow lacks waits: refused"]
    await sender.run_once()
    assert [len(run.pictures) for run in tracker.runs.values()] == [1, 1]


async def test_picture__that_alone_cannot_be_read_is_its_jobs_trouble(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, tracker = [await launched(plane) for _ in range(2)], FakeTracker()
    for job_id in jobs:
        await plane.report(job_id, 1, files=(plane.put(job_id, "samples/step-1.png", png("red")),))
    inner = plane.store.get_bytes

    def forbidden(key: str) -> bytes:
        if jobs[1] in key:
            raise StoreError("403 for this key")
        return inner(key)

    monkeypatch.setattr(plane.store, "get_bytes", forbidden)
    sender = forwarder(plane, tracker)
    for _ in range(3):
        await sender.run_once()
    assert tracker.runs[f"run-{jobs[0]}"].pictures
    assert "403 for this key" in (await plane.job(jobs[1])).reason
    assert (await plane.job(jobs[0])).reason == "attempt 1 is running"


async def test_backlog__of_one_job_takes_a_part_of_each_pass(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BATCH", 10)
    long, short = await launched(plane), await launched(plane)
    many = [MetricPoint(key=f"k{n}", step=1, value=n) for n in range(450)]
    pictures = [plane.put(long, f"samples/step-{n}.png", png("red")) for n in range(50)]
    await plane.report(long, 1, *many, files=tuple(pictures))
    await plane.report(short, 1, *points(1))
    await plane.finish(long, 1)
    tracker = FakeTracker()
    sender = forwarder(plane, tracker)
    seen = []
    for _ in range(3):
        await sender.run_once()
        run = tracker.runs[f"run-{long}"]
        seen.append((len(run.points), len(run.pictures), run.outcome))
        assert len(tracker.runs[f"run-{short}"].points) == 1
    assert seen == [
        (200, 20, None),
        (400, 40, None),
        (450, 50, Outcome.FINISHED),
    ]


async def test_unreadable_job__is_told_and_logged_once(
    plane: ControlPlane, caplog: pytest.LogCaptureFixture
) -> None:
    poisoned, healthy = await launched(plane), await launched(plane)
    await poison.plant(plane.sessions, "jobs.started_at", poisoned, "poison")
    tracker = FakeTracker()
    sender = forwarder(plane, tracker)
    for _ in range(6):
        await sender.run_once()
    assert list(tracker.runs) == [f"run-{healthy}"]
    caplog_errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert len(caplog_errors) == 1
    await poison.plant(plane.sessions, "jobs.started_at", poisoned, None)
    plane.advance(10)
    await sender.run_once()
    assert set(tracker.runs) == {f"run-{healthy}", f"run-{poisoned}"}
