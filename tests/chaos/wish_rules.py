"""What must hold of what users asked for: the verbs, and how often a job may fail. Pure."""

import re
from collections.abc import Iterator

from service.contracts.jobs import FINAL, Desired, JobState
from tests.chaos.history import Call, Event, Found, History, Job

_WISHES = {
    "paused by the user": Desired.PAUSE,
    "cancelled by the user": Desired.CANCEL,
    "resumed by the user": Desired.RUN,
    "retried by the user": Desired.RUN,
}
_FAILURE = re.compile(r"attempt \d+ failed \(\w+\), failure (\d+) of (\d+)")
_FAILED_IN_A_PAUSE = "paused after: "
_CAUSES = ("no space is left", "which this one needs")


def cancels_are_honoured(history: History) -> Found:
    """A cancel that was accepted is the end, unless the workers had succeeded or the user retries the job."""
    told_success = {e.job for e in history.effects if e.kind == "finish-sent" and e.outcome == "succeeded"}
    for call in history.calls:
        if call.op != "cancel" or not call.jobs or call.states[0] in FINAL:
            continue
        job = history.jobs.get(call.jobs[0])
        if job is None or job.state == JobState.CANCELLED:
            continue
        succeeded = job.state == JobState.SUCCEEDED and job.id in told_success
        if not succeeded and not (_reopened(job) and was_retried(history, job.id, since=call.asked)):
            yield job.id, f"was {call.states[0]} when its cancel was accepted, and is {job.state}"
    yield from _launched_against(history, Desired.CANCEL)


def pauses_are_honoured(history: History) -> Found:
    """A paused job is launched by its user's word alone, and none is paused without it."""
    for call in history.calls:
        job = history.jobs.get(call.of)
        if call.op != "pause" or not call.jobs or call.states[0] in FINAL or job is None:
            continue
        if not any(wish_of(event) is Desired.PAUSE for event in job.events):
            yield job.id, f"was {call.states[0]} when its pause was accepted, its story knows of none"
    yield from _launched_against(history, Desired.PAUSE)
    for job in history.jobs.values():
        asked = False  # since the last launch
        for event in job.events:
            asked = asked or wish_of(event) is Desired.PAUSE
            if event.dst == JobState.PAUSED and not asked:
                yield job.id, f"was paused, which its user did not ask for: {event.message}"
            asked = asked and event.dst != JobState.LAUNCHING


def wishes_are_kept(history: History) -> Found:
    """What the user wanted last is what holds: two wishes at one moment do not undo each other in silence.

    A wish that holds already is not written again, so one that is written twice was forgotten meanwhile.
    """
    for job in history.jobs.values():
        for event, wanted in _with_wish(job):
            told = wish_of(event)
            if told is None or event.src in FINAL:
                continue
            if told is wanted:
                yield job.id, f"was told to {told} again: the first time was forgotten"
            elif wanted is Desired.CANCEL:
                yield job.id, f"was told to {told} during a cancel"


def failures_are_counted(history: History) -> Found:
    """Each failure since the user's last retry counts, no pause does, and no resume forgives one."""
    for job in history.jobs.values():
        for event, number in _with_failures(job):
            told = _FAILURE.match(event.message)
            if told and int(told[1]) != number:
                yield job.id, f"{told[0]}, and it was failure {number}"


def failures_have_a_cause(history: History) -> Found:
    """A job fails for want of room, for the job that it needs, or when no attempt is left."""
    for job in history.jobs.values():
        if job.state != JobState.FAILED or any(cause in job.reason for cause in _CAUSES):
            continue
        *_, number = (0, *(number for _, number in _with_failures(job)))
        if number < job.max_attempts:
            yield job.id, f"failed after {number} of {job.max_attempts} attempts: {job.reason}"


def was_retried(history: History, job_id: str, *, since: float, until: float = float("inf")) -> bool:
    """Whether a user's retry may have reached the job in that time; one without an answer may have, too."""
    retries: Iterator[Call] = (call for call in history.calls if call.op == "retry" and call.of == job_id)
    return any(call.answered >= since and call.asked <= until for call in retries)


def wish_of(event: Event) -> Desired | None:
    """What the user wants from this event on; None where it says nothing about that."""
    if event.actor != "user":
        return None
    return next((wish for words, wish in _WISHES.items() if event.message.startswith(words)), None)


def _reopened(job: Job) -> bool:
    return any(event.src in FINAL for event in job.events)


def _launched_against(history: History, wish: Desired) -> Found:
    for job in history.jobs.values():
        for event, wanted in _with_wish(job):
            if wanted is wish and event.dst == JobState.LAUNCHING:
                yield job.id, f"was launched although its user wanted it to {wish}: {event.message}"


def _with_wish(job: Job) -> Iterator[tuple[Event, Desired]]:
    """Each event, and what the user wanted before it."""
    wanted = Desired.RUN
    for event in job.events:
        yield event, wanted
        wanted = wish_of(event) or wanted


def _with_failures(job: Job) -> Iterator[tuple[Event, int]]:
    """Each event, and the failures since the last retry, its own included."""
    number = 0
    for event in job.events:
        if event.src in FINAL:
            number = 0
        elif _FAILURE.match(event.message) or event.message.startswith(_FAILED_IN_A_PAUSE):
            number += 1
        yield event, number
