"""Each rule of the campaign's checker, on a history that keeps them all and on ones that break it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos import curve
from tests.chaos.history import Call, Effect, Event, File, History, Job, Poisoning, Run, Sighting
from tests.chaos.invariants import RULES, check
from tests.unit.chaos import test_log_rules as logs
from tests.unit.chaos import test_wish_rules as wishes

STEPS, SEED = 6, 7
POINTS = tuple(curve.uncut(SEED, STEPS).items())
SHA = "a" * 64
Change = Callable[[History], History]


def event(src: str | None, dst: str | None, message: str = "") -> Event:
    return Event(src=src, dst=dst, actor="test", message=message)


def effect(at: float, kind: str, attempt: int, **more: Any) -> Effect:
    return Effect(at=at, kind=kind, job="j1", attempt=attempt, pid=100 + attempt, **more)


def succeeded() -> Job:
    """A job that was cut once."""
    return Job(
        id="j1",
        name="one",
        state="succeeded",
        attempt=2,
        seed=SEED,
        total_steps=STEPS,
        events=(
            event(None, "queued", "submitted"),
            event("queued", "launching", "attempt 1 is starting"),
            event("launching", "running", "attempt 1 is running"),
            event(None, None, "attempt 1 committed a checkpoint at step 3"),
            event("running", "retrying", "attempt 1 of 3 failed"),
            event("retrying", "launching", "attempt 2 is starting"),
            event("launching", "running", "attempt 2 is running"),
            event(None, None, "attempt 2 committed a checkpoint at step 6"),
            event("running", "succeeded", "succeeded at step 6"),
        ),
        points=POINTS,
        checkpoints=((1, 3), (2, 6)),
        last_checkpoint=(File(path="attempts/2/checkpoints/step-6/state.json", sha256=SHA, found=SHA),),
        files=(File(path="result.json", sha256=SHA, found=SHA),),
        lines={"1/driver": ["step 1", "step 2"]},
    )


def cancelled() -> Job:
    """A job that never started."""
    events = (event(None, "queued", "submitted"), event("queued", "cancelled"))
    return Job(id="j2", name="two", state="cancelled", seed=SEED, total_steps=STEPS, events=events)


def good() -> History:
    """A job with two attempts that succeeded, and one that was cancelled while it waited."""
    return History(
        calls=(
            submitted(1.0, "k1", "one", "j1"),
            submitted(1.0, "k2", "two", "j2"),
            verb(2.0, "cancel", "j2", "cancelled"),
        ),
        sightings=(
            sighting(1.1, "j1", "queued"),
            sighting(30.0, "j1", "succeeded"),
            sighting(2.1, "j2", "cancelled"),
        ),
        effects=(
            effect(2.0, "begun", 1),
            effect(2.1, "training", 1),
            effect(2.5, "line", 1, line="step 1"),
            effect(2.6, "line", 1, line="step 2"),
            effect(3.0, "checkpoint-taken", 1, sent=2.9),
            effect(9.0, "begun", 2),
            effect(9.1, "training", 2),
            effect(11.0, "checkpoint-taken", 2, sent=10.9),
            effect(12.0, "finish-sent", 2, outcome="succeeded", files=("result.json",)),
            effect(12.1, "finish-taken", 2, sent=12.0, outcome="succeeded", files=("result.json",)),
        ),
        jobs={"j1": succeeded(), "j2": cancelled()},
        runs=(Run(job="j1", status="FINISHED", points=POINTS),),
    )


def verb(at: float, op: str, job_id: str, state: str) -> Call:
    return Call(op=op, asked=at, answered=at + 0.1, of=job_id, jobs=(job_id,), states=(state,))


def sighting(at: float, job_id: str, state: str) -> Sighting:
    return Sighting(asked=at - 0.1, at=at, job=job_id, state=state)


def submitted(at: float, key: str, name: str, *jobs: str) -> Call:
    return Call(
        op="submit",
        asked=at,
        answered=at + 0.1,
        key=key,
        names=(name,),
        priorities=(50,),
        jobs=jobs,
        states=("queued",) * len(jobs),
    )


def job(job_id: str = "j1", **changes: Any) -> Change:
    """The history with one job changed."""

    def change(history: History) -> History:
        return replace(history, jobs={**history.jobs, job_id: replace(history.jobs[job_id], **changes)})

    return change


def more(**added: Sequence[Any]) -> Change:
    """The history with something added to its sequences."""

    def change(history: History) -> History:
        longer: dict[str, Any] = {name: (*getattr(history, name), *items) for name, items in added.items()}
        return replace(history, **longer)

    return change


def without(job_id: str) -> Change:
    return lambda history: replace(history, jobs={k: v for k, v in history.jobs.items() if k != job_id})


def copied(history: History) -> History:
    """A second job of the same submission, which nobody was told of."""
    twin = replace(history.jobs["j2"], id="j3")
    return replace(history, jobs={**history.jobs, "j3": twin})


def story(*events: Event, **changes: Any) -> Change:
    return job("j2", events=events, **changes)


QUEUED, CANCELLED = event(None, "queued"), event("queued", "cancelled")
REOPENED = event("cancelled", "queued")
STALE_COMMIT = effect(11.5, "checkpoint-taken", 1, sent=11.2)
LATE_EVENT = event(None, None, "attempt 1 committed a checkpoint at step 5")
FILE = File(path="result.json", sha256=SHA, found=SHA)

BROKEN: list[tuple[str, Change, str]] = [
    ("accepted_jobs_are_not_lost", without("j2"), "not in the database"),
    ("accepted_jobs_are_not_lost", job("j1", state="running"), "still running"),
    ("nothing_is_made_twice", more(calls=[submitted(4.0, "k1", "one", "j9")]), "j9"),
    ("nothing_is_made_twice", copied, "became j2, j3"),
    (
        "nothing_is_made_twice",
        more(effects=[replace(effect(2.2, "training", 1), pid=999)]),
        "trained by processes 101, 999",
    ),
    (
        "a_key_means_one_spec",
        more(calls=[replace(submitted(4.0, "k1", "one", "j1"), priorities=(1,))]),
        "two specs",
    ),
    ("stories_are_legal", story(QUEUED, event("running", "cancelled")), "when it was queued"),
    ("stories_are_legal", story(QUEUED, event("queued", "running")), "from queued to running"),
    ("stories_are_legal", story(CANCELLED), "does not begin"),
    ("stories_are_legal", story(QUEUED), "its last event says queued"),
    (
        "stories_are_legal",
        story(QUEUED, CANCELLED, event("cancelled", "succeeded"), state="succeeded"),
        "more than one end",
    ),
    ("stories_are_legal", story(QUEUED, CANCELLED, REOPENED), "left its end, cancelled, by the test"),
    ("stories_are_legal", story(QUEUED, CANCELLED, replace(REOPENED, actor="user")), "no user asked"),
    ("ends_are_final", more(sightings=[sighting(40.0, "j1", "failed")]), "then failed"),
    ("ends_are_final", more(sightings=[sighting(40.0, "j2", "failed")]), "then failed"),
    (
        "ends_are_final",
        lambda h: more(calls=[verb(29, "retry", "j1", "")], sightings=[sighting(40, "j1", "failed")])(h),
        "was seen succeeded, then failed",
    ),
    (
        "ends_are_final",
        lambda h: job(state="failed")(more(calls=[verb(29, "retry", "j1", "")])(h)),
        "was seen succeeded, and is failed",
    ),
    ("ends_are_final", job("j2", state="failed"), "and is failed"),
    ("one_attempt_commits", more(effects=[STALE_COMMIT]), "after attempt 2 was let in"),
    ("one_attempt_commits", more(effects=[replace(STALE_COMMIT, kind="reported")]), "reported after"),
    ("curves_are_complete", job(points=POINTS[:2] + POINTS[3:]), r"lacks steps \[3\]"),
    ("curves_are_complete", job(points=POINTS[:-1]), r"lacks steps \[6\]"),
    ("curves_are_complete", job(points=(*POINTS, POINTS[0])), r"\[1\] are there twice"),
    ("curves_are_complete", job(points=(*POINTS, (7, 0.0))), r"has steps \[7\]"),
    ("curves_are_those_of_uncut_runs", job(points=(*POINTS[:-1], (STEPS, 0.5))), r"steps \[6\]"),
    ("successes_were_told", lambda h: replace(h, effects=h.effects[:-2]), "no worker of attempt 2"),
    ("manifests_are_true", job(files=(replace(FILE, found=None),)), "not in the store"),
    ("manifests_are_true", job(files=(replace(FILE, found="b" * 64),)), "another SHA-256"),
    ("manifests_are_true", job(files=()), "without a result.json"),
    ("manifests_are_true", job(last_checkpoint=(replace(FILE, found=None),)), "last checkpoint"),
    (
        "manifests_are_true",
        more(effects=[effect(12.2, "finish-taken", 2, outcome="succeeded", files=("lost.bin",))]),
        "lost.bin",
    ),
    ("nothing_is_left", more(left=["123: worker"]), "still runs"),
    (
        "healthy_jobs_do_not_wait",
        more(poisonings=[Poisoning(job="j1", launched=False, waited_s=41.2, reason="its turn")]),
        "waited for 41 s behind poison: its turn",
    ),
    ("the_tracker_agrees", lambda h: replace(h, runs=()), "has 0 runs"),
    ("the_tracker_agrees", lambda h: replace(h, runs=(*(h.runs or ()), *(h.runs or ()))), "has 2 runs"),
    (
        "the_tracker_agrees",
        lambda h: replace(h, runs=(Run(job="j1", status="RUNNING", points=POINTS),)),
        "says RUNNING",
    ),
    (
        "the_tracker_agrees",
        lambda h: replace(h, runs=(Run(job="j1", status="FINISHED", points=(*POINTS, POINTS[0])),)),
        "its run has 7 points",
    ),
]


def test_check__a_good_history_breaks_nothing() -> None:
    assert check(good()) == []


@pytest.mark.parametrize(("rule", "change", "detail"), BROKEN, ids=[f"{r}-{d[:24]}" for r, _, d in BROKEN])
def test_check__sees_what_is_broken(rule: str, change: Change, detail: str) -> None:
    found = [violation.detail for violation in check(change(good())) if violation.rule == rule]
    assert [told for told in found if re.search(detail, told)], found


def test_ends__a_retry_may_lie_between_two_of_them() -> None:
    retried = more(
        calls=[verb(3.0, "retry", "j2", "queued")],
        sightings=[sighting(4.0, "j2", "failed"), sighting(4.1, "j2", "cancelled")],
    )
    assert [v.detail for v in check(retried(good()))] == ["was seen failed, then cancelled"]
    newer_came_first = replace(sighting(4.1, "j2", "cancelled"), asked=2.0)
    history = replace(retried(good()), sightings=(*retried(good()).sightings[:-1], newer_came_first))
    reopened = story(QUEUED, CANCELLED, replace(REOPENED, actor="user"), CANCELLED)
    assert check(reopened(history)) == []


def test_check__a_fence_that_was_passed_shows_in_the_story() -> None:
    events = good().jobs["j1"].events
    late = job(events=(*events[:-1], LATE_EVENT, events[-1]), checkpoints=((1, 3), (1, 5), (2, 6)))
    assert [v.detail for v in check(late(good()))] == ["attempt 1 committed while the fence was 2"]


def test_check__a_removed_checkpoint_must_be_gone_from_the_table() -> None:
    removed = event(None, None, "removed checkpoint at step 3")
    events = (*good().jobs["j1"].events, removed)
    told = [v.detail for v in check(job(events=events)(good())) if v.rule == "one_attempt_commits"]
    assert told == ["its story leaves 1 checkpoints, the table holds 2"]
    gone = check(job(events=events, checkpoints=((2, 6),))(good()))
    assert not [v for v in gone if v.rule == "one_attempt_commits"]


def test_check__a_story_that_tells_of_no_checkpoint_is_not_taken_for_a_good_one() -> None:
    events = [e for e in good().jobs["j1"].events if "committed" not in e.message]
    assert [v.rule for v in check(job(events=events)(good()))] == ["one_attempt_commits"]


def test_rules__each_is_broken_here() -> None:
    here = {rule for rule, _, _ in BROKEN}
    elsewhere = {rule.__name__ for rule, *_ in (*wishes.BROKEN, *logs.BROKEN)}
    assert here | elsewhere == {rule.__name__ for rule in RULES}


def test_curve__needs_every_step_before() -> None:
    assert curve.uncut(1, 5) != curve.uncut(2, 5)
    skipped = curve.advance(curve.begin(1), 2)
    assert curve.loss(skipped, 2) != curve.uncut(1, 2)[2]
