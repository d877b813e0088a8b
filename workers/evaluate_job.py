"""`kind: evaluate`: k-NN accuracy of an encoder, beside the same network with random weights."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from cim_core.errors import ModelError
from cim_core.evaluation.features import evaluating, pooled
from cim_core.seeding import seed_for
from service.contracts.jobs import Progress
from service.contracts.specs import EvaluateSpec, Knn
from workers.attempt import Outcome
from workers.neighbours import Features, Labelled, measure
from workers.rank import Rank
from workers.results import put_json, result_document

log = logging.getLogger(__name__)

MOST_SIDE = 16_384  # pixels
TRAINED, RANDOM = "cim", "random"


def run_evaluate(rank: Rank) -> Outcome:
    """Measure each task on each encoder; rank 0 leaves result.json with the table.

    Raises:
        ModelError: timm cannot load the encoder.
        DataError: fewer labelled images than neighbours.
    """
    spec = spec_of(rank)
    rows: list[dict[str, Any]] = []
    encoders = _encoders(rank)
    for done, (name, make) in enumerate(encoders.items()):
        _show(rank, done, len(encoders), f"extracting features, {name} encoder")
        encoder = make()
        labelled = Labelled.of(rank, train="train", val="val", image_size=input_side(encoder))
        features = labelled.features(rank, encoder, batch_size=spec.batch_size)
        rows += _rows(name, features, spec.tasks)
    metrics = {metric_name(row, spec.tasks): row["value"] for row in rows}
    outcome = Outcome(
        stopped=False, step=len(encoders), total_steps=len(encoders), metrics=metrics, files=rank.files
    )
    return _finish(rank, outcome, rows) if rank.leads else outcome


def spec_of(rank: Rank) -> EvaluateSpec:
    """The spec, which is an evaluation's."""
    spec = rank.attempt.spec
    assert isinstance(spec, EvaluateSpec), f"not an evaluate job: {spec.kind}"
    return spec


def metric_name(row: dict[str, Any], tasks: list[Knn]) -> str:
    """`knn_top1`, `knn_top1_random` for random weights; settings are named where there are several tasks."""
    settings = f"_k{row['k']}_t{row['temperature']:g}" if len(tasks) > 1 else ""
    return f"{row['task']}{settings}_{row['metric']}" + (f"_{RANDOM}" if row["encoder"] == RANDOM else "")


def load_encoder(folder: Path) -> nn.Module:
    """The network in `folder` as plain timm loads it; it has made a vector of a picture.

    Raises `ModelError`.
    """
    try:
        _check_weights(folder)
        encoder: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
        _check_features(encoder)
    except Exception as error:  # timm has no error class of its own: missing files, unknown names, shapes
        raise ModelError(
            f"encoder: timm cannot load {folder} ({type(error).__name__}: {error}); point it at the "
            "`encoder` folder of a pretrain job"
        ) from error
    return encoder


def input_side(encoder: nn.Module) -> int:
    """Pixels a side of the pictures that an encoder takes. Raises ValueError where it says nothing sound."""
    side = timm.data.resolve_model_data_config(encoder)["input_size"][-1]
    if not isinstance(side, int) or not 1 <= side <= MOST_SIDE:
        raise ValueError(f"input_size must be 1 to {MOST_SIDE} pixels, got {side!r}")
    return side


def _check_weights(folder: Path) -> None:
    """Raise ValueError where the file is too small for the network: it would be made, and take its memory."""
    with torch.device("meta"):
        network = timm.create_model(f"local-dir:{folder}", pretrained=False)
    needed = sum(parameter.numel() for parameter in network.parameters())
    weights = folder / "model.safetensors"
    if weights.is_file() and weights.stat().st_size < needed:  # a number takes a byte at least
        raise ValueError(f"{weights.name} is too small for the {needed} weights that config.json asks for")


@torch.no_grad()
def _check_features(encoder: nn.Module) -> None:
    side = input_side(encoder)
    with evaluating(encoder):
        features = pooled(encoder, torch.zeros(1, 3, side, side))
    if features.dim() != 2:
        raise ValueError(f"it makes no vector of a picture, but {list(features.shape[1:])}: is it pooled?")


def random_encoder(folder: Path, *, seed: int) -> nn.Module:
    """The architecture in `folder` with weights that are a function of `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "init", "random-encoder"))
        encoder: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=False)
    return encoder


def _encoders(rank: Rank) -> dict[str, Callable[[], nn.Module]]:
    spec = spec_of(rank)
    rank.say("fetching the encoder")
    cache = rank.attempt.downloads
    folder = cache.artifact(rank.attempt.assignment.inputs.get("encoder", spec.encoder))
    encoders: dict[str, Callable[[], nn.Module]] = {TRAINED: lambda: load_encoder(folder)}
    if spec.compare_random:
        encoders[RANDOM] = lambda: random_encoder(folder, seed=spec.seed)
    return encoders


def _rows(encoder: str, features: Features, tasks: list[Knn]) -> Iterator[dict[str, Any]]:
    for task in tasks:
        yield {
            "encoder": encoder,
            "task": task.name,
            "metric": "top1",
            "value": measure(features, k=task.k, temperature=task.temperature),
            "k": task.k,
            "temperature": task.temperature,
            "train_images": len(features.train[1]),
            "val_images": len(features.val[1]),
            "classes": features.num_classes,
        }


def _show(rank: Rank, done: int, total: int, message: str) -> None:
    rank.reporter.check()
    rank.reporter.progress(Progress(step=done, total_steps=total, message=message))


def _finish(rank: Rank, outcome: Outcome, rows: list[dict[str, Any]]) -> Outcome:
    for row in rows:
        log.info("%(encoder)s %(task)s %(metric)s: %(value).4f", row)
    rank.reporter.metrics(outcome.step, outcome.metrics)
    _show(rank, outcome.step, outcome.step, "writing the result")
    document = result_document(
        rank.attempt.assignment, step=outcome.step, metrics=outcome.metrics, files=outcome.files, table=rows
    )
    files = [*outcome.files, put_json(rank.store, "result.json", document)]
    rank.reporter.flush()
    return dataclasses.replace(outcome, files=files)
