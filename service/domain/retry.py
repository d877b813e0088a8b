"""Whether a failed attempt is followed by another one, and when. Pure."""

import hashlib
from dataclasses import dataclass

from service.contracts.jobs import FailureKind

_SPREAD = 0.25


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """How long to wait after the first failure, then each time `factor` times as long."""

    first_s: float = 5.0
    factor: float = 2.0
    longest_s: float = 300.0

    def delay_s(self, num_failures: int, *, salt: str) -> float:
        """Seconds to wait after so many failures, a quarter more or less.

        `salt` says by how much, the same each time: jobs that one outage ended do not all come back at
        the same moment, and whoever judges a failure twice gives the same answer.
        """
        # The exponent is capped because a job may be allowed a hundred attempts.
        delay_s = min(self.longest_s, self.first_s * self.factor ** min(num_failures - 1, 30))
        share = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:4]) / 2**32
        return delay_s * (1 - _SPREAD + 2 * _SPREAD * share)


@dataclass(frozen=True, kw_only=True)
class Failed:
    """An attempt that failed, and what its job has used up with it."""

    job_id: str
    attempt: int  # from 1
    num_failures: int  # this one included; those before the user's last retry are forgiven
    max_attempts: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What follows a failure; `reason` is the sentence that the job shows."""

    retry: bool
    delay_s: float
    reason: str


def decide(kind: FailureKind, message: str, failed: Failed, *, backoff: Backoff) -> Verdict:
    """Judge a failure: all kinds but `user` may happen `max_attempts` times."""
    if kind is FailureKind.USER:
        return Verdict(retry=False, delay_s=0.0, reason=message)
    count = (
        f"attempt {failed.attempt} failed ({kind}), failure {failed.num_failures} of {failed.max_attempts}"
    )
    if failed.num_failures >= failed.max_attempts:
        return Verdict(retry=False, delay_s=0.0, reason=f"{count}, no attempt is left: {message}")
    delay_s = backoff.delay_s(failed.num_failures, salt=f"{failed.job_id}/{failed.attempt}")
    return Verdict(retry=True, delay_s=delay_s, reason=f"{count}, next in {delay_s:.0f} s: {message}")
