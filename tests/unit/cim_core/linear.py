"""A linear model whose step can be checked by hand, and the ways to break it."""

import torch
from torch import Tensor, nn

from cim_core.config import TrainingConfig
from cim_core.data.dataset import Views
from cim_core.durations import plan
from cim_core.engine.state import TrainState
from cim_core.engine.step import NoSync, StepResult, Task, train_step
from cim_core.optim import build_optimizer
from tests.unit.cim_core.tiny import CPU, Output, training

PLAN = plan(training(), num_images=10)


class MeanTask:
    """A linear model and a loss that is a plain mean, so that parts must add up to the whole."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.dtypes: list[torch.dtype] = []

    def losses(self, batch: Views, *, step: int, micro: int, rank: int, progress: float) -> Output:
        y: Tensor = self.module(batch.pixels_B3HW.flatten(1).float() / 255)
        self.dtypes.append(y.dtype)
        loss = (y.float() - 1).square().mean()
        return Output(loss, {"term": loss.detach(), "rank": torch.tensor(float(rank))})


class Broken(MeanTask):
    """NaN in the loss, or in the gradient alone, on one rank."""

    def __init__(self, module: nn.Module, *, where: str, on_rank: int = 0) -> None:
        super().__init__(module)
        self.where, self.on_rank = where, on_rank

    def losses(self, batch: Views, *, step: int, micro: int, rank: int, progress: float) -> Output:
        good = super().losses(batch, step=step, micro=micro, rank=rank, progress=progress)
        if rank != self.on_rank:
            return good
        if self.where == "loss":
            bad = good.loss * torch.tensor(torch.nan)
            return Output(bad, {**good.metrics, "term": bad.detach()})
        if self.where == "gradient":  # sqrt has slope infinity at 0; times 0 that is NaN, the value is 0
            return Output(good.loss + (good.loss * 0).sqrt(), good.metrics)
        return Output(good.loss, {**good.metrics, "term": torch.tensor(torch.inf)})


def views(count: int = 4, *, first: int = 0) -> Views:
    pixels = torch.randint(
        0, 256, (8, 3, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    part = pixels[first : first + count]
    return Views(
        pixels_B3HW=part, token_pixels_B3HW=torch.empty(count, 3, 0, 0), ids_B2=torch.zeros(count, 2).long()
    )


def linear_state(config: TrainingConfig) -> TrainState:
    model = nn.Linear(12, 1)
    nn.init.constant_(model.weight, 0.1)
    nn.init.zeros_(model.bias)
    return TrainState(model=model, optimizer=build_optimizer(model, config))


def step(
    task: Task[Views],
    state: TrainState,
    batch: Views,
    config: TrainingConfig,
    *,
    no_sync: NoSync | None = None,
) -> StepResult:
    state.step = 5  # behind the warm-up, whose first step would move nothing
    return train_step(task, state, batch, plan=PLAN, training=config, device=CPU, no_sync=no_sync)
