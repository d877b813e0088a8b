"""Training in this process alone, for scripts and notebooks; `workers` does the same on a cluster.

    tokenizer = train_tokenizer(images, TokenizerConfig(), TrainingConfig(epochs=10))
    model = pretrain(images, model_config, TrainingConfig(epochs=300), tokenizer=tokenizer)

With `checkpoints`, a folder, a run that was cut goes on from its last checkpoint when it is called again
with the same arguments, and ends bit-equal to one that was not (on a CPU).
"""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cim_core.config import FREE_ON_RESUME, ModelConfig, TokenizerConfig, TrainingConfig
from cim_core.data.dataset import ImageDataset, ViewConfig, Views
from cim_core.data.index import scan
from cim_core.data.loading import ImageLoader
from cim_core.durations import plan
from cim_core.engine.acceleration import accelerate
from cim_core.engine.background import Background
from cim_core.engine.callbacks import NoCallbacks, StepReport
from cim_core.engine.fit import fit
from cim_core.engine.precision import with_precision
from cim_core.engine.state import Snapshot, TrainState, is_complete, load_state, take_snapshot
from cim_core.engine.step import Task
from cim_core.methods import build_model
from cim_core.optim import build_optimizer
from cim_core.pretraining import Pretraining
from cim_core.seeding import generator_for, seed_for
from cim_core.task import cim_task
from cim_core.tokenizers.base import Tokenizer
from cim_core.tokenizers.dvae import DiscreteVAE
from cim_core.tokenizers.task import tokenizer_task

OnStep = Callable[[StepReport], None]
CPU = torch.device("cpu")

_STEP = re.compile(r"step-(\d+)")


def train_tokenizer(
    images: str | Path,
    model: TokenizerConfig,
    training: TrainingConfig,
    *,
    checkpoints: Path | None = None,
    on_step: OnStep | None = None,
    device: torch.device = CPU,
) -> DiscreteVAE:
    """A tokenizer trained on `images` (a folder, a tar, or a pattern of tars), frozen, in eval mode.

    Raises:
        DataError, ConfigError: the images or the settings do not serve.
        NonFiniteError: the loss is no longer finite.
        CheckpointMismatchError: `checkpoints` belong to another run.
    """
    seed = training.seed
    views = ViewConfig(image_size=model.image_size, crop_min=training.crop_min, seed=seed)
    vae = DiscreteVAE(model, generator=generator_for(seed, "init", "tokenizer")).to(device)
    keeper = _Keeper(
        checkpoints, on_step, settings={"model": asdict(model)}, asynchronous=training.async_checkpoints
    )
    _train(vae, tokenizer_task(vae, seed=seed), ImageDataset(scan(images), views), training, keeper, device)
    return vae.eval().requires_grad_(requires_grad=False)


def pretrain(
    images: str | Path,
    model: ModelConfig,
    training: TrainingConfig,
    *,
    tokenizer: Tokenizer | None = None,
    checkpoints: Path | None = None,
    on_step: OnStep | None = None,
    device: torch.device = CPU,
) -> Pretraining:
    """A model pre-trained on `images`; `cim_core.export.export_encoder` takes the encoder out of it.

    `tokenizer` is the frozen one of methods `cim` and `beit`. Raises as `train_tokenizer`, and ModelError
    where the encoder cannot serve.
    """
    seed = training.seed
    built = build_model(model, tokenizer, seed=seed_for(seed, "init", "cim")).to(device)
    views = ViewConfig(
        image_size=model.image_size, token_size=built.token_size, crop_min=training.crop_min, seed=seed
    )
    keeper = _Keeper(
        checkpoints,
        on_step,
        settings={"model": asdict(built.config)},
        asynchronous=training.async_checkpoints,
    )
    _train(built, cim_task(built, seed=seed), ImageDataset(scan(images), views), training, keeper, device)
    return built


class _Keeper(NoCallbacks):
    """Saves the state while training goes on, and finds the newest one again."""

    def __init__(
        self,
        folder: Path | None,
        on_step: OnStep | None,
        *,
        settings: Mapping[str, Any],
        asynchronous: bool,
    ) -> None:
        self._folder, self._on_step = folder, on_step
        self.settings = dict(settings)
        self.background = Background(enabled=asynchronous)

    def on_step(self, report: StepReport) -> None:
        if self._on_step is not None:
            self._on_step(report)

    def on_checkpoint(self, state: TrainState, step: int) -> None:
        if self._folder is None:
            return
        target = self._folder / f"step-{step}"
        self.background.wait()  # at most one copy takes room
        snapshot = take_snapshot(state, fingerprint=self.settings)
        self.background.do(lambda: self._replace(snapshot, target))

    def should_stop(self) -> bool:
        self.background.check()
        return False

    def _replace(self, snapshot: Snapshot, target: Path) -> None:
        older = self._kept()
        snapshot.write(target)
        for folder in older.values():
            shutil.rmtree(folder)

    def resume(self, state: TrainState) -> None:
        """Load the newest complete checkpoint, if there is one."""
        kept = self._kept()
        if kept:
            load_state(state, kept[max(kept)], fingerprint=self.settings)

    def _kept(self) -> dict[int, Path]:
        """Complete checkpoints by step."""
        if self._folder is None or not self._folder.exists():
            return {}
        named = ((_STEP.fullmatch(path.name), path) for path in self._folder.iterdir())
        return {int(name[1]): path for name, path in named if name and is_complete(path)}


def _train(
    model: nn.Module,
    task: Task[Views],
    dataset: ImageDataset,
    training: TrainingConfig,
    keeper: _Keeper,
    device: torch.device,
) -> None:
    training = with_precision(training, device)
    kept = {key: value for key, value in asdict(training).items() if key not in FREE_ON_RESUME}
    keeper.settings |= {"training": kept, "num_images": len(dataset)}
    accelerate(model, training, device)
    state = TrainState(model=model.train(), optimizer=build_optimizer(model, training))
    keeper.resume(state)
    loader = ImageLoader(
        dataset,
        batch_size=training.batch_size,
        accumulation=training.accumulation,
        num_workers=training.loader_workers,
        pin=device.type == "cuda",
    )
    course = replace(plan(training, num_images=len(dataset)), sample_steps=frozenset())
    try:
        fit(task, state, loader, course, training, callbacks=keeper, device=device)
        keeper.background.wait()
    finally:
        keeper.background.close()
