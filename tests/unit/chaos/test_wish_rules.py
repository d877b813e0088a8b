"""The rules of the users' verbs, on good stories and on ones that break them."""

from collections.abc import Sequence

import pytest

from tests.chaos import wish_rules as rules
from tests.chaos.history import Call, Effect, Event, History, Job
from tests.chaos.invariants import Rule

SUBMITTED = "user - queued submitted"
LAUNCHED = "dispatcher queued launching attempt 1 is starting"
RAN = "worker launching running attempt 1 is running"
FAILED_1 = "worker running retrying attempt 1 failed (storage), failure 1 of 2, next in 5 s: so"
RELAUNCHED = "dispatcher retrying launching attempt 2 is starting"
FAILED_2 = "dispatcher launching failed attempt 2 failed (stalled), failure 2 of 2, no attempt is left: so"
RETRIED = "user failed queued retried by the user"
PAUSED = "user running stopping paused by the user, its workers save a checkpoint and stop"
STOPPED = "worker stopping paused paused by the user at step 5"
RESUMED = "user paused queued resumed by the user"
RESUMED_EARLY = "user - - resumed by the user; it goes on once its workers have stopped"
CANCELLED = "user running stopping cancelled by the user, waiting for its workers to stop"
CANCELLED_TOO = "user - - cancelled by the user while it was stopping"
ENDED = "worker stopping cancelled cancelled by the user at step 5"
FAILED_IN_A_PAUSE = "worker stopping paused paused after: so"
REOPENED = "user cancelled queued retried by the user"

RUNNING = (SUBMITTED, LAUNCHED, RAN)


def event(line: str) -> Event:
    actor, src, dst, message = line.split(" ", 3)
    return Event(
        src=None if src == "-" else src, dst=None if dst == "-" else dst, actor=actor, message=message
    )


def history(*story: str, state: str = "cancelled", calls: Sequence[Call] = (), reason: str = "") -> History:
    events = [event(line) for line in story]
    job = Job(id="j", name="one", state=state, max_attempts=2, events=events, reason=reason)
    return History(jobs={"j": job}, calls=calls)


def call(op: str, state: str = "stopping", *, at: float = 1.0) -> Call:
    return Call(op=op, asked=at, answered=at + 1, of="j", jobs=("j",), states=(state,))


def told_success(history: History) -> History:
    effect = Effect(at=1.0, kind="finish-sent", job="j", attempt=1, pid=1, outcome="succeeded")
    return History(jobs=history.jobs, calls=history.calls, effects=(effect,))


UNANSWERED_RETRY = Call(op="retry", asked=3.0, answered=9.0, of="j", error="unreachable")
GOOD: list[History] = [
    history(*RUNNING, CANCELLED, ENDED, calls=[call("cancel")]),
    history(*RUNNING, PAUSED, CANCELLED_TOO, ENDED, calls=[call("pause"), call("cancel")]),
    history(*RUNNING, PAUSED, STOPPED, RESUMED, LAUNCHED, state="running", calls=[call("pause")]),
    history(
        *RUNNING, PAUSED, RESUMED_EARLY, STOPPED, "dispatcher paused queued resumed on request", LAUNCHED
    ),
    history(
        *RUNNING,
        CANCELLED,
        ENDED,
        REOPENED,
        LAUNCHED,
        state="failed",
        reason="no space is left",
        calls=[call("cancel"), UNANSWERED_RETRY],
    ),
    told_success(history(*RUNNING, CANCELLED, state="succeeded", calls=[call("cancel")])),
    history(*RUNNING, state="succeeded", calls=[call("cancel", "succeeded"), call("pause", "succeeded")]),
    history(*RUNNING, FAILED_1, RELAUNCHED, FAILED_2, state="failed"),
    history(*RUNNING, FAILED_1, RELAUNCHED, FAILED_2, RETRIED, LAUNCHED, RAN, FAILED_1),
    history(*RUNNING, PAUSED, FAILED_IN_A_PAUSE, RESUMED, LAUNCHED, FAILED_2, state="failed"),
    history(*RUNNING, PAUSED, STOPPED, RESUMED, LAUNCHED, FAILED_1),
]
BROKEN: list[tuple[Rule, History, str]] = [
    (rules.cancels_are_honoured, history(*RUNNING, calls=[call("cancel")], state="failed"), "and is failed"),
    (
        rules.cancels_are_honoured,
        history(*RUNNING, calls=[call("cancel")], state="succeeded"),
        "is succeeded",
    ),
    (
        rules.cancels_are_honoured,
        history(*RUNNING, state="failed", calls=[call("cancel"), UNANSWERED_RETRY]),
        "and is failed",
    ),
    (
        rules.cancels_are_honoured,
        history(ENDED, REOPENED, state="failed", calls=[call("cancel", at=5.0), call("retry", at=1.0)]),
        "was stopping when its cancel was accepted, and is failed",
    ),
    (rules.cancels_are_honoured, history(*RUNNING, CANCELLED, RELAUNCHED), "wanted it to cancel"),
    (rules.pauses_are_honoured, history(*RUNNING, PAUSED, STOPPED, RELAUNCHED), "wanted it to pause"),
    (rules.pauses_are_honoured, history(*RUNNING, calls=[call("pause")]), "its story knows of none"),
    (rules.pauses_are_honoured, history(*RUNNING, STOPPED), "which its user did not ask for"),
    (
        rules.pauses_are_honoured,
        history(*RUNNING, PAUSED, STOPPED, RESUMED, LAUNCHED, RAN, STOPPED),
        "which its user did not ask for",
    ),
    (rules.wishes_are_kept, history(*RUNNING, PAUSED, PAUSED), "was told to pause again"),
    (rules.wishes_are_kept, history(*RUNNING, PAUSED, RESUMED_EARLY, RESUMED), "was told to run again"),
    (rules.wishes_are_kept, history(*RUNNING, CANCELLED, CANCELLED_TOO), "was told to cancel again"),
    (rules.wishes_are_kept, history(*RUNNING, CANCELLED, RESUMED_EARLY), "was told to run during a cancel"),
    (
        rules.failures_are_counted,
        history(*RUNNING, FAILED_1, RELAUNCHED, PAUSED, STOPPED, RESUMED, LAUNCHED, FAILED_1),
        "failure 1 of 2, and it was failure 2",
    ),
    (
        rules.failures_are_counted,
        history(*RUNNING, PAUSED, STOPPED, RESUMED, LAUNCHED, FAILED_2),
        "failure 2 of 2, and it was failure 1",
    ),
    (
        rules.failures_are_counted,
        history(*RUNNING, FAILED_1, RELAUNCHED, FAILED_2, RETRIED, LAUNCHED, FAILED_2),
        "failure 2 of 2, and it was failure 1",
    ),
    (rules.failures_have_a_cause, history(SUBMITTED, state="failed", reason="so"), "after 0 of 2 attempts"),
    (
        rules.failures_have_a_cause,
        history(*RUNNING, FAILED_1, RELAUNCHED, FAILED_2, RETRIED, state="failed", reason="so"),
        "after 0 of 2 attempts",
    ),
]


@pytest.mark.parametrize("good", GOOD, ids=range(len(GOOD)))
def test_wishes__granted(good: History) -> None:
    assert [found for rule in {rule for rule, *_ in BROKEN} for found in rule(good)] == []


@pytest.mark.parametrize(
    ("rule", "broken", "detail"), BROKEN, ids=[f"{rule.__name__}-{detail}" for rule, _, detail in BROKEN]
)
def test_wishes__what_is_wrong_is_told(rule: Rule, broken: History, detail: str) -> None:
    assert [(job, detail in told) for job, told in rule(broken)] == [("j", True)], list(rule(broken))
