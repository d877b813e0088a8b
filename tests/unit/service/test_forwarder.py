"""From the database to a tracker that comes and goes."""

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from service.contracts.jobs import JobState as S
from service.contracts.jobs import MetricPoint
from service.db import leases, queries
from service.db.leases import Lease, LeaseLostError
from service.dispatch.forwarder import Forwarder, describe, flatten
from service.dispatch.tracker import NewRun, Outcome, TrackerRefusedError, TrackerUnavailableError
from service.domain.wishes import Verb
from service.jobs.wishes import ask
from tests.fakes.control_plane import ControlPlane, control_plane, lease_of
from tests.fakes.launcher import FakeLauncher
from tests.fakes.launcher_contract import LauncherContract
from tests.fakes.tracker import FakeRun, FakeTracker
from tests.fakes.tracker_contract import TrackerContract, png

URL = "http://api:8000"


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    async with control_plane(tmp_path) as made:
        yield made


class TestFakeTracker(TrackerContract):
    @pytest.fixture
    def tracker(self) -> FakeTracker:
        return FakeTracker()

    @pytest.fixture
    def record(self, tracker: FakeTracker) -> "FakeRecord":
        return FakeRecord(tracker)


class TestFakeLauncher(LauncherContract):
    @pytest.fixture
    def launcher(self) -> FakeLauncher:
        return FakeLauncher()


class FakeRecord:
    def __init__(self, tracker: FakeTracker) -> None:
        self._tracker = tracker

    def points(self, run_id: str) -> Mapping[tuple[str, int], list[float]]:
        return {place: [value] for place, value in self._tracker.runs[run_id].points.items()}

    def pictures(self, run_id: str) -> list[tuple[str, int]]:
        return sorted(self._tracker.runs[run_id].pictures)

    def status(self, run_id: str) -> tuple[str, str]:
        run = self._tracker.runs[run_id]
        return str(run.outcome or "RUNNING"), run.description

    def params(self, run_id: str) -> Mapping[str, str]:
        return self._tracker.runs[run_id].params

    def double(self, run_id: str) -> str:
        other = f"{run_id}-{len(self._tracker.runs)}"
        self._tracker.runs[other] = FakeRun(self._tracker.runs[run_id].new)
        return other

    def is_listed(self, run_id: str) -> bool:
        return run_id in self._tracker.runs and run_id not in self._tracker.deleted

    def delete(self, run_id: str) -> None:
        self._tracker.deleted.add(run_id)


def forwarder(plane: ControlPlane, tracker: FakeTracker) -> Forwarder:
    return Forwarder(
        plane.sessions,
        tracker,
        plane.store,
        lease=plane.lease,
        public_url=URL,
        monotonic=lambda: plane.now.timestamp(),
    )


def points(*steps: int) -> list[MetricPoint]:
    return [MetricPoint(key="loss", step=step, value=step / 8) for step in steps]


async def launched(plane: ControlPlane, name: str = "street", *, kind: str = "pretrain") -> str:
    job_id = await plane.submit(name, kind=kind)
    await plane.reconciler().run_once()
    return job_id


async def test_queued_job__has_no_run_yet(plane: ControlPlane) -> None:
    tracker = FakeTracker()
    await plane.submit()
    await forwarder(plane, tracker).run_once()
    assert tracker.runs == {}


async def test_launched_job__gets_one_described_run(plane: ControlPlane) -> None:
    job_id, tracker = await launched(plane), FakeTracker()
    for _ in range(2):
        await forwarder(plane, tracker).run_once()
    ((run_id, run),) = tracker.runs.items()
    assert (await plane.job(job_id)).mlflow_run_id == run_id
    assert run.new.name == "street"
    assert run.new.params["resources.cpus_per_worker"] == "1"
    assert run.new.tags["cim.kind"] == "pretrain"
    assert f"{URL}/v1/jobs/{job_id}" in run.description


async def test_points_and_pictures__arrive_then_the_run_is_closed(plane: ControlPlane) -> None:
    job_id, tracker = await launched(plane), FakeTracker()
    sample = plane.put(job_id, "samples/step-2.png", png("red"))
    other = plane.put(job_id, "encoder/config.json", b"{}")
    await plane.report(job_id, 1, *points(1, 2), files=(sample, other))
    sender = forwarder(plane, tracker)
    await sender.run_once()
    (run,) = tracker.runs.values()
    assert run.points == {("loss", 1): 1 / 8, ("loss", 2): 2 / 8}
    assert run.pictures == {("samples", 2): png("red")}
    assert not run.closed
    await plane.finish(job_id, 1, step=3, metrics={"loss": 3 / 8})
    await sender.run_once()
    assert run.points["loss", 3] == 3 / 8
    assert run.outcome is Outcome.FINISHED
    assert "timm.create_model" in run.description
    assert (await plane.job(job_id)).mlflow_closed


async def test_close__of_a_job_that_its_user_retries_meanwhile_leaves_it_open(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, tracker = await launched(plane), FakeTracker()
    await plane.report(job_id, 1)
    await plane.finish(job_id, 1, outcome="failed", failure={"kind": "user", "message": "no images"})
    close = tracker.close

    async def slowly(run_id: str, outcome: Outcome, **told: Any) -> None:
        await close(run_id, outcome, **told)
        async with plane.sessions.begin() as session:
            await ask(session, job_id, Verb.RETRY, now=plane.now)

    monkeypatch.setattr(tracker, "close", slowly)
    sender = forwarder(plane, tracker)
    await sender.run_once()
    assert not (await plane.job(job_id)).mlflow_closed
    await sender.run_once()
    (run,) = tracker.runs.values()
    assert run.outcome is None


async def test_batches__hold_a_thousand_points_at_most(plane: ControlPlane) -> None:
    job_id, tracker = await launched(plane), FakeTracker()
    await plane.report(job_id, 1, *points(*range(2500)))
    await forwarder(plane, tracker).run_once()
    assert tracker.batches == [1000, 1000, 500]


async def test_outage__loses_nothing_and_holds_up_no_launch(plane: ControlPlane) -> None:
    tracker = FakeTracker()
    tracker.away = True
    job_id = await launched(plane)
    sender = forwarder(plane, tracker)
    for step in range(5):
        sample = plane.put(job_id, f"samples/step-{step}.png", png("red"))
        await plane.report(job_id, 1, *points(step), files=(sample,))
        await sender.run_once()
    second = await launched(plane)
    await plane.finish(job_id, 1, outcome="failed", step=5, failure={"kind": "user", "message": "no"})
    await sender.run_once()
    assert (await plane.job(second)).state is S.LAUNCHING
    assert tracker.runs == {}
    tracker.away = False
    await sender.run_once()
    run = tracker.runs[f"run-{job_id}"]
    assert sorted(step for _, step in run.points) == [0, 1, 2, 3, 4]
    assert sorted(run.pictures) == [("samples", step) for step in range(5)]
    assert run.outcome is Outcome.FAILED


@pytest.mark.parametrize("moment", range(5))
async def test_lost_reply__at_any_moment_doubles_nothing(plane: ControlPlane, moment: int) -> None:
    """Each pass of the fake does four calls; the reply of one is lost, and a new dispatcher goes on."""
    job_id, tracker = await launched(plane), FakeTracker()
    sample = plane.put(job_id, "samples/step-1.png", png("red"))
    await plane.report(job_id, 1, *points(1), files=(sample,))
    await plane.finish(job_id, 1)
    calls = ["ensure_run", "log_points", "log_picture", "close", "none"]
    original = getattr(tracker, calls[moment], None)

    async def losing(*args: object, **kwargs: object) -> object:
        tracker.lose_next_reply = True
        setattr(tracker, calls[moment], original)
        assert original is not None
        return await original(*args, **kwargs)

    if original is not None:
        setattr(tracker, calls[moment], losing)
    for _ in range(2):
        await forwarder(plane, tracker).run_once()
    (run,) = tracker.runs.values()
    assert (len(run.points), len(run.pictures), run.outcome) == (1, 1, Outcome.FINISHED)
    assert tracker.batches.count(1) == (2 if calls[moment] == "log_points" else 1)


async def test_deleted_run__is_given_up_and_the_other_jobs_go_on(plane: ControlPlane) -> None:
    first, tracker = await launched(plane), FakeTracker()
    sender = forwarder(plane, tracker)
    await sender.run_once()
    second = await launched(plane)
    tracker.deleted.add(f"run-{first}")
    for job_id in (first, second):
        await plane.report(job_id, 1, *points(1))
    await sender.run_once()
    assert (await plane.job(first)).mlflow_closed
    assert len(tracker.runs[f"run-{second}"].points) == 1


def refusing(tracker: FakeTracker) -> Any:
    """As MLflow does with a parameter that is too long: the run is there, and is not accepted."""
    ensure = tracker.ensure_run

    async def refuse(run: NewRun) -> str:
        await ensure(run)
        raise TrackerRefusedError("a parameter is too long")

    return refuse


@pytest.mark.parametrize("ended", [False, True])
async def test_refused_run__is_not_left_running(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, *, ended: bool
) -> None:
    job_id, tracker = await launched(plane), FakeTracker()
    monkeypatch.setattr(tracker, "ensure_run", refusing(tracker))
    if ended:
        await plane.report(job_id, 1)
        await plane.finish(job_id, 1)
    await forwarder(plane, tracker).run_once()
    assert tracker.runs[f"run-{job_id}"].outcome is (Outcome.FINISHED if ended else Outcome.KILLED)
    assert "a parameter is too long" in tracker.runs[f"run-{job_id}"].description
    assert (await plane.job(job_id)).mlflow_closed


async def test_refused_run__is_given_up_only_once_it_is_closed(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, tracker = await launched(plane), FakeTracker()
    monkeypatch.setattr(tracker, "ensure_run", refusing(tracker))
    abandon = tracker.abandon

    async def away(*_: Any, **__: Any) -> None:
        monkeypatch.setattr(tracker, "abandon", abandon)
        raise TrackerUnavailableError("the tracker does not answer")

    monkeypatch.setattr(tracker, "abandon", away)
    sender = forwarder(plane, tracker)
    await sender.run_once()
    assert not (await plane.job(job_id)).mlflow_closed
    await sender.run_once()
    assert tracker.runs[f"run-{job_id}"].outcome is Outcome.KILLED
    assert (await plane.job(job_id)).mlflow_closed


async def test_many_jobs__each_gets_its_turn_however_busy_the_others_are(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.dispatch.forwarder._JOBS_A_PASS", 2)
    done, tracker = await launched(plane), FakeTracker()
    await plane.report(done, 1)
    await plane.finish(done, 1)
    busy = [await launched(plane) for _ in range(5)]
    sender = forwarder(plane, tracker)
    for step in range(1, 4):
        for job_id in busy:
            await plane.report(job_id, 1, *points(step))
        await sender.run_once()
    assert tracker.runs[f"run-{done}"].outcome is Outcome.FINISHED
    assert len(tracker.runs) == 6


async def test_database_away__ends_the_pass_at_the_first_job(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        await launched(plane)
    asked: list[object] = []

    async def away(*told: object, **_: object) -> None:
        asked.append(told)
        raise OperationalError("SELECT 1", {}, ConnectionError("refused"))

    monkeypatch.setattr(queries, "metrics_beyond", away)
    with pytest.raises(OperationalError):
        await forwarder(plane, FakeTracker()).run_once()
    assert len(asked) == 1
    assert caplog.records == []


async def test_close__removes_the_run_that_a_sleeping_dispatcher_made_beside(plane: ControlPlane) -> None:
    job_id, tracker = await launched(plane), FakeTracker()
    sender = forwarder(plane, tracker)
    await sender.run_once()
    double = FakeRecord(tracker).double(f"run-{job_id}")
    await plane.finish(job_id, 1)
    await sender.run_once()
    assert tracker.deleted == {double}
    assert tracker.runs[f"run-{job_id}"].outcome is Outcome.FINISHED


async def _take_over(plane: ControlPlane) -> Lease:
    """The lease, for the next dispatcher; who had it before does not know."""
    async with plane.sessions.begin() as session:
        await leases.release(session, plane.lease)
    return await lease_of(plane.sessions)


@pytest.mark.parametrize("ended", [False, True])
async def test_sleeper__that_makes_its_run_after_the_take_over_removes_it_again(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, *, ended: bool
) -> None:
    """It sleeps between its check of the lease and the call; another one does everything meanwhile."""
    job_id, tracker = await launched(plane), FakeTracker()
    late, first, make = forwarder(plane, tracker), f"run-{job_id}", tracker.ensure_run

    async def make_late(run: NewRun) -> str:
        monkeypatch.setattr(tracker, "ensure_run", make)
        plane.lease = await _take_over(plane)
        await forwarder(plane, tracker).run_once()
        if ended:
            await plane.finish(job_id, 1)
            await forwarder(plane, tracker).run_once()
            assert tracker.runs[first].outcome is Outcome.FINISHED
        await make(run)  # finds the run by its tag, and opens it again
        return FakeRecord(tracker).double(first)

    monkeypatch.setattr(tracker, "ensure_run", make_late)
    with pytest.raises(LeaseLostError):
        await late.run_once()
    assert tracker.deleted == set(tracker.runs) - {first}
    assert len(tracker.deleted) == 1
    assert tracker.runs[first].outcome is (Outcome.FINISHED if ended else None)


async def test_closed_jobs__cost_nothing(plane: ControlPlane) -> None:
    job_id, tracker = await launched(plane), FakeTracker()
    await plane.finish(job_id, 1)
    sender = forwarder(plane, tracker)
    await sender.run_once()
    statements: list[str] = []
    async with plane.sessions() as session:
        bind = session.get_bind()
    event.listen(bind, "before_cursor_execute", lambda *args: statements.append(args[2]))
    await sender.run_once()
    assert len([text for text in statements if text.startswith("SELECT")]) == 1


def test_flatten__gives_dotted_paths_and_json() -> None:
    tree = {"a": {"b": 1.5e-3, "c": {"d": None}}, "e": [1, {"f": 2}], "g": True, "h": "text", "i": {}}
    flat = {"a.b": "0.0015", "a.c.d": "null", "e": '[1, {"f": 2}]', "g": "true", "h": "text"}
    assert flatten(tree) == flat


async def test_describe__teaches_to_load_only_what_exists(plane: ControlPlane) -> None:
    job = await plane.job(await launched(plane, kind="tokenizer"))
    assert "timm" not in describe(job, public_url=URL)
    assert job.created_at < datetime.now(UTC)
