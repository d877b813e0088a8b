"""Durations turned into step numbers, once, before step one. The loop knows only steps.

A step number counts completed optimizer steps: 0 is before the first, `total_steps` after the last.
Lengths given in epochs or images are rounded up to whole steps, so a run never sees less than asked.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

from cim_core.config import Duration, TrainingConfig
from cim_core.errors import ConfigError, DataError

WARMUP_SHARE = Fraction(1, 30)  # METHOD.md section 3: 10 of 300 epochs
SAMPLE_SHARE = Fraction(1, 10)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole course of a training in steps; each set of steps ends with `total_steps`."""

    total_steps: int
    warmup_steps: int
    checkpoint_steps: frozenset[int]  # the full state is saved after these steps
    sample_steps: frozenset[int]  # pictures are made after these steps; holds 0, before training
    batch_size: int  # images a step, over all ranks and micro-batches
    num_images: int  # usable images, one epoch

    def epoch_of(self, step: int) -> float:
        """How many epochs `step` completed steps have seen."""
        return step * self.batch_size / self.num_images


def plan(training: TrainingConfig, *, num_images: int) -> Plan:
    """Resolve every length of `training` for a data set of `num_images` usable images.

    Raises:
        DataError: the data set is smaller than one batch.
        ConfigError: the warm-up is longer than the training.
    """
    if training.batch_size > num_images:
        raise DataError(
            f"training.batch_size is {training.batch_size}, but the data holds only {num_images} usable"
            f" images; lower training.batch_size to at most {num_images} or add images"
        )
    steps = exact_steps(training.length, batch_size=training.batch_size, num_images=num_images)
    total = _whole(steps)
    return Plan(
        total_steps=total,
        warmup_steps=_warmup_steps(training, total, num_images),
        checkpoint_steps=_every(training.checkpoint_every or Duration(epochs=1), training, total, num_images),
        sample_steps=_sample_steps(training, total, num_images) | {0},
        batch_size=training.batch_size,
        num_images=num_images,
    )


def steps_of(duration: Duration, *, batch_size: int, num_images: int) -> int:
    """`duration` in whole steps, rounded up, at least 1."""
    return _whole(exact_steps(duration, batch_size=batch_size, num_images=num_images))


def exact_steps(duration: Duration, *, batch_size: int, num_images: int) -> Fraction:
    """`duration` in steps, not rounded."""
    if duration.steps is not None:
        return Fraction(duration.steps)
    if duration.images is not None:
        return Fraction(duration.images, batch_size)
    # Through the decimal text: 0.1 epochs of 30 images are 3 images, not 3.0000000000000002.
    return Fraction(str(duration.epochs)) * num_images / batch_size


def _warmup_steps(training: TrainingConfig, total: int, num_images: int) -> int:
    if training.warmup is None:
        return round(total * WARMUP_SHARE)
    warmup = steps_of(training.warmup, batch_size=training.batch_size, num_images=num_images)
    if warmup > total:
        rule = f"{warmup} steps of warm-up do not fit into {total} steps of training; shorten the warm-up"
        raise ConfigError([("training.warmup", rule)])
    return warmup


def _sample_steps(training: TrainingConfig, total: int, num_images: int) -> frozenset[int]:
    if training.sample_every is not None:
        return _every(training.sample_every, training, total, num_images)
    return _multiples(total * SAMPLE_SHARE, total)


def _every(period: Duration, training: TrainingConfig, total: int, num_images: int) -> frozenset[int]:
    steps = exact_steps(period, batch_size=training.batch_size, num_images=num_images)
    return _multiples(steps, total)


def _multiples(period: Fraction, total: int) -> frozenset[int]:
    """The first step at or after each multiple of `period`, and the last step.

    Rounding each multiple and not the period keeps "every epoch" at the epochs' ends for ever.
    """
    period = max(period, Fraction(1))
    count = int(total / period)
    return frozenset(min(_whole(period * i), total) for i in range(1, count + 1)) | {total}


def _whole(steps: Fraction) -> int:
    return max(1, math.ceil(steps))
