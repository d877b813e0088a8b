"""What training a tokenizer and pre-training have in common: state, ranks, resume, loop, result."""

import dataclasses
import logging
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cim_core.config import TrainingConfig
from cim_core.data.dataset import ImageDataset, Views, collate
from cim_core.data.loading import ImageLoader
from cim_core.data.sampler import SampleId
from cim_core.durations import AnyOf, Plan
from cim_core.engine.acceleration import accelerate
from cim_core.engine.background import Background
from cim_core.engine.fit import fit
from cim_core.engine.precision import with_precision
from cim_core.engine.state import TrainState
from cim_core.engine.step import Task
from cim_core.optim import build_optimizer
from cim_core.seeding import generator_for
from service.contracts.specs import EvaluateSpec
from workers.attempt import Outcome
from workers.callbacks import Picture, Probe, RankCallbacks
from workers.checkpointing import CheckpointWriter, fetch, restore
from workers.data import fingerprint
from workers.rank import Rank
from workers.results import earlier_files, put_json, result_document

log = logging.getLogger(__name__)

NUM_PICTURES = 8


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training, ready to run; the model is on the rank's device and not wrapped."""

    model: nn.Module
    task: Callable[[nn.Module], Task[Views]]  # of the model, wrapped or not
    dataset: ImageDataset
    picture: Picture
    probe: Probe | None = None
    probe_steps: Container[int] = ()
    diagnose: Probe | None = None  # on rank 0 alone, with each picture


def train(rank: Rank, training: Training) -> Outcome:
    """Train from the start or from the attempt's checkpoint, to the end or until asked to stop.

    Raises:
        NonFiniteError, CheckpointMismatchError, ConfigError: see the parts.
        AttemptStaleError, StaleAttempt: a newer attempt owns the job.
        StoreError: a checkpoint or picture cannot be stored.
    """
    config, plan = config_of(rank), plan_of(rank)
    log.info("%d steps in %s", plan.total_steps, config.precision)
    accelerate(training.model, config, rank.device)
    state = TrainState(model=training.model, optimizer=build_optimizer(training.model, config))
    callbacks = RankCallbacks(
        rank=rank,
        writer=CheckpointWriter(rank.store, rank.service, fingerprint=_fingerprint(rank)),
        picture=training.picture,
        probe=training.probe,
        probe_steps=training.probe_steps,
        diagnose=training.diagnose,
        latest=_resume(rank, state),
        background=Background(enabled=config.async_checkpoints),
    )
    module = _wrapped(training.model, rank)
    with callbacks.finishing():
        result = fit(
            training.task(module),
            state,
            _loader(rank, training.dataset),
            dataclasses.replace(plan, sample_steps=AnyOf((plan.sample_steps, training.probe_steps))),
            config,
            callbacks=callbacks,
            device=rank.device,
            no_sync=module.no_sync if isinstance(module, DistributedDataParallel) else None,
        )
    return Outcome(
        stopped=result.stopped,
        step=result.step,
        total_steps=plan.total_steps,
        metrics=callbacks.latest,
        files=rank.files,
    )


def conclude(rank: Rank, outcome: Outcome) -> Outcome:
    """Write result.json, the last file of a job that succeeded. On rank 0."""
    rank.say("writing the result")
    files = [*outcome.files, *earlier_files(rank.store, "samples", outcome.files)]
    document = result_document(
        rank.attempt.assignment,
        step=outcome.step,
        metrics=outcome.metrics,
        files=files,
        warnings=outcome.warnings,
    )
    files.append(put_json(rank.store, "result.json", document))
    rank.reporter.flush()
    return dataclasses.replace(outcome, files=files)


def config_of(rank: Rank) -> TrainingConfig:
    """The training section of the spec, its precision decided by this rank's device."""
    spec = rank.attempt.spec
    assert not isinstance(spec, EvaluateSpec), "an evaluation trains nothing"
    return with_precision(spec.training, rank.device)


def plan_of(rank: Rank) -> Plan:
    """The training's course in steps."""
    assert rank.work.plan is not None, "a training has a plan"
    return rank.work.plan


def fixed_views(
    dataset: ImageDataset, *, seed: int, device: torch.device, count: int = NUM_PICTURES
) -> Views:
    """`count` images at most for pictures, the same ones in every attempt and at every step."""
    order = torch.randperm(len(dataset), generator=generator_for(seed, "pictures")).tolist()
    views = collate([dataset[SampleId(0, place)] for place in order[:count]])
    return views.to(device)


def _resume(rank: Rank, state: TrainState) -> dict[str, float]:
    """Load the checkpoint of the assignment, if any; the latest metrics at its step."""
    checkpoint = rank.attempt.assignment.checkpoint
    if checkpoint is None:
        return {}
    rank.say(f"resuming from step {checkpoint.step}")
    folder = fetch(checkpoint, rank.store, rank.attempt.cache)
    metrics = restore(state, folder, fingerprint=_fingerprint(rank))
    log.info("resumed from step %d", state.step)
    return metrics


def _fingerprint(rank: Rank) -> dict[str, Any]:
    """What a checkpoint must share with this attempt; a precision left open is the one in use."""
    made = fingerprint(rank.work)
    return {**made, "training": {**made["training"], "precision": config_of(rank).precision}}


def _wrapped(model: nn.Module, rank: Rank) -> nn.Module:
    """`model` with gradients averaged over the ranks; its buffers are rank 0's at each step."""
    if rank.world_size == 1:
        return model
    return DistributedDataParallel(model)


def _loader(rank: Rank, dataset: ImageDataset) -> ImageLoader:
    config = config_of(rank)
    return ImageLoader(
        dataset,
        batch_size=config.batch_size,
        accumulation=config.accumulation,
        rank=rank.number,
        world_size=rank.world_size,
        num_workers=config.loader_workers,
        pin=rank.device.type == "cuda",
    )
