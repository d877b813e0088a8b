"""The training loop: step, report, sample, save, stop. Everything else is a callback.

The numbers of a step are read when the next one is queued, so that a GPU is never idle meanwhile; before
a picture, a checkpoint and the end they are waited for. A CPU has them at once.
"""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from cim_core.config import TrainingConfig
from cim_core.durations import AnyOf, Plan
from cim_core.engine import dist
from cim_core.engine.acceleration import explained_compiling
from cim_core.engine.callbacks import Callbacks, StepReport
from cim_core.engine.precision import with_precision
from cim_core.engine.state import TrainState
from cim_core.engine.step import Batch, BatchT, NoSync, StepResult, Task, train_step
from cim_core.engine.transfer import on_device

BatchT_co = TypeVar("BatchT_co", bound=Batch, covariant=True)


class StepLoader(Protocol[BatchT_co]):
    """Batches as a pure function of the step, so that a run may start anywhere."""

    def steps(self, start: int, stop: int) -> Generator[BatchT_co, None, None]:
        """This rank's part of each step from `start` up to, not including, `stop`; closable."""


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """Where the loop ended."""

    step: int  # completed steps
    stopped: bool  # ended by `should_stop` before the last step


@explained_compiling()
def fit(
    task: Task[BatchT],
    state: TrainState,
    loader: StepLoader[BatchT],
    plan: Plan,
    training: TrainingConfig,
    *,
    callbacks: Callbacks,
    device: torch.device,
    no_sync: NoSync | None = None,
) -> FitResult:
    """Train from `state.step` to the end of `plan`, or until rank 0 wants to stop.

    A state that is already finished trains nothing: its reports, picture and checkpoint were made
    before that checkpoint could be committed. Raises NonFiniteError on all ranks, as `StepResult.read`, and
    ConfigError where torch cannot compile a network that it is asked to.
    """
    training = with_precision(training, device)
    _begin(callbacks, state, plan)
    reports = _Reports(callbacks, state, plan, training)
    stopped = False
    with closing(loader.steps(state.step, plan.total_steps)) as batches:
        for batch in on_device(batches, device):
            wish = dist.rank() == 0 and callbacks.should_stop()
            result = train_step(
                task, state, batch, plan=plan, training=training, device=device, stop=wish, no_sync=no_sync
            )
            stopped = reports.follow(result) and state.step < plan.total_steps
            if state.step in plan.sample_steps:
                callbacks.on_sample(state.step)
            if stopped or state.step in plan.checkpoint_steps:
                callbacks.on_checkpoint(state, state.step)
            if stopped:
                break
    return FitResult(step=state.step, stopped=stopped)


def _begin(callbacks: Callbacks, state: TrainState, plan: Plan) -> None:
    callbacks.on_start(state.step)
    if state.step == 0 and 0 in plan.sample_steps:
        callbacks.on_sample(0)


class Pace:
    """Images a second over all ranks, from one look to the next."""

    def __init__(
        self, batch_size: int, *, start: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._batch_size = batch_size
        self._clock = clock
        self._step, self._time = start, clock()

    def since_last(self, step: int) -> float:
        """The pace since the last call or the start, waiting time for pictures and checkpoints included."""
        now = self._clock()
        images, seconds = (step - self._step) * self._batch_size, now - self._time
        self._step, self._time = step, now
        return images / max(seconds, 1e-9)


class _Reports:
    """Reads each step's numbers, the latest ones as late as it may, and reports those that are due."""

    def __init__(self, callbacks: Callbacks, state: TrainState, plan: Plan, training: TrainingConfig) -> None:
        self._callbacks, self._state, self._plan, self._training = callbacks, state, plan, training
        self._pace = Pace(plan.batch_size, start=state.step)
        self._unread: StepResult | None = None

    def follow(self, result: StepResult) -> bool:
        """Take the step that was just queued; whether a step that was read ends the training."""
        stop = self._read()
        self._unread = result
        plan = self._plan
        borders = AnyOf((plan.sample_steps, plan.checkpoint_steps, (plan.total_steps,)))
        if stop or result.numbers.at_hand or result.step in borders:
            stop = self._read() or stop
        return stop

    def _read(self) -> bool:
        if self._unread is None:
            return False
        result, self._unread = self._unread, None
        seen = result.read(self._state)
        if self._is_due(result.step):
            report = StepReport(
                step=result.step,
                metrics=seen.means,
                images_per_s=self._pace.since_last(result.step),
                learning_rate=result.learning_rate,
            )
            self._callbacks.on_step(report)
        return seen.stop

    def _is_due(self, step: int) -> bool:
        return step == 1 or step % self._training.log_every == 0 or step == self._plan.total_steps
