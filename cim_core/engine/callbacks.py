"""What the loop tells its caller, and asks of it. The loop itself opens no file and no socket."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from cim_core.engine.state import TrainState


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What is known after `step` completed steps."""

    step: int
    metrics: Mapping[str, float]  # of this step, averaged over micro-batches and ranks; holds loss, grad_norm
    images_per_s: float  # over all ranks, since the last report
    learning_rate: float  # of this step


class Callbacks(Protocol):
    """Called on every rank at the same steps, in the order on_step, on_sample, on_checkpoint.

    A checkpoint comes last: where one is committed, the reports and pictures of its step are done.
    """

    def on_start(self, step: int) -> None:
        """Training begins, or goes on, with `step` steps completed."""

    def on_step(self, report: StepReport) -> None:
        """After step 1, after each `log_every` steps and after the last one."""

    def on_sample(self, step: int) -> None:
        """Time for a picture; must leave model and modes as they are."""

    def on_checkpoint(self, state: TrainState, step: int) -> None:
        """Time to save `state`; also after the last step, and after the step that a stop ended."""

    def should_stop(self) -> bool:
        """Whether to stop after the step that now runs; only rank 0's answer counts. Must return at once."""


class NoCallbacks:
    """Callbacks that do nothing; a base for callers that need only some of them."""

    def on_start(self, step: int) -> None:
        """Nothing."""

    def on_step(self, report: StepReport) -> None:
        """Nothing."""

    def on_sample(self, step: int) -> None:
        """Nothing."""

    def on_checkpoint(self, state: TrainState, step: int) -> None:
        """Nothing."""

    def should_stop(self) -> bool:
        """Never."""
        return False
