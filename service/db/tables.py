"""Every table. `jobs.state` is written by `service.db.moves` alone.

PostgreSQL has two more indexes, for labels and for parts of names: see migration 0006.
"""

from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import ForeignKey, Index, MetaData, String, Text, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeEngine

from service.contracts.jobs import Desired, FailureKind, JobState
from service.db.types import Json, RowNumber, UtcDateTime, enum_column
from service.domain.names import JOB_ID_LENGTH

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """The root of all rows; constraints are named so that a migration can find them."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map: ClassVar[dict[Any, TypeEngine[Any]]] = {
        datetime: UtcDateTime(),
        dict[str, Any]: Json,
        list[str]: Json,
        list[dict[str, Any]]: Json,
        str: Text(),
    }


JobId = String(JOB_ID_LENGTH)


def _of_job() -> ForeignKey:
    return ForeignKey("jobs.id", ondelete="CASCADE")


_UNCLEAN = text("attempt > clean_attempt")
_NOT_GONE = text("ray_ended_at IS NULL")
# As each database spells `mlflow_closed.is_(False)`: a partial index serves only that condition.
_UNRECORDED = text("attempt > 0 AND mlflow_closed IS false")
_UNRECORDED_SQLITE = text("attempt > 0 AND mlflow_closed IS 0")


class JobRow(Base):
    """One job: what was asked for, where it stands, and what the user wants of it now."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "created_at", "id"),
        Index(None, "name", "created_at"),
        Index(None, "state", "created_at"),
        Index(None, "kind", "created_at"),
        Index(None, "updated_at", postgresql_where=_UNRECORDED, sqlite_where=_UNRECORDED_SQLITE),
        Index(None, "id", sqlite_where=_UNCLEAN, postgresql_where=_UNCLEAN),
    )

    id: Mapped[str] = mapped_column(JobId, primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    kind: Mapped[str] = mapped_column(String(32))
    state: Mapped[JobState] = mapped_column(enum_column(JobState, name="state"))
    desired: Mapped[Desired] = mapped_column(enum_column(Desired, name="desired"))
    desired_at: Mapped[datetime]  # when the user said so
    version: Mapped[int] = mapped_column(default=0)  # grows by one with each move
    reason: Mapped[str] = mapped_column(default="")
    failure_kind: Mapped[FailureKind | None] = mapped_column(enum_column(FailureKind, name="failure_kind"))
    priority: Mapped[int]
    labels: Mapped[dict[str, Any]]
    spec: Mapped[dict[str, Any]]  # as submitted
    resolved: Mapped[dict[str, Any]]  # with every default; references as job:ID
    inputs_wait: Mapped[list[str]]  # ids of the jobs that must succeed first
    attempt: Mapped[int] = mapped_column(default=0)  # the fence: a lower one may not write
    # What the attempts up to this one left behind is gone for good: only later ones need another look.
    clean_attempt: Mapped[int] = mapped_column(default=0, server_default="0")
    max_attempts: Mapped[int]  # so many may fail
    # Up to this number they count for no limit: the user's last retry.
    forgiven_attempts: Mapped[int] = mapped_column(default=0, server_default="0")
    not_before: Mapped[datetime | None]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    updated_at: Mapped[datetime]
    progress: Mapped[dict[str, Any]]
    latest: Mapped[dict[str, Any]]  # of each metric the last reported [step, value]
    result: Mapped[dict[str, Any] | None]
    mlflow_run_id: Mapped[str | None] = mapped_column(String(64))
    mlflow_metric_mark: Mapped[int] = mapped_column(RowNumber, default=0)  # metrics.id sent so far
    mlflow_file_mark: Mapped[int] = mapped_column(RowNumber, default=0)  # files.id sent so far
    mlflow_closed: Mapped[bool] = mapped_column(default=False)


class AttemptRow(Base):
    """One start of a job. The row exists before Ray hears of it."""

    __tablename__ = "attempts"
    __table_args__ = (Index(None, "started_at", sqlite_where=_NOT_GONE, postgresql_where=_NOT_GONE),)

    job_id: Mapped[str] = mapped_column(JobId, _of_job(), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    submission_id: Mapped[str] = mapped_column(String(64), unique=True)
    started_at: Mapped[datetime]
    launched_at: Mapped[datetime | None]  # Ray took it
    last_report_at: Mapped[datetime | None]
    last_step: Mapped[int | None]
    advanced_at: Mapped[datetime | None]  # the training last showed a sign of life
    stop_sent_at: Mapped[datetime | None]  # Ray was to be asked to end it
    ray_ended_at: Mapped[datetime | None]  # Ray was first seen to say that it ended
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str | None] = mapped_column(String(16))  # succeeded | failed | stopped
    failure_kind: Mapped[FailureKind | None] = mapped_column(enum_column(FailureKind, name="failure_kind"))
    message: Mapped[str | None]
    resumed_from_step: Mapped[int | None]
    token_hash: Mapped[str | None] = mapped_column(String(64))  # of the worker that claimed it


class EventRow(Base):
    """One thing that happened to a job; a move has `src` and `dst`, a note has neither."""

    __tablename__ = "events"
    __table_args__ = (Index(None, "job_id", "id"),)

    id: Mapped[int] = mapped_column(RowNumber, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(JobId, _of_job())
    at: Mapped[datetime]
    src: Mapped[JobState | None] = mapped_column(enum_column(JobState, name="src"))
    dst: Mapped[JobState | None] = mapped_column(enum_column(JobState, name="dst"))
    actor: Mapped[str] = mapped_column(String(16))  # user | worker | dispatcher
    message: Mapped[str]

    # Only so that a new job is inserted before its first event.
    job: Mapped[JobRow] = relationship(lazy="raise")


class MetricRow(Base):
    """One value of one curve; a later attempt overwrites what it repeats."""

    __tablename__ = "metrics"
    __table_args__ = (UniqueConstraint("job_id", "key", "step"), Index(None, "job_id", "id"))

    id: Mapped[int] = mapped_column(RowNumber, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(JobId, _of_job())
    key: Mapped[str] = mapped_column(String(250))
    step: Mapped[int] = mapped_column(RowNumber)
    value: Mapped[float]
    attempt: Mapped[int]
    at: Mapped[datetime]


class CheckpointRow(Base):
    """A committed checkpoint: this row is what makes its files real."""

    __tablename__ = "checkpoints"

    job_id: Mapped[str] = mapped_column(JobId, _of_job(), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(RowNumber, primary_key=True, autoincrement=False)
    prefix: Mapped[str]
    files: Mapped[list[dict[str, Any]]]
    at: Mapped[datetime]


class FileRow(Base):
    """One finished artifact; `path` is relative to `jobs/JOB_ID/` of the object store."""

    __tablename__ = "files"
    __table_args__ = (UniqueConstraint("job_id", "path"), Index(None, "job_id", "id"))

    id: Mapped[int] = mapped_column(RowNumber, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(JobId, _of_job())
    path: Mapped[str] = mapped_column(String(1024))
    size: Mapped[int] = mapped_column(RowNumber)
    sha256: Mapped[str] = mapped_column(String(64))
    attempt: Mapped[int]
    at: Mapped[datetime]


class SubmissionRow(Base):
    """What an idempotency key made. The primary key decides between two submits at once."""

    __tablename__ = "submissions"

    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    spec_hash: Mapped[str] = mapped_column(String(64))
    job_ids: Mapped[list[str]]
    created_at: Mapped[datetime]


class LeaseRow(Base):
    """Who does one of the dispatchers' tasks. Written by `service.db.leases` alone."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(255))
    token: Mapped[int] = mapped_column(RowNumber)  # grows by one with each holder
    expires_at: Mapped[datetime]  # by the database's clock, as the next
    passed_at: Mapped[datetime | None]  # when a pass of the task last came to its end, whoever made it
    # What the pass under way does, or why the last one failed.
    doing: Mapped[str] = mapped_column(default="", server_default="")
