"""One optimizer step: accumulate, agree that all is finite, clip, update, average.

The forward pass knows one device. What several processes need comes from outside: a wrapped module
inside the task, and its `no_sync` for all but the last micro-batch.

Nothing here waits for a GPU. Whether all was finite is decided there: a fused optimizer leaves the
weights alone where the flag `found_inf` is up, in that step and in all after it, and the host hears of
it when it reads the step's numbers, which `fit` does when the next step is queued.
"""

import math
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
from cim_core.engine.transfer import Movable, Readback
from cim_core.errors import NonFiniteError
from cim_core.schedule import learning_rate
from cim_core.seeding import seed_for

NoSync = Callable[[], AbstractContextManager[None]]


class Batch(Movable, Protocol):
    """This rank's part of one step."""

    def split(self, parts: int) -> Sequence[Self]:
        """`parts` micro-batches of equal size, in order."""


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


@dataclass(frozen=True)
class Seen:
    """What all ranks know of a step once it was read back."""

    means: dict[str, float]  # of each metric over the ranks
    stop: bool  # a rank wanted to stop


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step leaves on the device, and its numbers on their way to the host."""

    step: int  # completed steps, this one among them
    metrics: dict[str, Tensor]  # of this rank
    learning_rate: float
    numbers: Readback  # means over the ranks: the metrics by name, then the wish to stop

    def read(self, state: TrainState) -> Seen:
        """The step as all ranks see it; may be asked again.

        Raises:
            NonFiniteError: on every rank, where the loss or the gradient of one was not finite; `state`
                is then as before the step (but for buffers that a forward pass moves).
        """
        names = sorted(self.metrics)
        *values, stop = self.numbers.values()
        # A metric alone may rightly be infinite; it is named because it may be the term that broke first.
        bad = [name for name, value in zip(names, values, strict=True) if not math.isfinite(value)]
        if not _DECISIVE.isdisjoint(bad):
            state.optimizer.zero_grad(set_to_none=True)
            vars(state.optimizer).pop(_FLAG, None)
            state.step = self.step - 1
            raise NonFiniteError(_lesson(bad, step=state.step))
        return Seen(dict(zip(names, values, strict=True)), stop=stop > 0)


_DECISIVE = frozenset({"loss", "grad_norm"})
_FLAG = "found_inf"  # the attribute that torch's fused optimizers obey, made for its GradScaler


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

    On a CPU, and where the optimizer cannot skip a step by itself, the numbers are read before anything
    moves, and NonFiniteError is raised here; else by `StepResult.read`, to be called before the result
    of the next step is used.
    """
    rate = set_learning_rate(state, training, plan)
    state.optimizer.zero_grad(set_to_none=True)
    metrics = _accumulate(task, state, batch, plan=plan, training=training, device=device, no_sync=no_sync)
    metrics["grad_norm"] = torch.nn.utils.get_total_norm(_gradients(state))
    means_K = _means(metrics, stop=stop)
    result = StepResult(step=state.step + 1, metrics=metrics, learning_rate=rate, numbers=Readback(means_K))
    skips_broken_steps = bool(state.optimizer.defaults.get("fused"))
    if result.numbers.at_hand or not skips_broken_steps:
        result.read(state)
    broken = _flag(state.optimizer, metrics, means_K) if skips_broken_steps else None
    if training.clip_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(_parameters(state), training.clip_norm, metrics["grad_norm"])
    state.optimizer.step()
    update_averages(state.model, unless=broken)
    state.step += 1
    return result


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

    Each part has as many images as the others, so where a loss is a mean over images the mean of the
    gradients is the gradient of the whole batch. The loss of masked tokens is a mean over masked positions,
    of which each image has its own number: there a part with fewer of them weighs a little more each, as it
    does between ranks.
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


def _means(metrics: Mapping[str, Tensor], *, stop: bool) -> Tensor:
    """One collective for all that ranks must know together: each metric's mean, and of the wish to stop.

    What is not finite on one rank is not finite in the mean.
    """
    values = [metrics[name].float() for name in sorted(metrics)]
    wish = torch.full_like(values[0], float(stop))
    return dist.all_reduce_sum(torch.stack([*values, wish])) / dist.world_size()


def _flag(optimizer: torch.optim.Optimizer, metrics: Mapping[str, Tensor], means_K: Tensor) -> Tensor:
    """Raise the flag, 1.0, where this step is broken on any rank; once up it stays up, until it was read.

    So a step that was queued before the host knew moves nothing either.
    """
    names = sorted(metrics)
    decisive = torch.stack([means_K[names.index(name)] for name in sorted(_DECISIVE)])
    broken = (~decisive.isfinite().all()).float()
    before = getattr(optimizer, _FLAG, None)
    flag = broken if before is None else torch.maximum(before, broken)
    setattr(optimizer, _FLAG, flag)
    return flag


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
