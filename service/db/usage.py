"""What a job has used up of what its spec allows: failures and time."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from service.db.tables import AttemptRow, JobRow

_HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Counted over the attempts since the user's last retry; he forgave those before."""

    num_failures: int
    runtime_s: float  # from each start to its end, or to now
    runtime_limit_s: float | None

    @property
    def over_runtime(self) -> bool:
        """Whether the time is used up."""
        return self.runtime_limit_s is not None and self.runtime_s >= self.runtime_limit_s


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
