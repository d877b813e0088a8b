"""What a user may ask of a job, in every state. Pure: one row of the table below for each verb.

A wish that holds already changes nothing, so every verb may be repeated. A verb that makes no sense is
refused with the one that would.
"""

from dataclasses import dataclass
from enum import StrEnum

from service.contracts.jobs import FINAL, Desired
from service.contracts.jobs import JobState as S
from service.domain.lifecycle import HOLDS_WORKERS
from service.errors import IllegalMoveError


class Verb(StrEnum):
    """The words of the interface."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    RETRY = "retry"


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be written: the wish, and the state where that changes at once."""

    desired: Desired
    message: str
    dst: S | None = None  # None: only the wish changes, the state follows
    fresh: bool = False  # the attempts so far are forgiven: they count for no limit
    now: bool = False  # the next attempt need not wait for its back-off


def wish(verb: Verb, state: S, desired: Desired) -> Wish | None:
    """What `verb` changes of a job in `state` whose user wants `desired`; None for nothing.

    Raises:
        IllegalMoveError: the verb does not fit; the message says what does.
    """
    if verb is Verb.CANCEL:
        return _cancel(state, desired)
    if desired is Desired.CANCEL and state not in FINAL:
        raise IllegalMoveError(f"the job is being cancelled, it cannot {verb}; once it is cancelled: retry")
    match verb:
        case Verb.PAUSE:
            return _pause(state, desired)
        case Verb.RESUME:
            return _resume(state, desired)
        case _:
            return _retry(state)


def _cancel(state: S, desired: Desired) -> Wish | None:
    if state in FINAL:
        return None
    return _hold(state, desired, Desired.CANCEL, S.CANCELLED, busy="waiting for its workers to stop")


def _pause(state: S, desired: Desired) -> Wish | None:
    if state in FINAL:
        raise IllegalMoveError(f"the job has {_ended(state)}: nothing is left to pause")
    return _hold(state, desired, Desired.PAUSE, S.PAUSED, busy="its workers save a checkpoint and stop")


def _hold(state: S, desired: Desired, wanted: Desired, dst: S, *, busy: str) -> Wish | None:
    """Bring a job to `dst`, by way of its stop where it holds workers."""
    if desired is wanted:
        return None
    if state in (S.STOPPING, dst):
        # It was to do something else once it has stopped: only the wish changes.
        return Wish(desired=wanted, message=f"{dst} by the user while it was {state}")
    if state in HOLDS_WORKERS:
        return Wish(desired=wanted, dst=S.STOPPING, message=f"{dst} by the user, {busy}")
    return Wish(desired=wanted, dst=dst, message=f"{dst} by the user")


def _resume(state: S, desired: Desired) -> Wish | None:
    if state in FINAL:
        more = "" if state is S.SUCCEEDED else "; to run it again from its last checkpoint: retry"
        raise IllegalMoveError(f"the job has {_ended(state)}, nothing waits for a resume{more}")
    if desired is Desired.RUN:
        return None
    if state is S.PAUSED:
        return Wish(desired=Desired.RUN, dst=S.QUEUED, message="resumed by the user")
    return Wish(desired=Desired.RUN, message="resumed by the user; it goes on once its workers have stopped")


def _retry(state: S) -> Wish | None:
    match state:
        case S.SUCCEEDED:
            raise IllegalMoveError("the job has succeeded, there is nothing to retry; submit the spec again")
        case S.PAUSED | S.STOPPING:
            raise IllegalMoveError(f"the job is {state}, not failed; to let it go on: resume")
        case S.FAILED | S.CANCELLED:
            return Wish(desired=Desired.RUN, dst=S.QUEUED, message="retried by the user", fresh=True)
        case S.RETRYING:
            return Wish(desired=Desired.RUN, message="the user wants the next attempt now", now=True)
        case _:
            return None


def _ended(state: S) -> str:
    return "been cancelled" if state is S.CANCELLED else str(state)
