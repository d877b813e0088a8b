"""Training for a number of seconds with a schedule that knows its last step.

A pilot measures the median step; the seconds divided by it are the steps. What a run really took is
measured again, without the time of probes between its steps.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import nn

from cim_core.config import Duration, TrainingConfig
from cim_core.data.dataset import ImageDataset, Views
from cim_core.data.loading import ImageLoader
from cim_core.durations import plan
from cim_core.engine.callbacks import NoCallbacks, StepReport
from cim_core.engine.fit import fit
from cim_core.engine.state import TrainState
from cim_core.engine.step import Task, train_step
from cim_core.optim import build_optimizer

WARM_STEPS, TIMED_STEPS = 3, 24
TAIL = 0.9  # metrics are means over the reports behind this share of the steps

Look = Callable[[], Mapping[str, float]]
Clock = Callable[[], float]  # seconds since some moment


@dataclass(kw_only=True)
class Course(NoCallbacks):
    """Follows one training: its seconds, points of a curve, metrics of its last part."""

    total_steps: int
    look: Look
    clock: Clock = time.perf_counter
    curve: list[dict[str, float]] = field(default_factory=list)
    tail: list[Mapping[str, float]] = field(default_factory=list)
    _started: float = 0.0
    _looking: float = 0.0  # seconds

    def on_start(self, step: int) -> None:
        """The clock starts."""
        del step
        self._started = self.clock()

    def on_step(self, report: StepReport) -> None:
        """Keep what the last part of the training says."""
        if report.step > TAIL * self.total_steps:
            self.tail.append(report.metrics)

    def on_sample(self, step: int) -> None:
        """Look at the model while the clock stands still."""
        begun = self.clock()
        point = {"step": float(step), "seconds": begun - self._started - self._looking}
        self.curve.append({**point, **self.look()})
        self._looking += self.clock() - begun

    def seconds(self) -> float:
        """Training so far."""
        return self.clock() - self._started - self._looking

    def metrics(self) -> dict[str, float]:
        """Means over the last part."""
        names = self.tail[0] if self.tail else ()
        return {name: statistics.fmean(metrics[name] for metrics in self.tail) for name in names}


def processor_clock() -> float:
    """Seconds of processor time for each thread: what the wall clock would show if nobody else were there."""
    return time.process_time() / torch.get_num_threads()


CLOCKS: Mapping[str, Clock] = {"wall": time.perf_counter, "processor": processor_clock}


def num_steps(seconds: float, step_seconds: float) -> int:
    """Whole steps that fit, at least one."""
    return max(1, int(seconds / step_seconds))


def step_seconds(
    model: nn.Module,
    task: Task[Views],
    dataset: ImageDataset,
    training: TrainingConfig,
    *,
    device: torch.device,
    clock: Clock = time.perf_counter,
) -> float:
    """Median seconds of a step, its images included; `model` is trained by it and should be thrown away."""
    training = dataclasses.replace(training, steps=10**6)
    course = plan(training, num_images=len(dataset))
    state = TrainState(model=model.train(), optimizer=build_optimizer(model, training))
    times: list[float] = []
    loader = ImageLoader(dataset, batch_size=training.batch_size, pin=device.type == "cuda")
    with closing(loader.steps(0, WARM_STEPS + TIMED_STEPS)) as batches:
        begun = clock()
        for batch in batches:
            train_step(task, state, batch, plan=course, training=training, device=device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            now = clock()
            times.append(now - begun)
            begun = now
    return statistics.median(times[WARM_STEPS:])


def train(
    model: nn.Module,
    task: Task[Views],
    dataset: ImageDataset,
    training: TrainingConfig,
    *,
    look: Look,
    points: int,
    device: torch.device,
    clock: Clock = time.perf_counter,
) -> Course:
    """Train `model` for `training.steps` steps, with `points` looks at it (and one before)."""
    assert training.steps is not None
    num_steps = training.steps
    every = Duration(steps=max(1, -(-num_steps // points)))
    training = dataclasses.replace(
        training, sample_every=every, log_every=max(1, num_steps // 100), checkpoint_every=every
    )
    course = Course(total_steps=num_steps, look=look, clock=clock)
    state = TrainState(model=model.train(), optimizer=build_optimizer(model, training))
    loader = ImageLoader(dataset, batch_size=training.batch_size, pin=device.type == "cuda")
    fit(
        task,
        state,
        loader,
        plan(training, num_images=len(dataset)),
        training,
        callbacks=course,
        device=device,
    )
    return course
