import statistics

import pytest

from service.contracts.jobs import FailureKind
from service.domain.retry import Backoff, Failed, Verdict, decide

BACKOFF = Backoff(first_s=5, longest_s=60)


def judged(kind: FailureKind, *, num_failures: int, max_attempts: int = 3, attempt: int = 7) -> Verdict:
    failed = Failed(job_id="a" * 16, attempt=attempt, num_failures=num_failures, max_attempts=max_attempts)
    return decide(kind, "the reason", failed, backoff=BACKOFF)


def test_decide__a_users_mistake_is_never_retried_and_said_as_it_is() -> None:
    assert judged(FailureKind.USER, num_failures=1) == Verdict(retry=False, delay_s=0, reason="the reason")


@pytest.mark.parametrize("kind", sorted(set(FailureKind) - {FailureKind.USER}))
def test_decide__everything_else_may_fail_so_often(kind: FailureKind) -> None:
    assert [judged(kind, num_failures=n).retry for n in (1, 2, 3)] == [True, True, False]
    assert "the reason" in judged(kind, num_failures=1).reason
    assert (
        f"attempt 7 failed ({kind}), failure 3 of 3, no attempt is left"
        in judged(kind, num_failures=3).reason
    )


def test_delay__doubles_up_to_the_limit_and_stays_finite() -> None:
    middle = [statistics.mean(BACKOFF.delay_s(n, salt=str(i)) for i in range(1000)) for n in range(1, 7)]
    assert middle == pytest.approx([5, 10, 20, 40, 60, 60], rel=0.02)
    assert BACKOFF.delay_s(100_000, salt="") <= 75


def test_delay__is_spread_by_a_quarter_and_always_the_same_for_one_attempt() -> None:
    delays = [BACKOFF.delay_s(2, salt=f"{i}/1") for i in range(1000)]
    assert 7.5 <= min(delays) < 7.6
    assert 12.4 < max(delays) <= 12.5
    assert judged(FailureKind.STALLED, num_failures=1) == judged(FailureKind.STALLED, num_failures=1)
    other = judged(FailureKind.STALLED, num_failures=1, attempt=8)
    assert other.delay_s != judged(FailureKind.STALLED, num_failures=1).delay_s
