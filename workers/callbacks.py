"""What rank 0 does at the borders of steps; the other ranks only train."""

import io
import logging
import math
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from PIL import Image

from cim_core.durations import Plan
from cim_core.engine.background import Background
from cim_core.engine.callbacks import StepReport
from cim_core.engine.state import Snapshot, TrainState
from service.contracts.jobs import Progress
from workers.checkpointing import CheckpointWriter
from workers.failures import ServiceAwayError
from workers.rank import Rank
from workers.reporting import Mark

log = logging.getLogger(__name__)

SMOOTHING = 0.3  # weight of the newest pace in the estimate of the time left
DELIVERY_S = 900.0  # how long a checkpoint waits for the metrics before it to reach the service

Picture = Callable[[], Image.Image]
Probe = Callable[[], Mapping[str, float]]


@dataclass(kw_only=True)
class RankCallbacks:
    """Reports, pictures, probes and checkpoints of one training; all but the probe on rank 0 alone."""

    rank: Rank
    writer: CheckpointWriter
    picture: Picture
    probe: Probe | None = None  # collective
    probe_steps: Container[int] = ()
    diagnose: Probe | None = None  # with each picture
    latest: dict[str, float] = field(default_factory=dict)  # of each metric
    pace: float | None = None  # images a second, smoothed
    background: Background = field(default_factory=Background)  # commits of checkpoints

    def on_start(self, step: int) -> None:
        """Show where training begins."""
        if self.rank.leads:
            log.info("training from step %d to %d", step, self._plan.total_steps)
            self.rank.reporter.progress(self._progress(step))

    def on_step(self, report: StepReport) -> None:
        """Queue the metrics of this step and refresh the progress."""
        if not self.rank.leads:
            return
        rates = {"learning_rate": report.learning_rate, "images_per_s": report.images_per_s}
        self._record(report.step, {**report.metrics, **rates})
        old = self.pace if self.pace is not None else report.images_per_s
        self.pace = (1 - SMOOTHING) * old + SMOOTHING * report.images_per_s
        self.rank.reporter.progress(self._progress(report.step))

    def on_sample(self, step: int) -> None:
        """Probe the features and store a picture, whichever is due."""
        if step in self.probe_steps and self.probe is not None:
            self.rank.say("probing the features")
            self._record(step, self.probe())
        if step in self._plan.sample_steps and self.rank.leads:
            self.rank.say("painting a sample")
            picture = as_png(self.picture())
            self.rank.announce(self.rank.store.put_bytes(f"samples/step-{step}.png", picture))
            if self.diagnose is not None:
                self._record(step, self.diagnose())
        self.rank.reporter.progress(self._progress(step))

    def on_checkpoint(self, state: TrainState, step: int) -> None:
        """Copy `state` and commit it while training goes on, the checkpoint before having been committed."""
        if not self.rank.leads:
            return
        self.rank.say("saving a checkpoint")
        self.background.wait()
        snapshot, metrics, mark = self.writer.snapshot(state), dict(self.latest), self.rank.reporter.mark()
        self.background.do(lambda: self._commit(snapshot, mark, step=step, metrics=metrics))
        self.rank.reporter.progress(self._progress(step))

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """The training; at its end the last checkpoint is committed, or what went wrong there is raised.

        After an error in the training itself a commit under way still ends, and no error of its own counts.
        """
        try:
            yield
            if self.rank.leads:
                self.rank.say("waiting for the last checkpoint")
            self.background.wait()
        finally:
            self.background.close()

    def should_stop(self) -> bool:
        """Whether the service wants an end.

        Raises when this attempt is stale or on its own, and what the commit of a checkpoint raised.
        """
        self.background.check()
        self.rank.reporter.alive()
        self.rank.reporter.check()
        return self.rank.reporter.stop_requested

    def _commit(self, snapshot: Snapshot, mark: Mark, *, step: int, metrics: Mapping[str, float]) -> None:
        """What was measured before the checkpoint, up to `mark`, is with the service when the checkpoint is.

        Raises:
            ServiceAwayError: it is not after `DELIVERY_S`; the checkpoint is not committed.
        """
        if not self.rank.reporter.flush(timeout_s=DELIVERY_S, until=mark):
            raise ServiceAwayError(
                f"the service has not taken the metrics up to step {step} for {DELIVERY_S:.0f} s, so the "
                "checkpoint of that step is not committed"
            )
        self.writer.save(snapshot, step=step, metrics=metrics)

    @property
    def _plan(self) -> Plan:
        # As resolved from the spec; the loop's own has the probes' steps among the pictures'.
        assert self.rank.work.plan is not None, "a training has a plan"
        return self.rank.work.plan

    def _record(self, step: int, values: Mapping[str, float]) -> None:
        if self.rank.leads:
            self.latest.update({key: value for key, value in values.items() if math.isfinite(value)})
            self.rank.reporter.metrics(step, values)

    def _progress(self, step: int) -> Progress:
        left = (self._plan.total_steps - step) * self._plan.batch_size
        return Progress(
            step=step,
            total_steps=self._plan.total_steps,
            epoch=self._plan.epoch_of(step),
            images_per_s=self.pace,
            eta_s=left / self.pace if self.pace else None,
            message="training",
        )


def as_png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
