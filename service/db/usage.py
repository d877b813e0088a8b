"""Adds up what a job's attempts have used."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from service.domain.usage import Usage

_HOUR_S = 3600.0


def usage(
    attempts: Iterable[Any], *, forgiven: int, limits: Mapping[str, Any] | None, now: datetime
) -> Usage:
    """Add up `attempts`: all of a job's, whole rows or the columns that are read here.

    `forgiven` is the number of the last one that does not count, `limits` that part of the job's spec.
    """
    counted = [attempt for attempt in attempts if attempt.number > forgiven]
    hours = (limits or {}).get("runtime_hours")
    return Usage(
        num_failures=sum(attempt.failure_kind is not None for attempt in counted),
        runtime_s=sum(
            ((attempt.ended_at or now) - attempt.started_at).total_seconds() for attempt in counted
        ),
        runtime_limit_s=None if hours is None else hours * _HOUR_S,
    )
