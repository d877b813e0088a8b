"""Adds up what a job's attempts have used."""

from collections.abc import Sequence
from datetime import datetime

from service.db.tables import AttemptRow, JobRow
from service.domain.usage import Usage

_HOUR_S = 3600.0


def usage(job: JobRow, attempts: Sequence[AttemptRow], *, now: datetime) -> Usage:
    """Add up `attempts`, which are all of the job's."""
    counted = [attempt for attempt in attempts if attempt.number > job.forgiven_attempts]
    hours = (job.resolved.get("limits") or {}).get("runtime_hours")
    return Usage(
        num_failures=sum(attempt.failure_kind is not None for attempt in counted),
        runtime_s=sum(
            ((attempt.ended_at or now) - attempt.started_at).total_seconds() for attempt in counted
        ),
        runtime_limit_s=None if hours is None else hours * _HOUR_S,
    )
