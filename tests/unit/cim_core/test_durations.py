from fractions import Fraction
from typing import Any

import pytest

from cim_core.config import Duration, TrainingConfig
from cim_core.durations import Plan, plan, steps_of
from cim_core.errors import ConfigError, DataError


def planned(*, num_images: int = 100, **changes: Any) -> Plan:
    values: dict[str, Any] = {"steps": 30, "batch_size": 10, **changes}
    return plan(TrainingConfig(**values), num_images=num_images)


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
    assert p.checkpoint_steps == set(range(10, 301, 10))
    assert p.sample_steps == {0, *range(30, 301, 30)}


def test_plan__every_epoch_stays_at_the_epochs_ends() -> None:
    """10 images in 4s: epochs end after 2.5, 5, 7.5 and 10 steps."""
    p = planned(steps=None, epochs=4, batch_size=4, num_images=10)
    assert p.checkpoint_steps == {3, 5, 8, 10}


def test_plan__a_period_below_one_step_is_every_step() -> None:
    p = planned(checkpoint_every=Duration(images=1), sample_every=Duration(epochs=0.01))
    assert p.checkpoint_steps == set(range(1, 31))
    assert p.sample_steps == set(range(31))


def test_plan__a_period_beyond_the_end_is_the_end() -> None:
    assert planned(checkpoint_every=Duration(epochs=99)).checkpoint_steps == {30}


@pytest.mark.parametrize("total", [1, 2, 9, 10, 11, 29])
def test_plan__short_trainings_have_ten_pictures_at_most(total: int) -> None:
    p = planned(steps=total)
    assert {0, total} <= p.sample_steps
    assert len(p.sample_steps) <= 11
    assert max(p.sample_steps) == total


def test_plan__epoch_of_a_step() -> None:
    assert planned().epoch_of(15) == pytest.approx(float(Fraction(150, 100)))


def test_plan__batch_larger_than_the_data() -> None:
    with pytest.raises(DataError, match=r"training.batch_size is 10.*only 9 usable images.*at most 9"):
        planned(num_images=9)
    assert planned(num_images=10).num_images == 10


def test_plan__warmup_longer_than_the_training() -> None:
    with pytest.raises(ConfigError, match=r"training.warmup: 40 steps of warm-up do not fit into 30"):
        planned(warmup=Duration(epochs=4))
