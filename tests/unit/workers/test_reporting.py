import math

import pytest

from service.client.errors import ApiError, UnreachableError
from service.contracts.jobs import FileEntry, Progress
from service.contracts.problems import Problem
from service.contracts.work import Report, ReportReply
from tests.fakes.work_client import FakeWork
from workers import reporting
from workers.failures import AttemptStaleError, ServiceAwayError
from workers.reporting import MAX_POINTS, POINTS_A_REPORT, Reporter, insistently


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def work() -> FakeWork:
    return FakeWork()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def reporter(work: FakeWork, clock: Clock) -> Reporter:
    return Reporter(work, give_up_after_s=900, clock=clock)


def refusal(code: str, status: int) -> ApiError:
    return ApiError(Problem(title="no", status=status, code=code, detail="no"))


def test_post__everything_arrives_once(reporter: Reporter, work: FakeWork) -> None:
    reporter.progress(Progress(step=5, message="training"))
    reporter.metrics(5, {"loss": 1.5})
    reporter.file(FileEntry(path="samples/step-5.png", size=1, sha256="0" * 64))
    reporter.plan({"total_steps": 10})
    assert reporter.post()
    assert reporter.post()
    first, second = work.reports
    assert (first.progress.step, first.metrics[0].value, first.plan) == (5, 1.5, {"total_steps": 10})
    assert (second.progress.step, second.metrics, second.files, second.plan) == (5, [], [], None)


def test_metrics__what_json_cannot_carry_goes_to_the_log_once(
    reporter: Reporter, work: FakeWork, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        reporter.metrics(step, {"loss": 1.0, "psnr": math.inf, "entropy": math.nan})
    reporter.post()
    assert {point.key for point in work.reports[0].metrics} == {"loss"}
    assert [record.getMessage().split()[0] for record in caplog.records] == ["psnr", "entropy"]


def test_post__points_wait_while_the_service_is_away(reporter: Reporter, work: FakeWork) -> None:
    reporter.metrics(1, {"loss": 1.0})
    work.away = True
    assert not reporter.post()
    reporter.metrics(2, {"loss": 0.5})
    work.away = False
    assert reporter.post()
    assert work.metric("loss") == {1: 1.0, 2: 0.5}


def test_metrics__the_oldest_points_are_given_up_first(reporter: Reporter, work: FakeWork) -> None:
    work.away = True
    for step in range(MAX_POINTS + 3):
        reporter.metrics(step, {"loss": 1.0})
    work.away = False
    assert reporter.flush()
    assert min(work.metric("loss")) == 3
    assert len(work.metric("loss")) == MAX_POINTS


class Training(FakeWork):
    """A training that is never silent: each report finds new points behind it. Ends after 20 of them."""

    reporter: Reporter

    def report(self, report: Report, *, patience_s: float = 0) -> ReportReply:
        if len(self.reports) < 20:
            self.reporter.metrics(100 + len(self.reports), {"loss": 1.0})
        return super().report(report, patience_s=patience_s)


def test_flush__waits_for_what_was_queued_before_it_alone(clock: Clock) -> None:
    work = Training()
    work.reporter = reporter = Reporter(work, clock=clock)
    reporter.metrics(1, {"loss": 1.0})
    reporter.file(FileEntry(path="a", size=1, sha256="0" * 64))
    mark = reporter.mark()
    reporter.metrics(2, {"loss": 1.0})
    assert reporter.flush(until=mark)
    assert len(work.reports) == 1
    assert reporter.waiting, "what came later"
    assert reporter.flush()
    assert sorted(work.metric("loss")) == [1, 2, 100], "the last was queued during the first flush"


def test_flush__more_points_than_a_report_holds(reporter: Reporter, work: FakeWork) -> None:
    for step in range(POINTS_A_REPORT + 1):
        reporter.metrics(step, {"loss": 1.0})
    mark = reporter.mark()
    assert reporter.flush(until=mark)
    assert len(work.metric("loss")) == POINTS_A_REPORT + 1


def test_flush__waits_for_a_plan_and_for_no_point_that_was_given_up(
    reporter: Reporter, work: FakeWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporting, "MAX_POINTS", 3)
    reporter.metrics(0, {"loss": 1.0})
    mark = reporter.mark()
    for step in (1, 2, 3):
        reporter.metrics(step, {"loss": 1.0})
    assert reporter.flush(until=mark)
    assert sorted(work.metric("loss")) == [1, 2, 3]
    reporter.plan({"total_steps": 10})
    mark = reporter.mark()
    work.away = True
    assert not reporter.flush(timeout_s=0, until=mark)
    work.away = False
    assert reporter.flush(until=mark)
    assert work.reports[-1].plan == {"total_steps": 10}


def test_flush__says_that_the_service_stayed_away(work: FakeWork, clock: Clock) -> None:
    class Away(FakeWork):
        def report(self, report: Report, *, patience_s: float = 0) -> ReportReply:
            clock.now += 300
            raise UnreachableError("the service is away")

    reporter = Reporter(Away(), every_s=0, clock=clock)
    reporter.metrics(1, {"loss": 1.0})
    assert not reporter.flush(timeout_s=900)
    assert clock.now == 900


def test_post__a_report_that_is_refused_for_good_does_not_block_the_next(
    reporter: Reporter, work: FakeWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_report: Report, *, patience_s: float) -> ReportReply:
        raise refusal("invalid", 422)

    reporter.metrics(1, {"loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(work, "report", refuse)
        reporter.post()
    reporter.metrics(2, {"loss": 0.5})
    reporter.post()
    assert work.metric("loss") == {2: 0.5}


def test_post__a_conflict_is_no_refusal(
    reporter: Reporter, work: FakeWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    def conflict(_report: Report, *, patience_s: float) -> ReportReply:
        raise refusal("conflict", 409)

    reporter.metrics(1, {"loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(work, "report", conflict)
        assert not reporter.post()
    reporter.post()
    assert work.metric("loss") == {1: 1.0}


def test_stop_requested__follows_the_directive(reporter: Reporter, work: FakeWork) -> None:
    work.stop_from_step = 3
    reporter.progress(Progress(step=2))
    reporter.post()
    assert not reporter.stop_requested
    reporter.progress(Progress(step=3))
    reporter.post()
    assert reporter.stop_requested


def test_check__a_stale_attempt_must_not_go_on(reporter: Reporter, work: FakeWork) -> None:
    reporter.check()
    work.stale = True
    with pytest.raises(AttemptStaleError):
        reporter.post()
    with pytest.raises(AttemptStaleError):
        reporter.check()


def test_check__a_service_that_stays_away_ends_the_attempt_and_a_short_outage_does_not(
    reporter: Reporter, work: FakeWork, clock: Clock
) -> None:
    work.away = True
    clock.now = 120
    reporter.post()
    reporter.check()
    clock.now = 901
    reporter.post()
    with pytest.raises(ServiceAwayError, match="901 s"):
        reporter.check()


def test_thread__posts_by_itself_until_closed(work: FakeWork) -> None:
    reporter = Reporter(work, every_s=0.01)
    reporter.start()
    with work.changed:
        assert work.changed.wait_for(lambda: len(work.reports) >= 2, timeout=30)
    reporter.close()
    seen = len(work.reports)
    reporter.metrics(1, {"loss": 1.0})
    assert len(work.reports) == seen


def test_report__says_how_long_the_training_has_been_silent(work: FakeWork, clock: Clock) -> None:
    reporter = Reporter(work, clock=clock)
    clock.now = 61
    reporter.post()
    reporter.alive()
    clock.now = 63
    reporter.post()
    reporter.progress(Progress(step=1))
    reporter.post()
    assert [report.idle_s for report in work.reports] == [61, 2, 0]


def test_insistently__repeats_a_conflict_and_nothing_else() -> None:
    answers = [refusal("conflict", 409), refusal("conflict", 409), None]
    calls: list[int] = []

    def action() -> None:
        calls.append(1)
        if (answer := answers[len(calls) - 1]) is not None:
            raise answer

    insistently(action, pause_s=0)
    assert len(calls) == 3

    def broken() -> None:
        raise refusal("broken_manifest", 409)

    with pytest.raises(ApiError):
        insistently(broken, pause_s=0)
