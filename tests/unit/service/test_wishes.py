"""Properties of the table of verbs, over every state and wish."""

from itertools import product

import pytest

from service.contracts.jobs import FINAL, Desired
from service.contracts.jobs import JobState as S
from service.domain import lifecycle
from service.domain.lifecycle import HOLDS_WORKERS
from service.domain.wishes import Verb, wish
from service.errors import IllegalMoveError

EVERY = [
    pytest.param(verb, state, desired, id=f"{verb}-{state}-{desired}")
    for verb, state, desired in product(Verb, S, Desired)
]
# Verb to the states in which it is refused, whatever is wished except a cancel under way.
REFUSED = {
    Verb.CANCEL: frozenset[S](),
    Verb.PAUSE: FINAL,
    Verb.RESUME: FINAL,
    Verb.RETRY: frozenset({S.SUCCEEDED, S.PAUSED, S.STOPPING}),
}


@pytest.mark.parametrize(("verb", "state", "desired"), EVERY)
def test_wish__is_legal_and_asking_again_changes_nothing(verb: Verb, state: S, desired: Desired) -> None:
    under_way = desired is Desired.CANCEL and state not in FINAL and verb is not Verb.CANCEL
    if under_way or state in REFUSED[verb]:
        with pytest.raises(IllegalMoveError):
            wish(verb, state, desired)
        return
    wanted = wish(verb, state, desired)
    if wanted is None:
        return
    if wanted.dst is not None:
        lifecycle.check(state, wanted.dst, by_user=True)
        assert wanted.dst not in HOLDS_WORKERS or wanted.dst is S.STOPPING
        assert wanted.dst not in (S.CANCELLED, S.PAUSED) or state not in HOLDS_WORKERS
    again = wish(verb, wanted.dst or state, wanted.desired)
    assert again is None or again.now


@pytest.mark.parametrize("state", sorted(FINAL))
def test_wish__a_final_job_moves_by_its_users_retry_alone(state: S) -> None:
    assert wish(Verb.CANCEL, state, Desired.RUN) is None
    if state is not S.SUCCEEDED:
        wanted = wish(Verb.RETRY, state, Desired.CANCEL)
        assert wanted is not None
        assert (wanted.dst, wanted.fresh) == (S.QUEUED, True)
