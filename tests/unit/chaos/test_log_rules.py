"""The rule of the log, on a good history and on ones that break it."""

from collections.abc import Mapping, Sequence

import pytest

from tests.chaos.history import Effect, History, Job
from tests.chaos.invariants import Rule
from tests.chaos.log_rules import logs_are_complete, num_waiting

Lines = Mapping[str, Sequence[str]]
WRITTEN = ("a", "b", "c")


def effect(kind: str, attempt: int = 1, *, line: str = "", dead: tuple[int, ...] = ()) -> Effect:
    return Effect(at=1.0, kind=kind, job="j", attempt=attempt, pid=1, line=line, dead=dead)


def history(served: Sequence[str], *, waiting: Sequence[str] = (), dead: tuple[int, ...] = ()) -> History:
    """Attempt 1 wrote three lines, attempt 2 one, and found those of `dead`."""
    wrote = [effect("line", line=line) for line in WRITTEN]
    job = Job(
        id="j",
        name="one",
        state="succeeded",
        lines={"1/driver": served, "2/driver": ["x"], "1/ray": ["killed"]},
        waiting={"1/driver": waiting},
    )
    later = [effect("line", 2, line="x"), effect("recovered", 2, dead=dead)]
    return History(effects=(*wrote, *later), jobs={"j": job})


GOOD: list[History] = [
    history("abc"),
    history("abc", dead=(1,)),
    history("abc", waiting="bc"),  # sent, and killed before it could be deleted
    history("abcd"),  # kept, and killed before it could be journaled
    history("a", waiting="bc"),
    history("", waiting="abc", dead=(2,)),
]
BROKEN: list[tuple[Rule, History, str]] = [
    (logs_are_complete, history("ac"), "1 lines that are nowhere: 'b'"),
    (logs_are_complete, history(""), "3 lines that are nowhere"),
    (logs_are_complete, history("a", waiting="c"), "1 lines that are nowhere: 'b'"),
    (logs_are_complete, history("a", waiting="bc", dead=(1,)), "2 lines that a later worker found"),
    (logs_are_complete, history("acb"), "in another order"),
    (logs_are_complete, history("aabc"), "more than once"),
    (logs_are_complete, history("abcbc"), "2 lines that nobody wrote"),
]


@pytest.mark.parametrize("good", GOOD)
def test_logs__complete(good: History) -> None:
    assert list(logs_are_complete(good)) == []


@pytest.mark.parametrize(("rule", "broken", "detail"), BROKEN, ids=[detail for *_, detail in BROKEN])
def test_logs__what_is_wrong_is_told(rule: Rule, broken: History, detail: str) -> None:
    assert [(job, detail in told) for job, told in rule(broken)] == [("j", True)], list(rule(broken))


def test_waiting__lines_that_are_served_do_not_wait() -> None:
    assert [num_waiting(good) for good in GOOD] == [0, 0, 0, 0, 2, 3]


def test_waiting__lines_that_are_nowhere_do_not_wait_either() -> None:
    assert num_waiting(history("", waiting="b")) == 1
