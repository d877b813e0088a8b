"""What a worker and the service say to each other; every call but `claim` carries the attempt's token."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from service.contracts.allowed import ANYWHERE
from service.contracts.base import Stored
from service.contracts.jobs import (
    Count,
    FailureKind,
    FileEntry,
    MetricKey,
    MetricPoint,
    MetricValue,
    Progress,
    Told,
)
from service.contracts.storable import UnstorableError, dumps

Plain = bool | int | float | str | None
# What one call may hold, so that none takes the database or the process for long.
MOST_POINTS, MOST_FILES, MOST_PLAN_CHARS = 10_000, 100_000, 2**20
Manifest = Annotated[list[FileEntry], Field(max_length=MOST_FILES)]


def _plan(plan: dict[str, Any] | None) -> dict[str, Any] | None:
    try:
        size = len(dumps(plan))
    except UnstorableError as error:
        raise ValueError(str(error)) from error
    if size > MOST_PLAN_CHARS:
        raise ValueError(f"must be at most {MOST_PLAN_CHARS} characters of JSON, got {size}")
    return plan


class Claim(Stored):
    """What a worker says first: whoever shows the token of this digest speaks for the attempt from now on."""

    token_hash: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of a token that the worker made.")


class StoreAddress(Stored):
    """Where artifacts go; credentials come from the worker's own environment."""

    url: str  # /absolute/folder or s3://bucket/prefix
    endpoint_url: str | None = None
    region: str | None = None


class Checkpoint(Stored):
    """A committed checkpoint: nothing exists that its manifest does not name."""

    step: Count
    prefix: Annotated[str, Field(max_length=1024)]  # attempts/N/checkpoints/step-M, below jobs/JOB_ID/
    files: Manifest


class Assignment(Stored):
    """All that a worker needs to run one attempt."""

    job_id: str
    attempt: int
    spec: dict[str, Any]  # resolved: references are replaced by `inputs`
    submitted: dict[str, Any] | None = None  # the spec as the user wrote it, for spec.json
    inputs: dict[str, str]  # e.g. {"tokenizer": "jobs/ID/tokenizer"}: keys of the store, or a URI
    store: StoreAddress
    checkpoint: Checkpoint | None = None  # where to resume
    allowed: list[str] = Field(default_factory=lambda: list(ANYWHERE.prefixes))  # of addresses, prefixes
    report_every_s: float = 1.0


class Report(Stored):
    """Progress and metrics since the last report; repeating one is harmless."""

    progress: Progress
    metrics: list[MetricPoint] = Field(default_factory=list, max_length=MOST_POINTS)
    files: Manifest = Field(default_factory=list)  # finished artifacts, e.g. samples/step-100.png
    # The durations in steps, once they are known.
    plan: Annotated[dict[str, Plain | list[Plain]] | None, AfterValidator(_plan)] = None
    # Since the training last showed a sign of life; 1e9 s are 31 years, and still have a date.
    idle_s: float = Field(default=0.0, ge=0, le=1e9)


class ReportReply(Stored):
    """What the worker must do now. `stop` means: save a checkpoint, finish as stopped."""

    directive: Literal["continue", "stop"]


class Failure(Stored):
    """Why an attempt failed."""

    kind: FailureKind
    message: Told = Field(max_length=8000)


class Finish(Stored):
    """How an attempt ended. A success names every file of the result."""

    outcome: Literal["succeeded", "failed", "stopped"]
    step: Count
    total_steps: Count | None = None
    failure: Failure | None = None
    metrics: dict[MetricKey, MetricValue] = Field(default_factory=dict, max_length=MOST_POINTS)
    files: Manifest = Field(default_factory=list)
    warnings: list[Annotated[Told, Field(max_length=2000)]] = Field(default_factory=list, max_length=16)
