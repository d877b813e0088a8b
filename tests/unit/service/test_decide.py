from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.contracts.jobs import FINAL, Desired, FailureKind
from service.contracts.jobs import JobState as S
from service.domain import lifecycle
from service.domain.decide import (
    Change,
    ClusterJob,
    ClusterState,
    Decision,
    Dependency,
    ForceStop,
    JobSeen,
    Keep,
    Launch,
    Limits,
    Lost,
    NoteSubmitted,
    Sight,
    Submit,
    decide,
    ready,
)
from service.domain.queueing import Needs
from service.domain.usage import Usage

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LIMITS = Limits(start_deadline_s=100, stall_after_s=60, stop_grace_s=20, lost_grace_s=5)
RUNS = Sight(job=ClusterJob(state=ClusterState.RUNNING))
FAILED = Sight(job=ClusterJob(state=ClusterState.FAILED, exit_code=9, message="killed"), gone_for_s=6)
UNKNOWN = Sight(job=None, gone_for_s=6)
AWAY = Sight(known=False)
SPENT = Usage(runtime_s=7200, runtime_limit_s=7200)


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def seen(state: S, **changes: object) -> JobSeen:
    job = JobSeen(
        id="a" * 16,
        state=state,
        desired=Desired.RUN,
        attempt=0 if state is S.QUEUED else 1,
        needs=Needs(cpus=1),
        priority=50,
        created_at=ago(1000),
        since=ago(1),
        submitted=state is S.RUNNING,
    )
    return replace(job, **changes)  # type: ignore[arg-type]


def needs(state: S, reason: str = "") -> Dependency:
    return Dependency(job_id="b" * 16, name="tok", state=state, reason=reason)


def decided(job: JobSeen, sight: Sight = UNKNOWN, *, admission: str | None = None) -> Decision:
    return decide(job, sight, admission=admission, now=NOW, limits=LIMITS)


def test_queued__starts_when_admitted_and_says_why_when_not() -> None:
    assert decided(seen(S.QUEUED)) == Launch()
    assert decided(seen(S.QUEUED), admission="waiting for room") == Keep(reason="waiting for room")


def test_queued__waits_for_a_dependency_and_fails_with_it() -> None:
    assert decided(seen(S.QUEUED, dependencies=(needs(S.SUCCEEDED),))) == Launch()
    waiting = seen(S.QUEUED, dependencies=(needs(S.SUCCEEDED), needs(S.RETRYING)))
    assert decided(waiting) == Keep(reason=f"waiting for job {'b' * 16} (tok)")
    broken = decided(seen(S.QUEUED, dependencies=(needs(S.RUNNING), needs(S.FAILED, "no images in /x"))))
    told = f"job {'b' * 16} (tok), which this one needs, failed: no images in /x"
    assert broken == Change(dst=S.FAILED, reason=told, failure_kind=FailureKind.USER)
    cancelled = decided(seen(S.QUEUED, dependencies=(needs(S.CANCELLED),)))
    assert isinstance(cancelled, Change)
    assert cancelled.reason.endswith("which this one needs, was cancelled")


@pytest.mark.parametrize("state", [S.QUEUED, S.RETRYING, S.PAUSED])
def test_without_workers__a_cancel_is_done_at_once(state: S) -> None:
    change = decided(seen(state, desired=Desired.CANCEL), RUNS)
    assert isinstance(change, Change)
    assert change.dst is S.CANCELLED


@pytest.mark.parametrize("state", [S.LAUNCHING, S.RUNNING])
@pytest.mark.parametrize("desired", [Desired.CANCEL, Desired.PAUSE])
@pytest.mark.parametrize("sight", [RUNS, FAILED, UNKNOWN, AWAY])
def test_with_workers__a_wish_to_stop_comes_before_everything(
    state: S, desired: Desired, sight: Sight
) -> None:
    change = decided(seen(state, desired=desired), sight)
    assert isinstance(change, Change)
    assert change.dst is S.STOPPING


def test_launching__unknown_to_ray_is_submitted_again_only_if_it_never_arrived() -> None:
    assert decided(seen(S.LAUNCHING), UNKNOWN) == Submit()
    assert decided(seen(S.LAUNCHING), RUNS) == NoteSubmitted()
    lost = decided(seen(S.LAUNCHING, submitted=True), UNKNOWN)
    assert isinstance(lost, Lost)
    assert lost.kind is FailureKind.INFRASTRUCTURE


def test_launching__gives_up_at_the_deadline() -> None:
    assert decided(seen(S.LAUNCHING, submitted=True, since=ago(99)), RUNS) == Keep()
    lost = decided(seen(S.LAUNCHING, submitted=True, since=ago(100)), RUNS)
    assert isinstance(lost, Lost)
    assert lost.kind is FailureKind.INFRASTRUCTURE
    assert "did not report within 100 s" in lost.message


def test_running__an_end_without_a_result_is_lost_after_the_grace() -> None:
    assert decided(seen(S.RUNNING), replace(FAILED, gone_for_s=4.9)) == Keep()
    lost = decided(seen(S.RUNNING), FAILED)
    assert isinstance(lost, Lost)
    assert lost.kind is FailureKind.INFRASTRUCTURE
    assert "exit status 9" in lost.message
    assert "killed" in lost.message


@pytest.mark.parametrize("state", [ClusterState.SUCCEEDED, ClusterState.STOPPED])
def test_running__rays_success_is_not_ours(state: ClusterState) -> None:
    assert isinstance(decided(seen(S.RUNNING), Sight(job=ClusterJob(state=state), gone_for_s=6)), Lost)


def test_running__silence_is_a_stall_and_the_last_report_restarts_the_clock() -> None:
    assert decided(seen(S.RUNNING, since=ago(500), reported_at=ago(59)), RUNS) == Keep()
    lost = decided(seen(S.RUNNING, since=ago(1), reported_at=ago(60)), RUNS)
    assert isinstance(lost, Lost)
    assert lost.kind is FailureKind.STALLED


@pytest.mark.parametrize("state", [S.LAUNCHING, S.RUNNING, S.STOPPING])
def test_ray_away__nothing_is_concluded_for_as_long_as_a_silence_is_borne(state: S) -> None:
    job = seen(state, since=ago(59), reported_at=ago(59), submitted=True)
    assert decided(job, AWAY) == Keep()


def test_ray_away__the_next_attempt_waits_for_its_answer() -> None:
    assert decided(seen(S.RETRYING, since=ago(10_000), reported_at=ago(10_000)), AWAY) == Keep()


def test_ray_away__a_worker_that_reports_goes_on_and_a_silent_one_is_stalled() -> None:
    job = seen(S.RUNNING, since=ago(10_000), reported_at=ago(59), submitted=True)
    assert decided(job, AWAY) == Keep()
    lost = decided(replace(job, reported_at=ago(60)), AWAY)
    assert isinstance(lost, Lost)
    assert lost.kind is FailureKind.STALLED
    assert "Ray does not answer" in lost.message


def test_ray_away__a_launch_that_arrived_has_its_deadline_and_another_one_is_submitted_later() -> None:
    job = seen(S.LAUNCHING, since=ago(99), submitted=True)
    assert decided(job, AWAY) == Keep()
    lost = decided(replace(job, since=ago(100)), AWAY)
    assert isinstance(lost, Lost)
    assert lost.kind is FailureKind.INFRASTRUCTURE
    assert decided(replace(job, since=ago(10_000), submitted=False), AWAY) == Keep()


@pytest.mark.parametrize(
    ("desired", "used", "dst"),
    [
        (Desired.CANCEL, Usage(), S.CANCELLED),
        (Desired.PAUSE, Usage(), S.PAUSED),
        (Desired.RUN, SPENT, S.FAILED),
    ],
)
def test_ray_away__a_stop_is_over_after_a_while_whatever_the_worker_says(
    desired: Desired, used: Usage, dst: S
) -> None:
    job = seen(S.STOPPING, desired=desired, used=used, since=ago(59), reported_at=ago(1))
    assert decided(job, AWAY) == Keep()
    change = decided(replace(job, since=ago(60)), AWAY)
    assert isinstance(change, Change)
    assert change.dst is dst
    assert "Ray does not answer" in change.reason


def test_stopping__is_over_when_the_driver_is_gone() -> None:
    for sight in (FAILED, UNKNOWN, replace(UNKNOWN, gone_for_s=0)):
        change = decided(seen(S.STOPPING, desired=Desired.CANCEL), sight)
        assert isinstance(change, Change)
        assert change.dst is S.CANCELLED
    paused = decided(seen(S.STOPPING, desired=Desired.PAUSE), UNKNOWN)
    assert isinstance(paused, Change)
    assert paused.dst is S.PAUSED


def test_stopping__force_comes_after_the_grace_or_at_once_where_nothing_can_be_saved() -> None:
    cancelled = seen(S.STOPPING, desired=Desired.CANCEL, reported_at=ago(1), since=ago(19))
    assert decided(cancelled, RUNS) == Keep()
    assert decided(replace(cancelled, since=ago(20)), RUNS) == ForceStop()
    assert decided(replace(cancelled, reported_at=None), RUNS) == ForceStop()


def test_retrying__starts_when_due_and_only_after_the_earlier_attempt_is_gone() -> None:
    job = seen(S.RETRYING, retry_at=ago(0))
    assert decided(job, FAILED) == Launch()
    assert decided(job, FAILED, admission="no room") == Keep(reason="no room")
    assert decided(job, RUNS) == ForceStop()
    assert decided(replace(job, retry_at=NOW + timedelta(seconds=1)), FAILED) == Keep()
    assert not ready(job, RUNS, now=NOW)
    assert ready(job, FAILED, now=NOW)


def test_paused__waits_for_its_user() -> None:
    assert decided(seen(S.PAUSED, desired=Desired.PAUSE)) == Keep()
    resumed = decided(seen(S.PAUSED))
    assert isinstance(resumed, Change)
    assert resumed.dst is S.QUEUED


SIGHTS = st.builds(
    Sight,
    known=st.booleans(),
    job=st.none() | st.builds(ClusterJob, state=st.sampled_from(ClusterState)),
    gone_for_s=st.floats(0, 100),
)
JOBS = st.builds(
    seen,
    st.sampled_from(S),
    desired=st.sampled_from(Desired),
    since=st.integers(0, 1000).map(ago),
    reported_at=st.none() | st.integers(0, 1000).map(ago),
    retry_at=st.none() | st.integers(-100, 100).map(ago),
    submitted=st.booleans(),
    attempt=st.integers(0, 2),
    advanced_at=st.none() | st.integers(0, 1000).map(ago),
    used=st.builds(Usage, runtime_s=st.integers(0, 100), runtime_limit_s=st.none() | st.integers(1, 100)),
    dependencies=st.lists(st.sampled_from(S).map(needs), max_size=2).map(tuple),
)


@given(job=JOBS, sight=SIGHTS, admission=st.none() | st.just("no room"))
def test_decide__every_change_is_legal_and_final_jobs_stay(
    job: JobSeen, sight: Sight, admission: str | None
) -> None:
    decision = decided(job, sight, admission=admission)
    if isinstance(decision, Change):
        lifecycle.check(job.state, decision.dst)
    if isinstance(decision, Launch):
        lifecycle.check(job.state, S.LAUNCHING)
        assert ready(job, sight, now=NOW)
        assert admission is None
    if isinstance(decision, Lost):
        lifecycle.check(job.state, S.RETRYING)
    if job.state in FINAL:
        assert decision == Keep()


def test_running__a_training_without_a_sign_of_life_is_stalled_although_it_reports() -> None:
    job = seen(S.RUNNING, reported_at=ago(1), advanced_at=ago(59))
    assert decided(job, RUNS) == Keep()
    lost = decided(replace(job, advanced_at=ago(60)), RUNS)
    assert isinstance(lost, Lost)
    assert lost.kind is FailureKind.STALLED
    assert "no sign of life for 60 s" in lost.message


@pytest.mark.parametrize("state", [S.LAUNCHING, S.RUNNING])
def test_runtime__a_job_that_used_up_its_time_stops_with_a_checkpoint_and_fails(state: S) -> None:
    job = seen(state, reported_at=ago(1), used=Usage(runtime_s=7199, runtime_limit_s=7200))
    assert not isinstance(decided(job, RUNS), Change)
    stop = decided(replace(job, used=SPENT), RUNS)
    assert isinstance(stop, Change)
    assert stop.dst is S.STOPPING
    end = decided(seen(S.STOPPING, used=SPENT), FAILED)
    assert isinstance(end, Change)
    assert (end.dst, end.failure_kind) == (S.FAILED, FailureKind.USER)
    assert end.reason.startswith("limits.runtime_hours: its 2 h are used up; `cim retry`")


@pytest.mark.parametrize("state", [S.QUEUED, S.RETRYING])
def test_runtime__no_further_attempt_begins_without_time(state: S) -> None:
    end = decided(seen(state, attempt=1, used=SPENT), FAILED)
    assert isinstance(end, Change)
    assert (end.dst, end.failure_kind) == (S.FAILED, FailureKind.USER)


def test_queued_again__waits_for_the_earlier_attempt_and_ends_it_by_force() -> None:
    job = seen(S.QUEUED, attempt=1, since=ago(19))
    assert not ready(job, RUNS, now=NOW)
    assert decided(job, RUNS) == Keep(reason="waiting for attempt 1 to end")
    assert decided(replace(job, since=ago(20)), RUNS) == ForceStop()
    assert decided(replace(job, since=ago(20)), AWAY) == Keep(reason="waiting for attempt 1 to end")
    assert decided(job, FAILED) == Launch()


def test_stopping__a_wish_to_go_on_that_came_too_late_pauses_first() -> None:
    assert decided(seen(S.STOPPING, attempt=1), FAILED) == Change(dst=S.PAUSED, reason="paused on request")
    assert decided(seen(S.PAUSED, attempt=1)) == Change(dst=S.QUEUED, reason="resumed on request")
