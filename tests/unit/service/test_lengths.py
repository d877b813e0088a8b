"""A training that is longer than any can be is refused at submit, where the spec alone tells."""

from typing import Any

import pytest

from service.contracts.parsing import parse
from service.errors import InvalidSpecError
from tests.unit.service.test_parsing import pretrain


def problems(length: dict[str, Any], *, batch_size: int = 4) -> dict[str, str]:
    try:
        parse(pretrain(training={**length, "batch_size": batch_size}))
    except InvalidSpecError as error:
        return {problem.path: problem.message for problem in error.errors}
    return {}


@pytest.mark.parametrize(
    "length",
    [{"steps": 10**12 + 1}, {"images": 10**14}, {"epochs": 2e12}, {"epochs": "inf"}, {"steps": 10**400}],
    ids=["steps", "images", "epochs", "endless", "400 digits"],
)
def test_submit__a_training_without_end_is_refused_by_its_key(length: dict[str, Any]) -> None:
    (key,) = length
    assert list(problems(length)) == [f"training.{key}"]


def test_submit__the_longest_training_is_taken() -> None:
    assert problems({"images": 4 * 10**12}) == {}
