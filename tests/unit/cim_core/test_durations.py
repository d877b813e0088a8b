import math
import pickle
from collections.abc import Container
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cim_core.config import Duration, TrainingConfig
from cim_core.durations import AnyOf, Every, Plan, plan, steps_of
from cim_core.errors import ConfigError, DataError
from cim_core.limits import MOST_STEPS


def planned(*, num_images: int = 100, **changes: Any) -> Plan:
    values: dict[str, Any] = {"steps": 30, "batch_size": 10, **changes}
    return plan(TrainingConfig(**values), num_images=num_images)


def in_steps(due: Container[int], *, up_to: int = 400) -> set[int]:
    return {step for step in range(-2, up_to) if step in due}


def by_listing(period: Fraction, total: int) -> set[int]:
    """What `Every` stands for, written out: the first step at or after each multiple, and the last step."""
    period = max(period, Fraction(1))
    count = int(total / period)
    return {min(max(1, math.ceil(period * i)), total) for i in range(1, count + 1)} | {total}


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (Duration(steps=7), 7),
        (Duration(epochs=2), 7),  # 100 images in 32s: 6.25 steps
        (Duration(epochs=0.001), 1),
        (Duration(images=64), 2),
        (Duration(images=65), 3),
    ],
)
def test_steps_of__rounds_up(duration: Duration, steps: int) -> None:
    assert steps_of(duration, batch_size=32, num_images=100) == steps


def test_steps_of__decimal_epochs_are_exact() -> None:
    """In floating point 0.1 x 30 images exceed 3, and rounding up would give a fourth step."""
    assert 0.1 * 3 > 0.3
    assert steps_of(Duration(epochs=0.3), batch_size=1, num_images=10) == 3
    assert steps_of(Duration(epochs=0.7), batch_size=1, num_images=10) == 7


def test_plan__defaults_are_a_thirtieth_an_epoch_and_a_tenth() -> None:
    p = planned(steps=300)
    assert (p.total_steps, p.warmup_steps) == (300, 10)
    assert in_steps(p.checkpoint_steps) == set(range(10, 301, 10))
    assert in_steps(p.sample_steps) == {0, *range(30, 301, 30)}


def test_plan__every_epoch_stays_at_the_epochs_ends() -> None:
    """10 images in 4s: epochs end after 2.5, 5, 7.5 and 10 steps."""
    p = planned(steps=None, epochs=4, batch_size=4, num_images=10)
    assert in_steps(p.checkpoint_steps) == {3, 5, 8, 10}


def test_plan__a_period_below_one_step_is_every_step() -> None:
    p = planned(checkpoint_every=Duration(images=1), sample_every=Duration(epochs=0.01))
    assert in_steps(p.checkpoint_steps) == set(range(1, 31))
    assert in_steps(p.sample_steps) == set(range(31))


def test_plan__a_period_beyond_the_end_is_the_end() -> None:
    assert in_steps(planned(checkpoint_every=Duration(epochs=99)).checkpoint_steps) == {30}


@pytest.mark.parametrize("total", [1, 2, 9, 10, 11, 29])
def test_plan__short_trainings_have_ten_pictures_at_most(total: int) -> None:
    p = planned(steps=total)
    steps = in_steps(p.sample_steps)
    assert {0, total} <= steps
    assert len(steps) <= 11
    assert max(steps) == total


@given(
    period=st.fractions(min_value=Fraction(1, 64), max_value=400, max_denominator=64),
    total=st.integers(1, 300),
)
def test_every__is_the_list_of_its_steps(period: Fraction, total: int) -> None:
    assert in_steps(Every(period=period, total_steps=total)) == by_listing(period, total)
    from_start = Every(period=period, total_steps=total, from_start=True)
    assert in_steps(from_start) == by_listing(period, total) | {0}


def test_every__holds_nothing_that_is_no_step() -> None:
    assert "10" not in Every(period=Fraction(10), total_steps=30)
    assert 10.5 not in Every(period=Fraction(1), total_steps=30)


def test_any_of__holds_what_one_of_them_holds() -> None:
    both = AnyOf((Every(period=Fraction(10), total_steps=30), frozenset({4})))
    assert in_steps(both) == {4, 10, 20, 30}
    assert in_steps(AnyOf(())) == set()


LONGEST = [
    ({"steps": 10**12}, 100),
    ({"images": 10**12, "batch_size": 1}, 100),
    ({"epochs": 1e6, "batch_size": 1}, 10**6),
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("length", "num_images"), LONGEST, ids=str)
def test_plan__of_the_longest_training_is_small_and_made_at_once(
    length: dict[str, Any], num_images: int
) -> None:
    """A list of its checkpoints would not fit into any memory; the time limit is what notices one."""
    periods = {"checkpoint_every": Duration(steps=1), "sample_every": Duration(images=1)}
    p = planned(num_images=num_images, **{"steps": None, **length, **periods})
    assert p.total_steps == MOST_STEPS == 10**12
    assert len(pickle.dumps(p)) < 1000
    assert all(step in p.checkpoint_steps for step in (1, 123_456_789_012, 10**12))
    assert 10**12 + 1 not in p.checkpoint_steps


def test_plan__epochs_that_are_more_steps_than_any_training_has_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        planned(num_images=10**7, steps=None, epochs=1e6, batch_size=1)
    rule = (
        "must be at most 1,000,000,000,000 steps, got 1e+06 epochs of 10,000,000 images, which are "
        "10,000,000,000,000; lower training.epochs"
    )
    assert caught.value.problems == [("training.epochs", rule)]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("key", "length"),
    [("steps", 10**12 + 1), ("steps", 10**400), ("images", 10**400), ("epochs", 1e308), ("epochs", math.inf)],
    ids=["steps", "steps of 400 digits", "images of 400 digits", "epochs of 308 digits", "endless"],
)
def test_plan__lengths_beyond_all_measure_are_refused_at_once(key: str, length: float) -> None:
    changes: dict[str, Any] = {"steps": None, key: length}
    with pytest.raises(ConfigError, match=key):
        planned(**changes)


def test_plan__epoch_of_a_step() -> None:
    assert planned().epoch_of(15) == pytest.approx(float(Fraction(150, 100)))


def test_plan__batch_larger_than_the_data() -> None:
    with pytest.raises(DataError, match=r"training.batch_size is 10.*only 9 usable images.*at most 9"):
        planned(num_images=9)
    assert planned(num_images=10).num_images == 10


def test_plan__warmup_longer_than_the_training() -> None:
    with pytest.raises(ConfigError, match=r"training.warmup: 40 steps of warm-up do not fit into 30"):
        planned(warmup=Duration(epochs=4))
