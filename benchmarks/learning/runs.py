"""One run after the other: train a method for its seconds, probe what it learned, give the record."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.changes import Changes, changed
from benchmarks.labelled import SameImages
from benchmarks.learning.budget import CLOCKS, num_steps, step_seconds, train
from benchmarks.learning.cases import CASES, Case, model_config, task_of
from benchmarks.learning.finetuning import Length, finetuned
from benchmarks.learning.probing import DecodedMap, MeanOverPositions, Probes, controls, probed
from benchmarks.learning.report import SETTING
from cim_core.config import ModelConfig, TrainingConfig
from cim_core.data.dataset import ImageDataset, ViewConfig, collate
from cim_core.data.sampler import SampleId
from cim_core.diagnostics import NUM_IMAGES, diagnose
from cim_core.methods import build_model
from cim_core.models.enhancer import Enhancer
from cim_core.pretraining import Pretraining
from cim_core.seeding import generator_for
from cim_core.tokenizers.dvae import DiscreteVAE

CONTROLS = ("pixels", "tokenizer-features")
METHODS = (*CONTROLS, *CASES)


@dataclass(frozen=True, kw_only=True)
class Both:
    """The two parts of a configuration, under the names that changes begin with."""

    model: ModelConfig
    training: TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs of one call have in common."""

    images: ImageDataset  # their views do not count
    probes: Probes
    tokenizer: DiscreteVAE
    tokenizer_seconds: float  # that its training took
    tokenizer_facts: Mapping[str, Any]
    image_size: int
    patch_size: int
    training: TrainingConfig
    rate: float | None  # peak of all methods; None: each has its own
    seconds: float
    points: int  # looks at the features during a training
    finetune_length: Length
    finetune_rate: float  # peak, for all methods the same
    finetune_images: ImageDataset
    clock: str = "wall"  # of CLOCKS
    more_probes: bool = False  # no part of what a finished run is known by: the training is the same
    label: str = ""
    changes: Changes = field(default_factory=dict)

    def training_of(self, method: str) -> TrainingConfig:
        """With the learning rate of `method`, one of METHODS."""
        own = CASES[method].learning_rate if method in CASES else self.training.learning_rate
        return dataclasses.replace(self.training, learning_rate=self.rate or own)

    def facts(self, method: str) -> dict[str, Any]:
        """What the record of each run says of them, and what a finished run is known by."""
        training = self.training_of(method)
        return {
            "label": self.label,
            "changes": dict(self.changes),
            "size": [self.image_size, self.patch_size],
            "training": {k: v for k, v in vars(training).items() if k not in ("steps", "seed")},
            "seconds": self.seconds,
            "tokenizer": dict(self.tokenizer_facts),
            "images": len(self.images),
            "labelled": [len(part.index) for part in self.probes.full],
            "finetuning": [self.finetune_length.fact(), len(self.finetune_images), self.finetune_rate],
            "device": str(self.probes.device),
            "clock": self.clock,
            # A method's own model can change from one version of this benchmark to the next.
            "model": digest(self.both(method, seed=0).model) if method in CASES else None,
        }

    def both(self, method: str, *, seed: int) -> Both:
        """The configuration of one run, changes included."""
        model = model_config(CASES[method], image_size=self.image_size, patch_size=self.patch_size)
        both: Both = changed(Both(model=model, training=self.training_of(method)), self.changes)
        return dataclasses.replace(both, training=dataclasses.replace(both.training, seed=seed))

    @property
    def token_size(self) -> int:
        """Pixels a side of what the tokenizer sees."""
        return self.image_size // self.patch_size * self.tokenizer.stride

    def dataset(self, source: ImageDataset, *, seed: int, tokens: bool) -> ImageDataset:
        """Random views of the images of `source`, with the tokenizer's where `tokens` are needed."""
        token_size = self.token_size if tokens else None
        crop_min = self.training.crop_min
        views = ViewConfig(image_size=self.image_size, token_size=token_size, crop_min=crop_min, seed=seed)
        return SameImages(source, views)


def runs(setting: Setting, *, methods: Sequence[str], seeds: int, done: set[str]) -> Iterator[dict[str, Any]]:
    """The record of each run that has none yet, seed after seed."""
    pilots: dict[str, float] = {}
    for seed in range(seeds):
        for method in methods:
            key = {"method": method, "seed": seed, **setting.facts(method)}
            if record_key(key) in done or (method in CONTROLS and seed > 0):
                continue
            found = control(setting, method) if method in CONTROLS else run(setting, method, seed, pilots)
            yield {**key, **found, "torch": torch.__version__}


def record_key(record: Mapping[str, Any]) -> str:
    """What makes a run this one: method, seed, and all that the call had in common."""
    return json.dumps({name: record.get(name) for name in ("method", "seed", *SETTING)}, sort_keys=True)


def digest(model: ModelConfig) -> str:
    """Eight digits that tell two models apart."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(model), sort_keys=True).encode()).hexdigest()[:8]


def control(setting: Setting, method: str) -> dict[str, Any]:
    """Probes on features that no pre-training made."""
    grid = setting.image_size // setting.patch_size
    encoder, side = controls(setting.tokenizer, grid=grid)[method]
    return setting.probes.all(encoder, image_size=side, seed=0)


def run(setting: Setting, method: str, seed: int, pilots: dict[str, float]) -> dict[str, Any]:
    """Train (or not) and measure. `pilots` keeps the seconds of a step for the other seeds."""
    case, device = CASES[method], setting.probes.device
    both = setting.both(method, seed=seed)
    dataset = setting.dataset(setting.images, seed=seed, tokens=case.needs_tokenizer)
    tokenizer = setting.tokenizer if case.needs_tokenizer else None
    found: dict[str, Any] = {}

    def made() -> Pretraining:
        return build_model(both.model, tokenizer, seed=seed).to(device)

    model = made()
    if case.trains:
        if method not in pilots:
            pilot = made()
            task = task_of(case, pilot, seed=seed)
            clock = CLOCKS[setting.clock]
            pilots[method] = step_seconds(pilot, task, dataset, both.training, device=device, clock=clock)
        found |= _trained(setting, case, model, both, dataset, step=pilots[method])
    enhancer = model.enhancer
    size, more = setting.image_size, setting.more_probes
    decoded = DecodedMap(enhancer, setting.tokenizer, token_size=setting.token_size) if more else None
    found |= probed(setting.probes, enhancer, dataset, image_size=size, seed=seed, decoded=decoded)
    found |= _diagnosed(model, dataset, seed=seed)
    if setting.finetune_length:
        found |= _finetuned(setting, both, enhancer, seed=seed)
    return found


def _trained(
    setting: Setting, case: Case, model: Pretraining, both: Both, dataset: ImageDataset, *, step: float
) -> dict[str, Any]:
    seconds = setting.seconds + (setting.tokenizer_seconds if case.adds_tokenizer_seconds else 0)
    steps = num_steps(seconds, step)
    training = dataclasses.replace(both.training, steps=steps, epochs=None, images=None)
    encoder = MeanOverPositions(model.enhancer)
    course = train(
        model,
        task_of(case, model, seed=training.seed),
        dataset,
        training,
        look=lambda: {"knn": setting.probes.knn(encoder, image_size=setting.image_size)},
        points=setting.points,
        device=setting.probes.device,
        clock=CLOCKS[setting.clock],
    )
    return {
        "steps": steps,
        "images_seen": steps * training.batch_size,
        "train_seconds": course.seconds(),
        "pilot_step_seconds": step,
        "curve": course.curve,
        "metrics": course.metrics(),
    }


def _diagnosed(model: Pretraining, dataset: ImageDataset, *, seed: int) -> dict[str, float]:
    views = collate([dataset[SampleId(0, place)] for place in range(min(NUM_IMAGES, len(dataset)))])
    device = next(model.parameters()).device
    looked = generator_for(seed, "learning", "diagnostics")
    return diagnose(model, views.to(device), generator=looked)


def _finetuned(setting: Setting, both: Both, enhancer: Enhancer, *, seed: int) -> dict[str, float]:
    train_set = setting.dataset(setting.finetune_images, seed=seed, tokens=False)
    val_set = setting.probes.full[1].of(setting.image_size)
    batch = min(both.training.batch_size, len(train_set))
    training = dataclasses.replace(both.training, batch_size=batch, learning_rate=setting.finetune_rate)
    return finetuned(
        enhancer,
        train_set,
        val_set,
        training,
        length=setting.finetune_length,
        device=setting.probes.device,
        clock=CLOCKS[setting.clock],
    )
