"""Which waiting jobs may start now: by priority, then age, against what the cluster has. Pure.

The order is strict. A job that will fit once others end holds the place of everything behind it,
else a stream of small jobs could keep a large one waiting for ever. A job that the whole cluster
could never hold blocks nobody: it says what is missing, and starts when the cluster has grown.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

# Names no job: with every start the whole line would have to be told of another one.
BEHIND = "waiting for its turn: jobs of a higher priority, then older ones, come first"


@dataclass(frozen=True, kw_only=True)
class Needs:
    """CPUs and GPUs that a job holds, or that a cluster has in all."""

    cpus: float = 0.0
    gpus: float = 0.0

    def __add__(self, other: "Needs") -> "Needs":
        return Needs(cpus=self.cpus + other.cpus, gpus=self.gpus + other.gpus)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A job that waits for its start."""

    job_id: str
    priority: int  # 0..100, higher first
    created_at: datetime
    needs: Needs


@dataclass(frozen=True, kw_only=True)
class Load:
    """What runs at this moment, and what there is."""

    capacity: Needs
    in_use: Needs
    num_active: int
    max_active: int


def admit(candidates: Iterable[Candidate], load: Load) -> dict[str, str | None]:
    """Map each job to None where it may start now, else to the sentence that says why it waits."""
    verdicts: dict[str, str | None] = {}
    in_use, num_active, blocked = load.in_use, load.num_active, False
    for job in sorted(candidates, key=lambda c: (-c.priority, c.created_at, c.job_id)):
        if lacking := _lacking(job.needs, load.capacity, Needs()):
            verdicts[job.job_id] = f"waiting: the cluster is too small, {lacking}"
        elif blocked:
            verdicts[job.job_id] = BEHIND
        elif num_active >= load.max_active:
            verdicts[job.job_id] = (
                f"waiting: {num_active} jobs are active, the most allowed (CIM_MAX_ACTIVE_JOBS)"
            )
            blocked = True
        elif lacking := _lacking(job.needs, load.capacity, in_use):
            verdicts[job.job_id] = f"waiting for resources: {lacking}"
            blocked = True
        else:
            verdicts[job.job_id] = None
            in_use, num_active = in_use + job.needs, num_active + 1
    return verdicts


def _lacking(needs: Needs, capacity: Needs, in_use: Needs) -> str:
    parts = [
        _part("CPUs", needs.cpus, capacity.cpus, in_use.cpus),
        _part("GPUs", needs.gpus, capacity.gpus, in_use.gpus),
    ]
    return " and ".join(part for part in parts if part)


def _part(unit: str, need: float, total: float, used: float) -> str:
    if need <= total - used:
        return ""
    if not used:
        return f"it needs {need:g} {unit} and there are {total:g}"
    return f"it needs {need:g} {unit} and {max(total - used, 0):g} of {total:g} are free"
