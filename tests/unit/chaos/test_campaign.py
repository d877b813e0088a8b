"""How long a campaign waits for its jobs."""

import itertools
import time

import pytest

from service.client.errors import ApiError
from service.contracts.problems import Problem
from tests.chaos.campaign import patiently

AWAY = Problem(title="away", status=503, detail="away", code="unavailable")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a second later than the one before."""
    monkeypatch.setattr(time, "monotonic", itertools.count().__next__)
    monkeypatch.setattr(time, "sleep", lambda _: None)


def answers(*numbers: int | Exception) -> itertools.chain[int | Exception]:
    return itertools.chain(numbers, itertools.repeat(numbers[-1]))


def wait(*numbers: int | Exception) -> None:
    told = answers(*numbers)

    def left() -> int:
        number = next(told)
        if isinstance(number, Exception):
            raise number
        return number

    patiently(left, within_s=10, what="jobs")


@pytest.mark.usefixtures("clock")
def test_patiently__waits_as_long_as_there_are_fewer(capsys: pytest.CaptureFixture[str]) -> None:
    wait(*range(40, -1, -1))
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("clock")
def test_patiently__says_how_many_are_left(capsys: pytest.CaptureFixture[str]) -> None:
    wait(9, 7, 8, 7)
    assert capsys.readouterr().err == "for 10 s no fewer jobs than 7\n"


@pytest.mark.usefixtures("clock")
def test_patiently__an_api_that_is_away_is_asked_again(capsys: pytest.CaptureFixture[str]) -> None:
    wait(2, ApiError(AWAY), 1, 0)
    assert capsys.readouterr().err == ""
