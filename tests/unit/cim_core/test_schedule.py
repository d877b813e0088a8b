import math

import pytest

from cim_core.config import Duration, TrainingConfig
from cim_core.durations import plan
from cim_core.schedule import learning_rate

TRAINING = TrainingConfig(
    steps=110, batch_size=1, learning_rate=1.0, min_learning_rate=0.2, warmup=Duration(steps=10)
)
PLAN = plan(TRAINING, num_images=1000)


def test_warmup__is_linear_from_zero_to_the_peak() -> None:
    assert [learning_rate(s, TRAINING, PLAN) for s in (0, 1, 5, 10)] == pytest.approx([0.0, 0.1, 0.5, 1.0])


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (35, 0.2 + 0.8 * (2 + math.sqrt(2)) / 4),  # a quarter of the way: (1 + cos 45 degrees) / 2
        (60, 0.6),  # half of the way, half of the height
        (110, 0.2),
        (500, 0.2),  # never rises again
    ],
)
def test_cosine__known_points(step: int, expected: float) -> None:
    assert learning_rate(step, TRAINING, PLAN) == pytest.approx(expected)


def test_no_warmup__starts_at_the_peak() -> None:
    training = TrainingConfig(steps=1, batch_size=1, learning_rate=0.5)
    assert learning_rate(0, training, plan(training, num_images=1)) == 0.5


def test_cosine__falls_at_every_step() -> None:
    rates = [learning_rate(s, TRAINING, PLAN) for s in range(10, 111)]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == len(rates)
