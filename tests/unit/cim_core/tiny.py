"""A tiny model, task and data set that let the engine's tests run in milliseconds.

The network has all that makes a resume hard: batch-norm buffers, dropout from torch's global
generator, noise from a passed generator, a shared parameter, and one that never gets a gradient.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from cim_core.config import Duration, TrainingConfig
from cim_core.data.dataset import ImageDataset, ViewConfig, Views
from cim_core.data.index import scan
from cim_core.data.loading import ImageLoader
from cim_core.durations import plan
from cim_core.engine import dist
from cim_core.engine.background import Background
from cim_core.engine.callbacks import NoCallbacks, StepReport
from cim_core.engine.fit import FitResult, fit
from cim_core.engine.state import TrainState, load_state, save_state, take_snapshot
from cim_core.engine.step import NoSync, Task, TaskOutput
from cim_core.optim import build_optimizer
from cim_core.seeding import generator_for

CPU = torch.device("cpu")
FINGERPRINT = {"model": {"name": "tiny"}}
NUM_IMAGES = 10


@dataclass(frozen=True)
class Output:
    loss: Tensor
    metrics: Mapping[str, Tensor]


class TinyNet(nn.Module):
    """[B, 3, H, W] uint8 to one number an image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.pos_embed = nn.Parameter(torch.zeros(1, 4))
        self.idle = nn.Parameter(torch.ones(2, 2))
        generator = generator_for(0, "init", "tiny")
        for parameter in self.parameters():
            parameter.data.normal_(std=0.3, generator=generator)

    def forward(self, pixels_B3HW: Tensor, generator: torch.Generator) -> Tensor:
        x = self.norm(self.stem(pixels_B3HW.float() / 255)).relu().mean((2, 3))
        noise = torch.randn(x.shape, generator=generator)
        score: Tensor = self.second(self.drop(self.first(x + self.pos_embed + 0.1 * noise))).sum(1)
        return score


class TinyTask:
    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def losses(self, batch: Views, *, step: int, micro: int, rank: int, progress: float) -> Output:
        score_B = self.module(batch.pixels_B3HW, generator_for(0, "tiny", step, rank, micro))
        loss = (score_B - 1).square().mean()
        return Output(loss, {"loss/square": loss.detach(), "progress": torch.tensor(progress)})


class Watched:
    """Any task, with a list of the samples that reached it."""

    def __init__(self, task: Task[Views]) -> None:
        self.task = task
        self.seen: list[tuple[int, ...]] = []

    def losses(self, batch: Views, *, step: int, micro: int, rank: int, progress: float) -> TaskOutput:
        self.seen += [tuple(sample) for sample in batch.ids_B2.tolist()]
        return self.task.losses(batch, step=step, micro=micro, rank=rank, progress=progress)


def write_images(folder: Path, *, count: int = NUM_IMAGES, side: int = 12) -> Path:
    """`count` PNGs of noise below `folder`/CLASS/, two classes."""
    noise = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"class{i % 2}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    return folder


def training(**changes: object) -> TrainingConfig:
    """Ten steps of four images: epochs end inside steps, 3, 5, 8, 10."""
    values: dict[str, object] = {
        "steps": 10,
        "batch_size": 4,
        "accumulation": 2,
        "learning_rate": 0.05,
        "precision": "fp32",
        "log_every": 3,
        "checkpoint_every": Duration(steps=100),
        "sample_every": Duration(steps=5),
    }
    return TrainingConfig(**{**values, **changes})  # type: ignore[arg-type]


class Recorder(NoCallbacks):
    """Writes down every call; saves checkpoints below `folder`; stops after step `stop_at`."""

    def __init__(self, folder: Path, *, stop_at: int | None = None) -> None:
        self.folder, self.stop_at = folder, stop_at
        self.calls: list[tuple[str, int]] = []
        self.reports: list[StepReport] = []
        self.asked = 0

    def on_start(self, step: int) -> None:
        self.asked = step
        self.calls.append(("start", step))

    def on_step(self, report: StepReport) -> None:
        self.calls.append(("step", report.step))
        self.reports.append(report)

    def on_sample(self, step: int) -> None:
        self.calls.append(("sample", step))

    def on_checkpoint(self, state: TrainState, step: int) -> None:
        self.calls.append(("checkpoint", step))
        if dist.rank() == 0:
            save_state(state, self.folder / f"step-{step}", fingerprint=FINGERPRINT)

    def should_stop(self) -> bool:
        self.asked += 1
        return self.asked == self.stop_at


class Delayed(Recorder):
    """Copies at each checkpoint, and writes the copy only when the next one is due or training is over."""

    def __init__(self, folder: Path, *, stop_at: int | None = None) -> None:
        super().__init__(folder, stop_at=stop_at)
        self.background, self.due = Background(), Event()

    def on_checkpoint(self, state: TrainState, step: int) -> None:
        self.calls.append(("checkpoint", step))
        if dist.rank() == 0:
            self.write()
            self.due = due = Event()
            snapshot = take_snapshot(state, fingerprint=FINGERPRINT)

            def write() -> None:
                assert due.wait(timeout=60)
                snapshot.write(self.folder / f"step-{step}")

            self.background.do(write)

    def write(self) -> None:
        """Let the copy under way be written, and wait for it."""
        self.due.set()
        self.background.wait()


@dataclass(frozen=True)
class Run:
    result: FitResult
    state: TrainState
    recorder: Recorder
    seen: list[tuple[int, ...]]  # (epoch, index) of each sample, in order


def run(
    images: Path,
    out: Path,
    *,
    model: nn.Module,
    task: Task[Views],
    config: TrainingConfig,
    views: ViewConfig | None = None,
    resume: Path | None = None,
    stop_at: int | None = None,
    no_sync: NoSync | None = None,
    checkpoint_steps: frozenset[int] | None = None,
    make_recorder: Callable[..., Recorder] = Recorder,
) -> Run:
    """Train on this rank; checkpoints go below `out`, `resume` is the checkpoint to begin from.

    `checkpoint_steps` stand for those of the plan.
    """
    dataset = ImageDataset(scan(images), views or ViewConfig(image_size=8, seed=config.seed))
    loader = ImageLoader(
        dataset,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        rank=dist.rank(),
        world_size=dist.world_size(),
    )
    state = TrainState(model=model, optimizer=build_optimizer(model, config))
    if resume is not None:
        load_state(state, resume, fingerprint=FINGERPRINT)
    recorder = make_recorder(out, stop_at=stop_at)
    watched, course = Watched(task), plan(config, num_images=len(dataset))
    if checkpoint_steps is not None:
        course = replace(course, checkpoint_steps=checkpoint_steps)
    result = fit(
        watched, state, loader, course, config, callbacks=recorder, device=CPU, no_sync=no_sync
    )  # fmt: skip
    if isinstance(recorder, Delayed):
        recorder.write()
        recorder.background.close()
    return Run(result, state, recorder, watched.seen)


def tiny_run(images: Path, out: Path, *, stop_at: int | None = None, **changes: object) -> Run:
    model = TinyNet()
    return run(images, out, model=model, task=TinyTask(model), config=training(**changes), stop_at=stop_at)
