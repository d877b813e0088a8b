"""What the dispatcher asks of a cluster, whichever it is.

Every call may be repeated. `LauncherUnavailableError` means that nothing is known: neither that a
job runs nor that it does not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from service.domain.decide import ClusterJob
from service.domain.queueing import Needs


class LauncherUnavailableError(Exception):
    """The cluster does not answer, or answers nonsense; try again later."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One attempt as the cluster is to run it."""

    id: str
    command: Sequence[str]
    env: Mapping[str, str] = field(repr=False)  # the cluster shows it to everybody


class Launcher(Protocol):
    """A cluster that runs command lines."""

    async def submit(self, submission: Submission) -> None:
        """Start it, once: a submission that the cluster knows already is adopted."""
        ...

    async def status(self, submission_id: str) -> ClusterJob | None:
        """What became of it; None when the cluster knows no such submission."""
        ...

    async def stop(self, submission_id: str) -> None:
        """End it by force. An unknown or ended one is fine."""
        ...

    async def log_tail(self, submission_id: str, *, max_lines: int) -> list[str]:
        """The last lines of its driver's output, of bounded size; empty when none can be had any more."""
        ...

    async def capacity(self) -> Needs:
        """CPUs and GPUs of all living nodes."""
        ...
