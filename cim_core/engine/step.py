"""One optimizer step: accumulate, agree that all is finite, clip, update, average.

The forward pass knows one device. What several processes need comes from outside: a wrapped module
inside the task, and its `no_sync` for all but the last micro-batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from cim_core.config import TrainingConfig
from cim_core.durations import Plan
from cim_core.ema import update_averages
from cim_core.engine import dist
from cim_core.engine.state import TrainState
from cim_core.errors import NonFiniteError
from cim_core.schedule import learning_rate
from cim_core.seeding import seed_for

NoSync = Callable[[], AbstractContextManager[None]]


class Batch(Protocol):
    """This rank's part of one step."""

    def split(self, parts: int) -> Sequence[Self]:
        """`parts` micro-batches of equal size, in order."""

    def to(self, device: torch.device) -> Self:
        """The same batch on `device`."""


class TaskOutput(Protocol):
    """What a forward pass returns to the loop."""

    @property
    def loss(self) -> Tensor:
        """Scalar, a mean over the micro-batch, with gradient."""

    @property
    def metrics(self) -> Mapping[str, Tensor]:
        """Scalars without gradient, loss terms among them, the same names on each rank and step."""


BatchT = TypeVar("BatchT", bound=Batch)
BatchT_contra = TypeVar("BatchT_contra", bound=Batch, contravariant=True)


class Task(Protocol[BatchT_contra]):
    """A training objective: the wrapped or plain module and how to call it."""

    def losses(
        self, batch: BatchT_contra, *, step: int, micro: int, rank: int, progress: float
    ) -> TaskOutput:
        """One forward pass; `step` completed steps before it, `progress` of the training in [0, 1)."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step leaves on the device; nothing of it has been read back."""

    metrics: dict[str, Tensor]
    learning_rate: float
    stop: bool  # agreed by all ranks


def train_step(
    task: Task[BatchT],
    state: TrainState,
    batch: BatchT,
    *,
    plan: Plan,
    training: TrainingConfig,
    device: torch.device,
    stop: bool = False,
    no_sync: NoSync | None = None,
) -> StepResult:
    """Do one optimizer step on `batch`; `stop` is this rank's wish to end after it.

    Raises:
        NonFiniteError: on every rank where the loss or the gradient of one is not finite; weights and
            optimizer are as before the step (buffers that a forward pass moves may have moved).
    """
    rate = set_learning_rate(state, training, plan)
    state.optimizer.zero_grad(set_to_none=True)
    metrics = _accumulate(task, state, batch, plan=plan, training=training, device=device, no_sync=no_sync)
    gradients = _gradients(state)
    metrics["grad_norm"] = torch.nn.utils.get_total_norm(gradients)
    stop = _agree(metrics, state=state, stop=stop)
    if training.clip_norm > 0:
        parameters = _parameters(state)
        torch.nn.utils.clip_grads_with_norm_(parameters, training.clip_norm, metrics["grad_norm"])
    state.optimizer.step()
    update_averages(state.model)
    state.step += 1
    return StepResult(metrics=metrics, learning_rate=rate, stop=stop)


def set_learning_rate(state: TrainState, training: TrainingConfig, plan: Plan) -> float:
    """Write the rate of the coming step into the optimizer, and return it."""
    rate = learning_rate(state.step, training, plan)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    return rate


def _accumulate(
    task: Task[BatchT],
    state: TrainState,
    batch: BatchT,
    *,
    plan: Plan,
    training: TrainingConfig,
    device: torch.device,
    no_sync: NoSync | None,
) -> dict[str, Tensor]:
    """Forward and backward over all micro-batches; metrics averaged over them, `loss` included.

    Each loss is a mean over its micro-batch and all parts are equal, so the mean of the gradients is
    the gradient of the whole batch.
    """
    parts = batch.split(training.accumulation)
    step, rank = state.step, dist.rank()
    totals: dict[str, Tensor] = {}
    for micro, part in enumerate(parts):
        last = micro == len(parts) - 1
        with nullcontext() if last or no_sync is None else no_sync():
            with (
                own_randomness(training.seed, step, rank, micro, device=device),
                _precision(training, device),
            ):
                output = task.losses(
                    part.to(device), step=step, micro=micro, rank=rank, progress=step / plan.total_steps
                )
            (output.loss / len(parts)).backward()  # type: ignore[no-untyped-call]
        for name, value in {**output.metrics, "loss": output.loss}.items():
            totals[name] = totals.get(name, 0.0) + value.detach().float() / len(parts)
    return totals


def _gradients(state: TrainState) -> list[Tensor]:
    return [p.grad for p in _parameters(state) if p.grad is not None]


def _parameters(state: TrainState) -> list[Tensor]:
    return [p for group in state.optimizer.param_groups for p in group["params"]]


def _agree(metrics: Mapping[str, Tensor], *, state: TrainState, stop: bool) -> bool:
    """One collective for all that ranks must decide together: raise as one, stop as one.

    Every metric is looked at, so that the message can name the loss term that broke first; only a
    broken loss or gradient is an error, since a metric may rightly be infinite.
    """
    names = sorted(metrics)
    broken = torch.stack([~torch.isfinite(metrics[name]) for name in names]).float()
    flags = torch.cat([broken, broken.new_tensor([float(stop)])])
    *seen, stopping = dist.all_reduce_sum(flags).tolist()
    bad = [name for name, count in zip(names, seen, strict=True) if count]
    if "loss" in bad or "grad_norm" in bad:
        state.optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(_lesson(bad, step=state.step))
    return bool(stopping > 0)


def _lesson(bad: Sequence[str], *, step: int) -> str:
    terms = [name for name in bad if name not in ("loss", "grad_norm")]
    if "loss" not in bad:
        what = "the gradient is not finite although the loss is"
    else:
        what = f"the loss is not finite (broken: {', '.join(terms) or 'loss'})"
    return (
        f"step {step}: {what}; no weight was changed. Lower training.learning_rate, lengthen"
        " training.warmup, or set training.precision to fp32"
    )


@contextmanager
def own_randomness(seed: int, *counters: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators seeded for this one pass, and put back behind it.

    Our own code draws from passed generators; dropout and stochastic depth inside timm cannot, and
    would otherwise make a resumed run differ.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed_for(seed, "step", *counters))
        yield


def _precision(training: TrainingConfig, device: torch.device) -> AbstractContextManager[None]:
    """Autocast around the forward pass; the weights stay fp32."""
    assert training.precision is not None, "precision is decided before step one (engine.precision)"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=training.precision == "bf16")
