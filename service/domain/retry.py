"""Whether a failed attempt is followed by another one, and when. Pure."""

from dataclasses import dataclass

from service.contracts.jobs import FailureKind


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """How long to wait before attempt n+1: `first_s`, then each time `factor` times as long."""

    first_s: float = 5.0
    factor: float = 2.0
    longest_s: float = 300.0

    def delay_s(self, attempt: int) -> float:
        """Seconds to wait after the failure of `attempt`, counted from 1."""
        # The exponent is capped because a job may be allowed a hundred attempts.
        return min(self.longest_s, self.first_s * self.factor ** min(attempt - 1, 30))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What follows a failure; `reason` is the sentence that the job shows."""

    retry: bool
    delay_s: float
    reason: str


def decide(kind: FailureKind, message: str, *, attempt: int, max_attempts: int, backoff: Backoff) -> Verdict:
    """Judge the failure of `attempt` (from 1): all kinds but `user` have `max_attempts` starts."""
    if kind is FailureKind.USER:
        return Verdict(retry=False, delay_s=0.0, reason=message)
    if attempt >= max_attempts:
        told = f"attempt {attempt} of {max_attempts} failed ({kind}), none is left: {message}"
        return Verdict(retry=False, delay_s=0.0, reason=told)
    delay_s = backoff.delay_s(attempt)
    told = f"attempt {attempt} of {max_attempts} failed ({kind}), next in {delay_s:g} s: {message}"
    return Verdict(retry=True, delay_s=delay_s, reason=told)
