"""What a campaign will do is known before it begins: from the seed alone."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from service.client import Client
from service.contracts.jobs import Desired, JobState
from service.contracts.parsing import parse_all
from tests.chaos.faults import CATALOGUE
from tests.chaos.journal import Journal
from tests.chaos.load import ATTEMPTS, FEW_ATTEMPTS, Users, plan


class Answers:
    """A service with a job in every state, each paused by its user."""

    def __init__(self, asked: list[tuple[str, str]]) -> None:
        self._asked = asked

    def jobs(self, **_: object) -> list[SimpleNamespace]:
        return [self._job(state) for state in ("paused", "stopping", "failed")]

    def submit(self, *_: object, **__: object) -> list[SimpleNamespace]:
        return []

    def cancel(self, ref: str) -> SimpleNamespace:
        self._asked.append(("cancel", ref))
        return self._job(ref)

    pause = resume = retry = cancel

    def _job(self, state: str) -> SimpleNamespace:
        return SimpleNamespace(id=state, name="c0000", state=JobState(state), desired=Desired.PAUSE)


def test_plan__is_a_function_of_the_seed() -> None:
    assert plan(1, jobs=30, over_s=60) == plan(1, jobs=30, over_s=60)
    assert plan(1, jobs=30, over_s=60) != plan(2, jobs=30, over_s=60)


def test_plan__is_made_of_sound_specs_in_the_order_of_their_times() -> None:
    errands = plan(3, jobs=100, over_s=300)
    documents = [document for errand in errands for document in errand.documents]
    assert 100 <= len(documents) <= 101
    assert len(parse_all(documents)) == len(documents)
    assert len({document["name"] for document in documents}) == len(documents)
    times = [errand.at_s for errand in errands]
    assert times == sorted(times)
    assert times[-1] < 300


def test_plan__has_everything_that_users_do() -> None:
    errands = plan(3, jobs=100, over_s=300)
    assert any(len(errand.documents) == 2 for errand in errands)
    assert any(errand.copies > 1 and errand.again_s is not None and errand.misuse for errand in errands)
    wishes = [wish for errand in errands for wish in errand.wishes]
    assert {verb for wish in wishes for verb in wish.verbs} == {"cancel", "pause", "resume", "retry"}
    assert {len(set(wish.verbs)) for wish in wishes} >= {1, 2, 4}  # different ones at once, too
    assert {len(wish.verbs) for wish in wishes if len(set(wish.verbs)) == 1} == {1, 3}
    left_paused = [errand for errand in errands if errand.wishes and errand.wishes[-1].verbs[0] == "pause"]
    assert {errand.at_last for errand in left_paused} == {"resume", "cancel"}
    budgets = {document["retries"]["max_attempts"] for errand in errands for document in errand.documents}
    assert budgets == {FEW_ATTEMPTS, ATTEMPTS}


def test_wake__ends_every_pause_as_it_was_planned(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []
    errand = plan(3, jobs=1, over_s=0.0)[0]
    users = Users(cast("Client", Answers(asked)), Journal(tmp_path, "test"))
    users.start([replace(errand, at_last="cancel", wishes=(), copies=1, again_s=None, misuse=False)])
    users.finish(1, within_s=30.0)
    users.wake()
    users.close()
    assert asked == [("cancel", "paused"), ("cancel", "stopping")]


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_faults__each_ends(name: str) -> None:
    assert 0 < CATALOGUE[name]().hold_s < 60
