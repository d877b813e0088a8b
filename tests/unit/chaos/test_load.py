"""What a campaign will do is known before it begins: from the seed alone."""

import pytest

from service.contracts.parsing import parse_all
from tests.chaos.faults import CATALOGUE
from tests.chaos.load import plan


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
    assert {errand.cancels for errand in errands if errand.cancel_s is not None} == {1, 3}


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_faults__each_ends(name: str) -> None:
    assert 0 < CATALOGUE[name]().hold_s < 60
