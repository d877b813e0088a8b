"""The training loop: step, report, sample, save, stop. Everything else is a callback."""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from cim_core.config import TrainingConfig
from cim_core.durations import Plan
from cim_core.engine import dist
from cim_core.engine.callbacks import Callbacks, StepReport
from cim_core.engine.precision import with_precision
from cim_core.engine.state import TrainState
from cim_core.engine.step import Batch, BatchT, NoSync, StepResult, Task, train_step

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
    before that checkpoint could be committed. Raises NonFiniteError on all ranks, as `train_step`.
    """
    training = with_precision(training, device)
    _begin(callbacks, state, plan)
    pace = Pace(plan.batch_size, start=state.step)
    stopped = False
    with closing(loader.steps(state.step, plan.total_steps)) as batches:
        for batch in batches:
            wish = dist.rank() == 0 and callbacks.should_stop()
            result = train_step(
                task, state, batch, plan=plan, training=training, device=device, stop=wish, no_sync=no_sync
            )
            stopped = result.stop and state.step < plan.total_steps
            if _report_is_due(state.step, plan, training):
                callbacks.on_step(_report(result, state.step, pace))
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


def _report_is_due(step: int, plan: Plan, training: TrainingConfig) -> bool:
    return step == 1 or step % training.log_every == 0 or step == plan.total_steps


def _report(result: StepResult, step: int, pace: Pace) -> StepReport:
    return StepReport(
        step=step,
        metrics=rank_means(result.metrics),
        images_per_s=pace.since_last(step),
        learning_rate=result.learning_rate,
    )


def rank_means(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """The one place where metrics are read back from the device: each averaged over the ranks."""
    names = sorted(metrics)
    total = dist.all_reduce_sum(torch.stack([metrics[name].float() for name in names]))
    return dict(zip(names, (total / dist.world_size()).tolist(), strict=True))
