"""What the dispatcher asks of an experiment tracker. Every call may be repeated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Protocol

MAX_BATCH = 1000  # MLflow takes no more metrics in one call


class TrackerUnavailableError(Exception):
    """The tracker does not answer; try again later."""


class TrackerRefusedError(Exception):
    """The tracker will never take this, e.g. because its user has deleted the run."""


class TrackerFailedError(Exception):
    """The tracker failed at this very call, e.g. because the same one was under way; later it may succeed."""


class Outcome(StrEnum):
    """How a run ended."""

    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


@dataclass(frozen=True, kw_only=True)
class NewRun:
    """A run as it is to appear; `job_id` is its identity."""

    job_id: str
    name: str
    started_at: datetime
    description: str  # Markdown
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One value of one curve."""

    key: str
    step: int
    value: float
    at: datetime


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One PNG of a series."""

    series: str
    step: int
    png: bytes = field(repr=False)
    at: datetime


class Tracker(Protocol):
    """A record of runs for people to look at."""

    async def check(self) -> None:
        """Raise TrackerUnavailableError unless it answers at all."""
        ...

    async def ensure_run(self, run: NewRun) -> str:
        """The id of the job's run, which is open then. A parameter that it has already is left alone."""
        ...

    async def log_points(self, run_id: str, points: Sequence[Point]) -> None:
        """Add at most `MAX_BATCH` points. One that is there already is left alone."""
        ...

    async def log_picture(self, run_id: str, picture: Picture) -> None:
        """Add a picture. One of the same series and step is left alone."""
        ...

    async def close(self, run_id: str, outcome: Outcome, *, ended_at: datetime, description: str) -> None:
        """End the run, with its last description."""
        ...

    async def abandon(self, job_id: str, outcome: Outcome, *, ended_at: datetime, description: str) -> None:
        """End every run of the job that is open, whichever id it has; none is fine."""
        ...

    async def keep_only(self, run_id: str, *, job_id: str) -> None:
        """Delete every run of the job but this one."""
        ...
