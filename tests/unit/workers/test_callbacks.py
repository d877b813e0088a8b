import math
import threading
from pathlib import Path
from typing import cast

import pytest
import torch
from PIL import Image
from torch import nn

from cim_core.durations import Plan
from cim_core.engine.callbacks import StepReport
from cim_core.engine.state import TrainState
from service.client.errors import StaleAttempt, UnreachableError
from service.client.work import WorkClient
from service.contracts.jobs import FailureKind
from service.contracts.work import Assignment, Checkpoint, Report, ReportReply, StoreAddress
from tests.fakes.work_client import FakeWork
from workers.attempt import Attempt, Work
from workers.callbacks import DELIVERY_S, RankCallbacks
from workers.checkpointing import CheckpointWriter, fetch, restore
from workers.failures import AttemptStaleError, ServiceAwayError, classify
from workers.rank import Rank
from workers.reporting import Reporter
from workers.settings import WorkerSettings
from workers.storage import JobStore

PLAN = Plan(
    total_steps=20,
    warmup_steps=1,
    checkpoint_steps=frozenset({20}),
    sample_steps=frozenset({0, 10, 20}),
    batch_size=4,
    num_images=8,
)


@pytest.fixture
def work() -> FakeWork:
    return FakeWork()


def callbacks_of(
    tmp_path: Path, work: FakeWork, *, number: int = 0, reporter: Reporter | None = None
) -> RankCallbacks:
    spec = {"kind": "tokenizer", "name": "t", "data": {"uri": "/x"}, "training": {"steps": 20}}
    address = StoreAddress(url=str(tmp_path))
    assignment = Assignment(job_id="ab", attempt=1, spec=spec, inputs={}, store=address)
    settings = WorkerSettings(url="http://x", job_id="ab", attempt=1, code="c", cache_dir=tmp_path)
    store = JobStore.of(assignment)
    rank = Rank(
        work=Work(attempt=Attempt.of(settings, assignment), indices={}, plan=PLAN),
        number=number,
        world_size=2,
        device=torch.device("cpu"),
        store=store,
        service=cast(WorkClient, work),
        reporter=reporter or Reporter(work),
        files=[],
    )
    return RankCallbacks(
        rank=rank,
        writer=CheckpointWriter(store, work, fingerprint={}),
        picture=lambda: Image.new("RGB", (4, 4)),
        probe=lambda: {"probe_knn_top1": 0.5},
        probe_steps=frozenset({5, 10}),
        diagnose=lambda: {"diag_rankme": 7.0},
    )


def step_report(step: int, *, images_per_s: float = 8.0, loss: float = 1.0) -> StepReport:
    return StepReport(step=step, metrics={"loss": loss}, images_per_s=images_per_s, learning_rate=0.1)


def test_on_step__progress_epoch_and_time_left(tmp_path: Path, work: FakeWork) -> None:
    callbacks = callbacks_of(tmp_path, work)
    callbacks.on_step(step_report(10))
    callbacks.rank.reporter.post()
    progress = work.reports[0].progress
    assert (progress.step, progress.total_steps) == (10, 20)
    assert progress.epoch == 5.0  # 10 steps of 4 images, of 8
    assert progress.eta_s == 5.0  # 10 more steps of 4 images at 8 images a second
    assert {point.key for point in work.reports[0].metrics} == {"loss", "learning_rate", "images_per_s"}


def test_on_step__one_slow_stretch_does_not_upset_the_estimate(tmp_path: Path, work: FakeWork) -> None:
    callbacks = callbacks_of(tmp_path, work)
    callbacks.on_step(step_report(1, images_per_s=10.0))
    callbacks.on_step(step_report(2, images_per_s=0.0))
    assert callbacks.pace == pytest.approx(7.0)


def test_on_step__what_is_not_finite_is_no_final_metric(tmp_path: Path, work: FakeWork) -> None:
    callbacks = callbacks_of(tmp_path, work)
    callbacks.on_step(step_report(1, loss=math.inf))
    assert "loss" not in callbacks.latest


def test_on_sample__pictures_and_probes_have_their_own_steps(tmp_path: Path, work: FakeWork) -> None:
    callbacks = callbacks_of(tmp_path, work)
    for step in (0, 5, 10, 20):
        callbacks.on_sample(step)
    callbacks.rank.reporter.post()
    assert [entry.path for entry in callbacks.rank.files] == [f"samples/step-{s}.png" for s in (0, 10, 20)]
    assert (tmp_path / "jobs/ab/samples/step-10.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(work.metric("probe_knn_top1")) == [5, 10]
    assert work.metric("diag_rankme") == {0: 7.0, 10: 7.0, 20: 7.0}
    assert callbacks.latest["diag_rankme"] == 7.0


def test_on_checkpoint__metrics_before_it_are_delivered_first(tmp_path: Path, work: FakeWork) -> None:
    callbacks = callbacks_of(tmp_path, work)
    callbacks.on_step(step_report(20))
    model = nn.Linear(1, 1)
    state = TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()), step=20)
    with callbacks.finishing():
        callbacks.on_checkpoint(state, 20)
    assert work.metric("loss") == {20: 1.0}
    assert [checkpoint.step for checkpoint in work.checkpoints] == [20]


def test_other_ranks__say_and_store_nothing(tmp_path: Path, work: FakeWork) -> None:
    callbacks = callbacks_of(tmp_path, work, number=1)
    model = nn.Linear(1, 1)
    callbacks.on_start(0)
    callbacks.on_step(step_report(10))
    callbacks.on_sample(10)
    callbacks.on_checkpoint(TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters())), 10)
    assert (work.reports, work.checkpoints, list(tmp_path.iterdir())) == ([], [], [])


def test_should_stop__follows_the_service_and_ends_a_stale_attempt(tmp_path: Path, work: FakeWork) -> None:
    callbacks = callbacks_of(tmp_path, work)
    callbacks.rank.reporter.post()
    assert not callbacks.should_stop()
    work.stop_from_step = 0
    callbacks.rank.reporter.post()
    assert callbacks.should_stop()
    work.stale = True
    with pytest.raises(AttemptStaleError):
        callbacks.rank.reporter.post()
    with pytest.raises(AttemptStaleError):
        callbacks.should_stop()


def trained_state(step: int) -> TrainState:
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, step)
    return TrainState(model=model, optimizer=torch.optim.AdamW(model.parameters()), step=step)


class Gate(FakeWork):
    """Holds commits back until it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()

    def commit_checkpoint(self, checkpoint: Checkpoint) -> None:
        assert self.open.wait(timeout=30)
        super().commit_checkpoint(checkpoint)


def test_on_checkpoint__training_goes_on_and_what_is_stored_is_what_was(tmp_path: Path) -> None:
    work = Gate()
    callbacks, state = callbacks_of(tmp_path, work), trained_state(10)
    with callbacks.finishing():
        callbacks.on_checkpoint(state, 10)
        assert work.checkpoints == [], "it returned before the commit"
        assert not callbacks.should_stop()
        with torch.no_grad():
            state.model.get_parameter("weight").fill_(-1.0)
        work.open.set()
    (checkpoint,) = work.checkpoints
    restored = trained_state(0)
    folder = fetch(checkpoint, callbacks.rank.store, tmp_path / "cache")
    restore(restored, folder, fingerprint={})
    assert (restored.step, restored.model.get_parameter("weight").item()) == (10, 10.0)


def test_on_checkpoint__is_committed_while_training_goes_on_reporting(tmp_path: Path) -> None:
    """Only what was measured before the checkpoint is waited for; each report here finds new points."""

    class Training(FakeWork):
        reports_before = 0

        def report(self, report: Report, *, patience_s: float = 0) -> ReportReply:
            if len(self.reports) < 20:
                callbacks.on_step(step_report(11 + len(self.reports)))
            return super().report(report, patience_s=patience_s)

        def commit_checkpoint(self, checkpoint: Checkpoint) -> None:
            self.reports_before = len(self.reports)
            super().commit_checkpoint(checkpoint)

    work = Training()
    callbacks = callbacks_of(tmp_path, work)
    callbacks.on_step(step_report(10))
    with callbacks.finishing():
        callbacks.on_checkpoint(trained_state(10), 10)
    assert work.metric("loss")[10] == 1.0
    assert (work.reports_before, len(work.checkpoints)) == (1, 1)


def test_on_checkpoint__is_not_committed_where_its_metrics_are_not_delivered(tmp_path: Path) -> None:
    """The attempt ends in a way that is retried: from the checkpoint before."""
    now = 0.0

    class Deaf(FakeWork):
        def report(self, report: Report, *, patience_s: float = 0) -> ReportReply:
            nonlocal now
            now += DELIVERY_S / 2
            raise UnreachableError("the service takes no reports")

    work = Deaf()
    reporter = Reporter(work, every_s=0, clock=lambda: now)
    callbacks = callbacks_of(tmp_path, work, reporter=reporter)
    callbacks.on_step(step_report(10))
    with pytest.raises(ServiceAwayError, match="step 10") as caught, callbacks.finishing():
        callbacks.on_checkpoint(trained_state(10), 10)
    assert work.checkpoints == []
    assert classify(caught.value, store_url="s3://x").kind == FailureKind.INFRASTRUCTURE


def test_on_checkpoint__commits_are_in_order(tmp_path: Path, work: FakeWork) -> None:
    callbacks = callbacks_of(tmp_path, work)
    with callbacks.finishing():
        for step in (1, 2, 3, 4):
            callbacks.on_checkpoint(trained_state(step), step)
    assert [checkpoint.step for checkpoint in work.checkpoints] == [1, 2, 3, 4]


def test_on_checkpoint__what_failed_is_raised_at_a_next_step(
    tmp_path: Path, work: FakeWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    callbacks = callbacks_of(tmp_path, work)

    def full(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(callbacks.writer, "save", full)
    callbacks.on_checkpoint(trained_state(10), 10)
    callbacks.background.close()
    with pytest.raises(OSError, match="the disk is full"):
        callbacks.should_stop()


def test_finishing__raises_what_the_last_commit_raised(tmp_path: Path, work: FakeWork) -> None:
    callbacks = callbacks_of(tmp_path, work)
    work.stale = True
    with pytest.raises((StaleAttempt, AttemptStaleError)), callbacks.finishing():
        callbacks.on_checkpoint(trained_state(10), 10)


def test_finishing__an_error_of_the_training_goes_first(tmp_path: Path, work: FakeWork) -> None:
    callbacks = callbacks_of(tmp_path, work)
    work.stale = True
    callbacks.on_checkpoint(trained_state(10), 10)
    with pytest.raises(ArithmeticError, match="NaN"), callbacks.finishing():
        raise ArithmeticError("NaN")
