"""What the dispatcher should do next with one job. Pure: what was observed goes in, a decision comes out.

Deciding twice from the same observation gives the same answer, and every answer may be carried out
twice. So it does not matter where the dispatcher was killed last time.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum

from service.contracts.jobs import FINAL, Desired, FailureKind
from service.contracts.jobs import JobState as S
from service.domain.queueing import Needs
from service.domain.usage import Usage


class ClusterState(StrEnum):
    """What the cluster says about a submission."""

    PENDING = "pending"
    RUNNING = "running"
    STOPPED = "stopped"
    SUCCEEDED = "succeeded"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        """Whether the driver process is gone for good."""
        return self not in (ClusterState.PENDING, ClusterState.RUNNING)


@dataclass(frozen=True, kw_only=True)
class ClusterJob:
    """One attempt as the cluster sees it."""

    state: ClusterState
    message: str = ""  # the cluster's own words, one line
    exit_code: int | None = None


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What could be seen of a job's latest submission."""

    known: bool = True  # False: the cluster did not answer, so nothing may be concluded of its jobs
    job: ClusterJob | None = None  # None: the cluster knows no such submission
    gone_for_s: float = 0.0  # since we first saw it ended or missing, by our own monotonic clock

    @property
    def gone(self) -> bool:
        """Whether the cluster surely runs no driver of this submission."""
        return self.known and (self.job is None or self.job.state.ended)


@dataclass(frozen=True, kw_only=True)
class Dependency:
    """A job that this one needs."""

    job_id: str
    name: str
    state: S
    reason: str


@dataclass(frozen=True, kw_only=True)
class JobSeen:
    """A job as it was last read."""

    id: str
    state: S
    desired: Desired
    attempt: int  # 0 before the first launch
    needs: Needs
    priority: int
    created_at: datetime
    since: datetime  # when it entered its state
    retry_at: datetime | None = None
    reported_at: datetime | None = None  # the present attempt's last word
    advanced_at: datetime | None = None  # its training's last sign of life
    used: Usage = field(default_factory=Usage)
    submitted: bool = False  # the present attempt is known to have reached the cluster
    dependencies: tuple[Dependency, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long each silence is borne, in seconds."""

    start_deadline_s: float
    stall_after_s: float
    stop_grace_s: float
    lost_grace_s: float


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Nothing to do; `reason`, where given, is the sentence that the job shows meanwhile."""

    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Change:
    """Another state, and why."""

    dst: S
    reason: str
    failure_kind: FailureKind | None = None


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Raise the fence to the next attempt, then submit that."""


@dataclass(frozen=True, kw_only=True)
class Submit:
    """The attempt exists but the cluster has never heard of it: submit it (again)."""


@dataclass(frozen=True, kw_only=True)
class NoteSubmitted:
    """The cluster knows an attempt whose submission was never written down: adopt it."""


@dataclass(frozen=True, kw_only=True)
class ForceStop:
    """End the latest submission by force; its job stays as it is until it is seen to be gone."""


@dataclass(frozen=True, kw_only=True)
class Lost:
    """The attempt failed without saying so; what follows is up to the retry rule."""

    kind: FailureKind
    message: str


Action = Change | Launch | Submit | NoteSubmitted | ForceStop | Lost
Decision = Keep | Action


def ready(job: JobSeen, sight: Sight, *, now: datetime) -> bool:
    """Whether nothing but room in the cluster keeps the job from its next attempt."""
    if job.desired is not Desired.RUN:
        return False
    if job.state is S.QUEUED:
        return sight.gone and all(d.state is S.SUCCEEDED for d in job.dependencies)
    return job.state is S.RETRYING and _due(job, now) and sight.gone


def decide(job: JobSeen, sight: Sight, *, admission: str | None, now: datetime, limits: Limits) -> Decision:
    """The next thing to do. `admission` is None where a ready job may start, else why it waits."""
    match job.state:
        case S.QUEUED:
            return _waiting_to_start(job, sight, admission, now, limits)
        case S.RETRYING:
            return _retrying(job, sight, admission, now)
        case S.PAUSED:
            return _paused(job)
        case S.LAUNCHING:
            return _launching(job, sight, now, limits)
        case S.RUNNING:
            return _running(job, sight, now, limits)
        case S.STOPPING:
            return _stopping(job, sight, now, limits)
        case _:
            return Keep()


def _waiting_to_start(
    job: JobSeen, sight: Sight, admission: str | None, now: datetime, limits: Limits
) -> Decision:
    if end := _unwanted(job) or _over_limit(job, S.FAILED):
        return end
    for needed in job.dependencies:
        if needed.state in FINAL and needed.state is not S.SUCCEEDED:
            return Change(dst=S.FAILED, reason=_broken(needed), failure_kind=FailureKind.USER)
    for needed in job.dependencies:
        if needed.state is not S.SUCCEEDED:
            return Keep(reason=f"waiting for job {needed.job_id} ({needed.name})")
    if not sight.gone:
        return _earlier_attempt(job, sight, now, limits)
    return Launch() if admission is None else Keep(reason=admission)


def _earlier_attempt(job: JobSeen, sight: Sight, now: datetime, limits: Limits) -> Decision:
    """A job that was paused or ended goes on: what it ran before must be gone, by itself or by force."""
    if sight.known and (now - job.since).total_seconds() >= limits.stop_grace_s:
        return ForceStop()
    return Keep(reason=f"waiting for attempt {job.attempt} to end")


def _broken(needed: Dependency) -> str:
    # A cancelled job gives no reason of its own beyond its state.
    end = f"failed: {needed.reason}" if needed.state is S.FAILED else "was cancelled"
    return f"job {needed.job_id} ({needed.name}), which this one needs, {end}"


def _retrying(job: JobSeen, sight: Sight, admission: str | None, now: datetime) -> Decision:
    if end := _unwanted(job) or _over_limit(job, S.FAILED):
        return end
    if not sight.known:
        return Keep()
    if not sight.gone:
        return ForceStop()
    if not _due(job, now):
        return Keep()
    return Launch() if admission is None else Keep(reason=admission)


def _unwanted(job: JobSeen) -> Change | None:
    """What becomes of a job without workers that its user does not want to run."""
    if job.desired is Desired.CANCEL:
        return Change(dst=S.CANCELLED, reason="cancelled on request")
    if job.desired is Desired.PAUSE:
        return Change(dst=S.PAUSED, reason="paused on request")
    return None


def _paused(job: JobSeen) -> Decision:
    if job.desired is Desired.CANCEL:
        return Change(dst=S.CANCELLED, reason="cancelled on request")
    if job.desired is Desired.RUN:
        return Change(dst=S.QUEUED, reason="resumed on request")
    return Keep()


def _launching(job: JobSeen, sight: Sight, now: datetime, limits: Limits) -> Decision:
    if stop := _stop(job):
        return stop
    if not job.submitted and (not sight.known or sight.job is None):
        # Without an answer it may have arrived; with one it has not.
        return Submit() if sight.known else Keep()
    if sight.gone:
        return _gone(sight, limits)
    if (now - job.since).total_seconds() >= limits.start_deadline_s:
        told = f"the worker did not report within {limits.start_deadline_s:g} s of its launch"
        return Lost(kind=FailureKind.INFRASTRUCTURE, message=told)
    return Keep() if job.submitted else NoteSubmitted()


def _running(job: JobSeen, sight: Sight, now: datetime, limits: Limits) -> Decision:
    if stop := _stop(job):
        return stop
    if sight.gone:
        return _gone(sight, limits)
    silent_s = (now - (job.reported_at or job.since)).total_seconds()
    if silent_s >= limits.stall_after_s:
        ray = "although Ray says that it runs" if sight.known else "and Ray does not answer"
        told = f"the worker has not reported for {silent_s:.0f} s {ray}"
        return Lost(kind=FailureKind.STALLED, message=told)
    idle_s = (now - (job.advanced_at or job.reported_at or job.since)).total_seconds()
    if idle_s >= limits.stall_after_s:
        told = f"the worker reports, but its training has shown no sign of life for {idle_s:.0f} s"
        return Lost(kind=FailureKind.STALLED, message=told)
    return Keep()


def _stop(job: JobSeen) -> Change | None:
    """The move of a job that holds workers and should not."""
    if job.desired is Desired.RUN:
        return _over_limit(job, S.STOPPING)
    wish = "cancel" if job.desired is Desired.CANCEL else "pause"
    return Change(dst=S.STOPPING, reason=f"{wish} requested, the workers are stopping")


def _over_limit(job: JobSeen, dst: S) -> Change | None:
    """The move of a job that has used up its time."""
    told = job.used.over_runtime
    if not told:
        return None
    if dst is S.STOPPING:
        return Change(dst=dst, reason=f"{told}; the workers save a checkpoint and stop")
    return Change(dst=dst, reason=told, failure_kind=FailureKind.USER)


def _gone(sight: Sight, limits: Limits) -> Decision:
    # The worker's own last word may still be under way, and it knows more than Ray does.
    if sight.gone_for_s < limits.lost_grace_s:
        return Keep()
    if sight.job is None:
        told = "Ray no longer knows the attempt's job: its head was restarted or replaced"
        return Lost(kind=FailureKind.INFRASTRUCTURE, message=told)
    code = "" if sight.job.exit_code is None else f" with exit status {sight.job.exit_code}"
    told = f"the worker's driver ended ({sight.job.state}){code} without a result"
    if sight.job.message:
        told += f"; Ray says: {sight.job.message}"
    return Lost(kind=FailureKind.INFRASTRUCTURE, message=told)


def _stopping(job: JobSeen, sight: Sight, now: datetime, limits: Limits) -> Decision:
    waited_s = (now - job.since).total_seconds()
    if not sight.known:
        # The fence ends the attempt, so nothing that it still does counts; its processes are a leftover.
        told = f"; Ray does not answer, {waited_s:.0f} s after the stop began"
        return _stopped(job, told) if waited_s >= limits.stall_after_s else Keep()
    if sight.gone:
        return _stopped(job)
    # A worker that never reported has nothing to save.
    if job.reported_at is None or waited_s >= limits.stop_grace_s:
        return ForceStop()
    return Keep()


def _stopped(job: JobSeen, told: str = "") -> Change:
    if job.desired is Desired.CANCEL:
        return Change(dst=S.CANCELLED, reason=f"cancelled on request{told}")
    if job.desired is Desired.RUN and (end := _over_limit(job, S.FAILED)):
        return replace(end, reason=f"{end.reason}{told}")
    # A wish to go on that came too late for the stop is heard by the next pass.
    return Change(dst=S.PAUSED, reason=f"paused on request{told}")


def _due(job: JobSeen, now: datetime) -> bool:
    return job.retry_at is None or now >= job.retry_at
