"""A job as clients see it."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from service.contracts.base import Stored
from service.contracts.estimates import Estimate
from service.contracts.printable import printable
from service.contracts.storable import LARGEST_NUMBER


class JobState(StrEnum):
    """The nine states of a job; legal moves are in `service.domain.lifecycle`."""

    QUEUED = "queued"
    LAUNCHING = "launching"
    RUNNING = "running"
    STOPPING = "stopping"
    PAUSED = "paused"
    RETRYING = "retrying"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


FINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})


class Desired(StrEnum):
    """What the user wants of a job; progress never overwrites it."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


class FailureKind(StrEnum):
    """Why an attempt failed. Only `user` is never retried."""

    USER = "user"
    INFRASTRUCTURE = "infrastructure"
    STORAGE = "storage"
    PREEMPTED = "preempted"
    STALLED = "stalled"


def _printable(value: object) -> object:
    return printable(value) if isinstance(value, str) else value


# May name files, whose names are any bytes.
Told = Annotated[str, BeforeValidator(_printable)]

# Databases count in 64 bits.
Count = Annotated[int, Field(ge=0, le=2**62)]
Amount = Annotated[float, Field(ge=0, le=1e30)]  # of time, images, epochs
MetricValue = Annotated[float, Field(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]
MetricKey = Annotated[str, Field(min_length=1, max_length=250, pattern=r"^[^\x00]*$")]


class Progress(Stored):
    """How far the present attempt is."""

    step: Count = 0
    total_steps: Count | None = None
    epoch: Amount | None = None
    images_per_s: Amount | None = None
    eta_s: Amount | None = None
    message: Told = ""  # what happens now, e.g. "reading 500 images"


def _plain(path: str) -> str:
    if {"", ".", ".."} & set(path.split("/")) or "\\" in path or not path.isprintable():
        raise ValueError("must be a plain relative path, without empty parts, '.', '..' and backslashes")
    return path


class FileEntry(Stored):
    """One file of a manifest; `path` is relative to the job's prefix `jobs/JOB_ID/`."""

    path: Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_plain)]
    size: Count
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class AttemptView(Stored):
    """One start of a job."""

    number: int
    submission_id: str
    started_at: datetime
    ended_at: datetime | None = None
    outcome: str | None = None  # succeeded | failed | stopped
    failure_kind: FailureKind | None = None
    message: str | None = None
    resumed_from_step: int | None = None


Notice = Field(
    default=None, description="What keeps every job waiting, whoever's it is; null where nothing does."
)


class JobView(Stored):
    """A job."""

    id: str
    name: str
    kind: str
    state: JobState
    desired: Desired
    reason: str  # one sentence: why it waits, failed, or is where it is
    failure_kind: FailureKind | None = None
    priority: int
    labels: dict[str, str]
    spec: dict[str, Any]
    resolved: dict[str, Any]
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    attempts: list[AttemptView] = Field(default_factory=list)
    progress: Progress = Progress()
    metrics: dict[str, float] = Field(default_factory=dict)  # the latest value of each
    mlflow_run_id: str | None = None
    mlflow_url: str | None = None
    result: dict[str, Any] | None = None
    notice: str | None = Notice


class JobPage(Stored):
    """Some jobs, newest first, and where the next page starts."""

    jobs: list[JobView]
    next_cursor: str | None = None
    notice: str | None = Notice


class EventView(Stored):
    """One thing that happened to a job."""

    id: int
    at: datetime
    src: JobState | None = None
    dst: JobState | None = None
    actor: str  # user | worker | dispatcher
    message: str


class MetricPoint(Stored):
    """One value of one curve."""

    step: Count
    key: MetricKey
    value: MetricValue


class LogLine(Stored):
    """One line of a job's log."""

    at: datetime
    attempt: int
    source: str  # driver | rank-0 | rank-1 ... | ray
    level: str
    message: Told


class Validation(Stored):
    """The answer to a spec that is asked about and not submitted."""

    resolved: list[dict[str, Any]]
    estimate: list[Estimate]
    warnings: list[str] = Field(default_factory=list)
