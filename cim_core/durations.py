"""Durations turned into step numbers, once, before step one. The loop knows only steps.

A step number counts completed optimizer steps: 0 is before the first, `total_steps` after the last.
Lengths given in epochs or images are rounded up to whole steps, so a run never sees less than asked.
"""

import math
from collections.abc import Container
from dataclasses import dataclass, replace
from fractions import Fraction

from cim_core.config import Duration, TrainingConfig
from cim_core.errors import ConfigError, DataError
from cim_core.limits import MOST_STEPS

WARMUP_SHARE = Fraction(1, 30)  # METHOD.md section 3: 10 of 300 epochs
SAMPLE_SHARE = Fraction(1, 10)


@dataclass(frozen=True, kw_only=True)
class Every:
    """The first step at or after each multiple of `period`, and the last step; asked with `in`.

    Rounding each multiple and not the period keeps "every epoch" at the epochs' ends for ever. The steps
    are not listed: a training may have more of them than fit into memory.
    """

    period: Fraction  # steps, above 0; up to 1 it is each step
    total_steps: int
    from_start: bool = False  # step 0, before training, as well

    def __contains__(self, step: object) -> bool:
        if not isinstance(step, int) or not 0 < step < self.total_steps:
            return step == self.total_steps or (self.from_start and step == 0)
        latest_multiple = step // self.period * self.period
        return math.ceil(latest_multiple) == step


@dataclass(frozen=True)
class AnyOf:
    """The steps of each of its parts."""

    parts: tuple[Container[int], ...]

    def __contains__(self, step: object) -> bool:
        return any(step in part for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole course of a training in steps; `total_steps` is one of each kind of steps."""

    total_steps: int
    warmup_steps: int
    checkpoint_steps: Container[int]  # the full state is saved after these steps
    sample_steps: Container[int]  # pictures are made after these steps; holds 0, before training
    batch_size: int  # images a step, over all ranks and micro-batches
    num_images: int  # usable images, one epoch

    def epoch_of(self, step: int) -> float:
        """How many epochs `step` completed steps have seen."""
        return step * self.batch_size / self.num_images


def plan(training: TrainingConfig, *, num_images: int) -> Plan:
    """Resolve every length of `training` for a data set of `num_images` usable images.

    Raises:
        DataError: the data set is smaller than one batch.
        ConfigError: the training has more than `MOST_STEPS`, or its warm-up is longer than it.
    """
    if training.batch_size > num_images:
        raise DataError(
            f"training.batch_size is {training.batch_size}, but the data holds only {num_images} usable"
            f" images; lower training.batch_size to at most {num_images} or add images"
        )
    total = steps_of(training.length, batch_size=training.batch_size, num_images=num_images)
    if total > MOST_STEPS:  # as no number of steps or images can be
        rule = (
            f"must be at most {MOST_STEPS:,} steps, got {training.epochs:g} epochs of {num_images:,} images, "
            f"which are {total:,}; lower training.epochs"
        )
        raise ConfigError([("training.epochs", rule)])
    return Plan(
        total_steps=total,
        warmup_steps=_warmup_steps(training, total, num_images),
        checkpoint_steps=_every(training.checkpoint_every or Duration(epochs=1), training, total, num_images),
        sample_steps=replace(_sample_steps(training, total, num_images), from_start=True),
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


def _sample_steps(training: TrainingConfig, total: int, num_images: int) -> Every:
    if training.sample_every is not None:
        return _every(training.sample_every, training, total, num_images)
    return Every(period=total * SAMPLE_SHARE, total_steps=total)


def _every(period: Duration, training: TrainingConfig, total: int, num_images: int) -> Every:
    steps = exact_steps(period, batch_size=training.batch_size, num_images=num_images)
    return Every(period=steps, total_steps=total)


def _whole(steps: Fraction) -> int:
    return max(1, math.ceil(steps))
