"""The open choices of the method, each changed alone on a small model and real images.

Needs only the core (torch, timm): images and labelled sets as tar files or folders, a trained tokenizer
as a folder. One JSON line for each run is added to --out as soon as it is done, and a run that has its
line is not done again, so the command can be stopped and given again. Example:

    python -m benchmarks.choices --images train.tar --tokenizer tokenizer/ --train train.tar --val val.tar

Columns: losses are means over the last tenth of the steps. `vs constant` is the enhancer's loss beside
that of the best answer that ignores the image, which can be compared where losses cannot. `gradients`
is the norm of the gradient of weight x enhancer loss on shared layers, beside that of the generator's.
`untrained` is the encoder before its first step. Judge a choice by the spread of its own seeds: the
table shows medians, and the k-NN accuracy of every seed.

A step of 32 images takes about half a second of one AVX2 core, so a run of 150 steps a good minute.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.changes import Changes, changed
from benchmarks.labelled import Labelled
from benchmarks.records import append, read
from cim_core.cim import CIM, StepOutput, build_cim
from cim_core.config import (
    EnhancerConfig,
    GeneratorConfig,
    ModelConfig,
    ObjectiveConfig,
    TokenizerSource,
    TrainingConfig,
)
from cim_core.data.dataset import ImageDataset, ViewConfig, Views
from cim_core.data.index import Index, scan
from cim_core.data.loading import ImageLoader
from cim_core.diagnostics import shared_gradients
from cim_core.durations import plan
from cim_core.engine.state import TrainState
from cim_core.engine.step import train_step
from cim_core.evaluation.features import extract
from cim_core.evaluation.knn import weighted_knn
from cim_core.objectives.respix import Respix
from cim_core.optim import build_optimizer
from cim_core.seeding import generator_for
from cim_core.task import cim_task
from cim_core.tokenizers.base import Tokenizer
from cim_core.tokenizers.store import load_tokenizer

CPU = torch.device("cpu")
VIT = EnhancerConfig(
    name="vit_tiny_patch16_224", options={"depth": 4, "embed_dim": 128, "num_heads": 4}, shared_blocks=2
)
RESNET = EnhancerConfig(name="resnet18", shared_blocks=0)
UNTRAINED = "untrained"

REVDET: Changes = {"model.objective.name": "revdet", "model.objective.weight": 1.0}
RESNET_REVDET: Changes = {**REVDET, "model.enhancer": RESNET, "model.generator.width": 128}
RESNET50_REVDET: Changes = {**RESNET_REVDET, "model.enhancer": dataclasses.replace(RESNET, name="resnet50")}
UNSHARED: Changes = {"model.enhancer.shared_blocks": 0}

# What each variant changes of the default. Relative positions share nothing: compare them with `sharing 0`.
# Layer scale is on the generator's own blocks, so on two of its four where two are shared.
VARIANTS: Mapping[str, Changes] = {
    UNTRAINED: {},
    "default": {},
    "interpolation bilinear": {"model.interpolation": "bilinear"},
    "count fixed": {"model.masking.min_ratio": 0.56, "model.masking.max_ratio": 0.56},
    "masks in blocks": {"model.masking.strategy": "block", "model.masking.block_min_cells": 4},
    "depth 2": {"model.generator.depth": 2},
    "depth 6": {"model.generator.depth": 6},
    "sharing 0": UNSHARED,
    "relative, sharing 0": {**UNSHARED, "model.generator.positions": "relative"},
    "layer scale 0.1": {"model.generator.layer_scale": 0.1},
    "relative, layer scale 0.1, sharing 0": {
        **UNSHARED,
        "model.generator.positions": "relative",
        "model.generator.layer_scale": 0.1,
    },
    "window 7": {"model.objective.window": 7},
    "window 9": {"model.objective.window": 9},
    "window 16": {"model.objective.window": 16},
    "by patch 8": {"model.objective.normalise": "patch"},
    "by patch 16": {"model.objective.normalise": "patch", "model.objective.window": 16},
    "not normalised": {"model.objective.normalise": "none"},
    "l1 only": {"model.objective.l2": 0.0},
    "l2 only": {"model.objective.l1": 0.0},
    "weight 1": {"model.objective.weight": 1.0},
    "weight 5": {"model.objective.weight": 5.0},
    "beta2 0.999": {"training.beta2": 0.999},
    "average 0.99": {"model.enhancer.ema_decay": 0.99},
    "revdet": REVDET,
    "revdet, sharing 0": {**REVDET, **UNSHARED},
    "revdet, weight 5": {**REVDET, "model.objective.weight": 5.0},
    "revdet, weight 10": {**REVDET, "model.objective.weight": 10.0},
    "resnet18 revdet": RESNET_REVDET,
    "resnet18 revdet bilinear": {**RESNET_REVDET, "model.objective.upsample": "bilinear"},
    "resnet50 revdet": RESNET50_REVDET,
    "resnet50 revdet bilinear": {**RESNET50_REVDET, "model.objective.upsample": "bilinear"},
}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all runs of one call have in common."""

    images: Index
    labelled: tuple[Labelled, Labelled]  # votes, is classified
    tokenizer: Tokenizer
    model: ModelConfig
    training: TrainingConfig

    def facts(self) -> dict[str, Any]:
        """What the record of each run says of them."""
        return {
            "model": dataclasses.asdict(self.model),
            "training": dataclasses.asdict(self.training),
            "images": len(self.images),
            "labelled": [len(labelled.index) for labelled in self.labelled],
            "tokens": [self.tokenizer.vocab_size, self.tokenizer.stride],
        }

    def variants(self) -> Mapping[str, Changes]:
        """All variants that can differ with this tokenizer."""
        side = self.model.grid * self.tokenizer.stride
        if side == self.model.image_size:
            return {name: changes for name, changes in VARIANTS.items() if "interpolation" not in name}
        smaller = {"model.image_size": side, "model.patch_size": self.tokenizer.stride}
        return {**VARIANTS, f"not enlarged, {side} px": smaller}


@dataclass(frozen=True, kw_only=True)
class Both:
    """The two parts of a configuration, under the names that `Changes` begin with."""

    model: ModelConfig
    training: TrainingConfig


def run(
    setup: Setup, changes: Changes, *, seed: int, train: bool, batches: Sequence[Views]
) -> dict[str, Any]:
    """Train one variant and measure it."""
    both = changed(Both(model=setup.model, training=setup.training), changes)
    cim = build_cim(both.model, setup.tokenizer, seed=seed)
    begun = time.perf_counter()
    measured: dict[str, float | None] = {}
    if train:
        measured = trained(cim, both.training, batches, seed=seed, num_images=len(setup.images))
        seconds = time.perf_counter() - begun
        measured |= {**judged(cim, batches[-1], seed=seed), "s_per_step": seconds / len(batches)}
    return {**measured, "knn": neighbours(cim, setup.labelled), "seconds": time.perf_counter() - begun}


def trained(
    cim: CIM, training: TrainingConfig, batches: Sequence[Views], *, seed: int, num_images: int
) -> dict[str, float | None]:
    """Train `cim`; means over the last tenth of the steps."""
    training = dataclasses.replace(training, seed=seed)
    course = plan(training, num_images=num_images)
    state = TrainState(model=cim.train(), optimizer=build_optimizer(cim, training))
    task = cim_task(cim, seed=seed)
    last: list[Mapping[str, Tensor]] = []
    for step, batch in enumerate(batches):
        result = train_step(task, state, batch, plan=course, training=training, device=CPU)
        if step + 1 > 0.9 * len(batches):
            last.append(result.metrics)
    names = ("mim_loss", "mim_accuracy", "enhancer_loss", "revdet_balanced_accuracy")
    return {
        name: statistics.fmean(float(metrics[name]) for metrics in last) for name in names if name in last[0]
    }


def judged(cim: CIM, batch: Views, *, seed: int) -> dict[str, float | None]:
    """What the last batch tells of the trained model: loss beside a constant's, gradients' ratio."""
    with torch.no_grad():
        output: StepOutput = cim(batch, generator=generator_for(seed, "bench", "judged"))
    beside = float(output.losses[cim.objective_name] / constant_loss(cim, output))
    norms = shared_gradients(cim, batch, generator=generator_for(seed, "bench", "judged"))
    ratio = norms["gradient_enhancer"] / norms["gradient_generator"] if norms else None
    return {"vs_constant": beside, "gradient_ratio": ratio}


def constant_loss(cim: CIM, output: StepOutput) -> Tensor:
    """The loss of one answer for all pixels (the target's mean) or positions (the rate of replaced ones)."""
    if isinstance(cim.objective, Respix):
        target = cim.objective.target(output.clean_B3HW)
        difference = target - target.mean()
        return cim.objective.l1 * difference.abs().mean() + cim.objective.l2 * difference.square().mean()
    rate = output.replaced_BN.float().mean()
    return torch.nn.functional.binary_cross_entropy(rate, rate)


def neighbours(cim: CIM, labelled: tuple[Labelled, Labelled]) -> float:
    """Weighted k-NN accuracy of the encoder's pooled features."""
    features: list[Tensor] = []
    for part in labelled:
        features += extract(cim.encoder, part.of(cim.config.image_size), batch_size=64, device=CPU)
    return weighted_knn(*features, num_classes=len(labelled[0].index.classes))


class Batches:
    """The batches of one seed, decoded once for all variants that look at images of one size."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._kept: tuple[object, list[Views]] | None = None

    def of(self, changes: Changes, *, seed: int) -> list[Views]:
        """Every batch of the training."""
        both = changed(Both(model=self._setup.model, training=self._setup.training), changes)
        key = (seed, both.model.image_size, both.model.grid)
        if self._kept is None or self._kept[0] != key:
            self._kept = None
            self._kept = (key, self._made(both, seed=seed))
        return self._kept[1]

    def _made(self, both: Both, *, seed: int) -> list[Views]:
        views = ViewConfig(
            image_size=both.model.image_size,
            token_size=both.model.grid * self._setup.tokenizer.stride,
            crop_min=both.training.crop_min,
            seed=seed,
        )
        dataset = ImageDataset(self._setup.images, views, cache_bytes=2**30)
        loader = ImageLoader(dataset, batch_size=both.training.batch_size)
        steps = plan(both.training, num_images=len(dataset)).total_steps
        return list(loader.steps(0, steps))


def runs(setup: Setup, *, seeds: int, only: Sequence[str], done: set[str]) -> Iterator[dict[str, Any]]:
    """The record of each run that has none yet, seed after seed."""
    common = setup.facts()
    batches = Batches(setup)
    for seed in range(seeds):
        for name, changes in setup.variants().items():
            key = {"variant": name, "seed": seed}
            if (only and name not in only) or record_key({**key, **common}) in done:
                continue
            train = name != UNTRAINED
            made = batches.of(changes, seed=seed) if train else []
            yield {**key, **run(setup, changes, seed=seed, train=train, batches=made), **common}


def record_key(record: Mapping[str, Any]) -> str:
    """What makes a run this one: the variant, the seed, and all that the call had in common."""
    names = ("variant", "seed", "model", "training", "images", "labelled", "tokens")
    return json.dumps([record[name] for name in names], sort_keys=True)


COLUMNS = {
    "mim_loss": "generator loss",
    "mim_accuracy": "right, %",
    "enhancer_loss": "enhancer loss",
    "vs_constant": "vs constant",
    "gradient_ratio": "gradients",
    "knn": "k-NN, %",
    "s_per_step": "s a step",
}


def show(records: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each variant: medians over its seeds, and each seed's k-NN."""
    table = Table(title="medians over seeds")
    for header in ("variant", *COLUMNS.values(), "k-NN of each seed, %"):
        table.add_column(header, justify="left" if header == "variant" else "right")
    for name in dict.fromkeys(record["variant"] for record in records):
        same = [record for record in records if record["variant"] == name]
        cells = [
            cell(key, [record[key] for record in same if record.get(key) is not None]) for key in COLUMNS
        ]
        each = " ".join(f"{100 * record['knn']:.1f}" for record in same)
        table.add_row(name, *cells, each)
    return table


def cell(key: str, values: Sequence[float]) -> str:
    """The median, in per cent where the column says so."""
    if not values:
        return ""
    median = statistics.median(values)
    return f"{100 * median:.1f}" if "%" in COLUMNS[key] else f"{median:.3f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="tar or folder to train on")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer job")
    parser.add_argument("--train", type=Path, required=True, help="labelled images that vote")
    parser.add_argument("--val", type=Path, required=True, help="labelled images that are classified")
    parser.add_argument("--most", type=int, default=1500, help="labelled images of each set, at most")
    parser.add_argument("--out", type=Path, default=Path("choices.jsonl"))
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--patch", type=int, default=8, help="pixels a token position")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--only", action="append", default=[], help="a variant's name; may be repeated")
    parser.add_argument("--json", action="store_true", help="print the new JSON lines instead of a table")
    return parser.parse_args()


def setup_of(given: argparse.Namespace) -> Setup:
    model = ModelConfig(
        tokenizer=TokenizerSource(source=given.tokenizer.name),
        enhancer=VIT,
        generator=GeneratorConfig(),
        objective=ObjectiveConfig(name="respix", weight=10.0),
        image_size=given.size,
        patch_size=given.patch,
    )
    training = TrainingConfig(
        steps=given.steps,
        batch_size=given.batch,
        learning_rate=given.rate,
        crop_min=0.3,
        precision=given.precision,
    )
    return Setup(
        images=scan(given.images),
        labelled=(Labelled(scan(given.train), given.most), Labelled(scan(given.val), given.most)),
        tokenizer=load_tokenizer(given.tokenizer),
        model=model,
        training=training,
    )


def main() -> None:
    """Do the runs that are missing, and print."""
    given = arguments()
    torch.set_num_threads(given.threads)
    setup = setup_of(given)
    if unknown := set(given.only) - set(setup.variants()):
        raise SystemExit(f"--only: no variant {sorted(unknown)}; there are {list(setup.variants())}")
    done = {record_key(record) for record in read(given.out)}
    for record in runs(setup, seeds=given.seeds, only=given.only, done=done):
        line = json.dumps(record)
        append(given.out, record)
        print(
            line if given.json else f"{record['variant']}, seed {record['seed']}: {record['seconds']:.0f} s"
        )
    if not given.json:
        facts = setup.facts()
        same = [record for record in read(given.out) if facts.items() <= record.items()]
        Console(width=160).print(show(same))


if __name__ == "__main__":
    main()
