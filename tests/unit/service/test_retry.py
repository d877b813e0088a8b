import pytest

from service.contracts.jobs import FailureKind
from service.domain.retry import Backoff, Verdict, decide

BACKOFF = Backoff(first_s=5, longest_s=60)


def judged(kind: FailureKind, *, attempt: int, max_attempts: int = 3) -> Verdict:
    return decide(kind, "the reason", attempt=attempt, max_attempts=max_attempts, backoff=BACKOFF)


def test_decide__a_users_mistake_is_never_retried_and_said_as_it_is() -> None:
    assert judged(FailureKind.USER, attempt=1) == Verdict(retry=False, delay_s=0, reason="the reason")


@pytest.mark.parametrize("kind", sorted(set(FailureKind) - {FailureKind.USER}))
def test_decide__everything_else_has_max_attempts_starts(kind: FailureKind) -> None:
    assert [judged(kind, attempt=n).retry for n in (1, 2, 3)] == [True, True, False]
    assert "the reason" in judged(kind, attempt=1).reason
    assert "attempt 3 of 3" in judged(kind, attempt=3).reason


def test_delay__doubles_up_to_the_limit_and_stays_finite() -> None:
    assert [BACKOFF.delay_s(n) for n in (1, 2, 3, 4, 5, 6)] == [5, 10, 20, 40, 60, 60]
    assert BACKOFF.delay_s(100_000) == 60
