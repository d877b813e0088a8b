"""The estimate of memory against real steps watched by torch's profiler, and the growth of a process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cim_core.cim import build_cim
from cim_core.config import (
    EnhancerConfig,
    ModelConfig,
    TrainingConfig,
)
from cim_core.data.dataset import Views
from cim_core.durations import plan
from cim_core.engine.background import Background as Background  # for the child process
from cim_core.engine.state import TrainState, take_snapshot
from cim_core.engine.step import Task, train_step
from cim_core.estimate.cost import Cost, pretrain_cost, tokenizer_cost
from cim_core.estimate.dry_run import dry_run
from cim_core.optim import build_optimizer
from cim_core.task import cim_task
from cim_core.tokenizers.dvae import DiscreteVAE
from cim_core.tokenizers.task import tokenizer_task
from tests.unit.cim_core.test_estimate import SMALL_TOKENIZER, model, training

CPU = torch.device("cpu")


def views(image_size: int, token_size: int, num_images: int) -> Views:
    def pixels(side: int) -> torch.Tensor:
        return torch.zeros(num_images, 3, side, side, dtype=torch.uint8)

    ids = torch.zeros(num_images, 2, dtype=torch.int64)
    return Views(pixels_B3HW=pixels(image_size), token_pixels_B3HW=pixels(token_size), ids_B2=ids)


def measured_peak(
    module: nn.Module, task: Task[Views], batch: Callable[[], Views], config: TrainingConfig
) -> int:
    """Bytes that a real step allocates at most; the optimizer's state is there before."""
    state = TrainState(model=module, optimizer=build_optimizer(module, config))
    course = plan(config, num_images=config.batch_size)

    def step() -> None:
        train_step(task, state, batch(), plan=course, training=config, device=CPU)
        state.optimizer.zero_grad(set_to_none=True)

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    result = watched.profiler.kineto_results if watched.profiler else None
    assert result is not None
    changes = sorted((e.start_ns(), e.nbytes()) for e in result.events() if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    assert peak > 0
    return peak


def in_a_step(cost: Cost) -> int:
    memory = cost.memory_per_worker
    beside = memory.tokenizer_bytes + memory.snapshot_bytes
    return memory.peak_bytes - memory.model_bytes - memory.optimizer_bytes - beside


@pytest.mark.parametrize(
    ("name", "objective", "changes", "tolerance"),
    [
        ("vit_tiny_patch16_224", "respix", {"batch_size": 8}, 0.01),
        # A CPU without bf16 unfolds the tokenizer's images for its convolutions, which takes room.
        ("vit_tiny_patch16_224", "revdet", {"batch_size": 8, "precision": "bf16"}, 0.2),
        ("vit_tiny_patch16_224", "respix", {"batch_size": 16, "accumulation": 4, "clip_norm": 0.0}, 0.01),
        # A convolution copies its weights in passing; in ResNets that is much beside few images.
        ("resnet18", "respix", {"batch_size": 16}, 0.1),
        ("resnet18", "revdet", {"batch_size": 1}, 0.1),  # more gradients than activations
    ],
)
def test_memory__is_that_of_a_real_step(
    name: str, objective: Literal["respix", "revdet"], changes: dict[str, Any], tolerance: float
) -> None:
    config = model(name, objective, image_size=64, patch_size=8)
    if name == "resnet18":
        config = replace(config, image_size=128, patch_size=16)
    course = training(**changes)
    cost = pretrain_cost(config, course, tokenizer=SMALL_TOKENIZER)
    cim = build_cim(config, DiscreteVAE(SMALL_TOKENIZER, generator=torch.Generator()))
    measured = measured_peak(
        cim, cim_task(cim, seed=0), lambda: views(config.image_size, 64, course.batch_size), course
    )
    assert in_a_step(cost) == pytest.approx(measured, rel=tolerance)
    stored = [*cim.parameters(), *cim.buffers()]
    assert cost.memory_per_worker.model_bytes == sum(x.numel() * x.element_size() for x in stored)


@pytest.mark.parametrize("quantiser", ["vq", "relaxed"])
def test_memory__of_a_tokenizers_real_step(quantiser: Literal["vq", "relaxed"]) -> None:
    config, course = replace(SMALL_TOKENIZER, quantiser=quantiser), training(batch_size=32)
    cost = tokenizer_cost(config, course)
    tokenizer = DiscreteVAE(config, generator=torch.Generator())
    task = tokenizer_task(tokenizer, seed=0)
    measured = measured_peak(tokenizer, task, lambda: views(32, 0, course.batch_size), course)
    assert in_a_step(cost) == pytest.approx(measured, rel=0.05)


def test_memory__parts_add_up() -> None:
    config = replace(model("resnet18"), image_size=128)
    memory = pretrain_cost(config, training(), tokenizer=SMALL_TOKENIZER).memory_per_worker
    trained = memory.gradients_bytes
    assert memory.optimizer_bytes == pytest.approx(2 * trained, rel=0.001)  # two means a weight
    assert memory.model_bytes == pytest.approx(trained, rel=0.01)  # and the norms' statistics
    fixed = memory.model_bytes + memory.tokenizer_bytes + memory.optimizer_bytes + memory.snapshot_bytes
    assert fixed + trained < memory.peak_bytes <= fixed + trained + memory.activations_bytes


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_memory__a_snapshot_is_all_that_a_checkpoint_copies(name: str) -> None:
    config = replace(model(name), image_size=64, patch_size=8)
    config = replace(config, enhancer=replace(config.enhancer, ema_decay=0.9))
    if name == "resnet18":
        config = replace(config, image_size=128, patch_size=16)
    course = training()
    memory = pretrain_cost(config, course, tokenizer=SMALL_TOKENIZER).memory_per_worker
    cim = build_cim(config, DiscreteVAE(SMALL_TOKENIZER, generator=torch.Generator()))
    state = TrainState(model=cim, optimizer=build_optimizer(cim, course))
    steps(state, course, config)
    copies = take_snapshot(state, fingerprint={}).tensors.wait()
    assert memory.snapshot_bytes == sum(x.numel() * x.element_size() for x in copies.values())
    trained = sum(p.numel() for p in cim.parameters() if p.requires_grad)
    assert memory.snapshot_bytes > 12 * trained  # a weight and two moments, and buffers


def test_memory__a_snapshot_counts_where_the_step_is_on_the_same_memory() -> None:
    config = replace(model("vit_tiny_patch16_224"), image_size=64, patch_size=8)
    beside, waiting, gpu = (
        pretrain_cost(config, course, tokenizer=SMALL_TOKENIZER, on_gpu=on_gpu).memory_per_worker
        for course, on_gpu in (
            (training(), False),
            (training(async_checkpoints=False), False),
            (training(), True),
        )
    )
    assert beside.snapshot_bytes == waiting.snapshot_bytes == gpu.snapshot_bytes > 0
    assert beside.peak_bytes == gpu.peak_bytes + gpu.snapshot_bytes
    # Without activations it would fit into what the step gave back; the gradients are still there.
    stays = gpu.model_bytes + gpu.tokenizer_bytes + gpu.optimizer_bytes + gpu.gradients_bytes
    assert waiting.peak_bytes == max(gpu.peak_bytes, stays + gpu.snapshot_bytes)


def test_memory__workers_share_the_batch_and_double_the_gradients() -> None:
    config = replace(model("vit_tiny_patch16_224"), image_size=64, patch_size=8)
    course = training(batch_size=16)
    one, two = (
        pretrain_cost(config, course, tokenizer=SMALL_TOKENIZER, num_workers=n).memory_per_worker
        for n in (1, 2)
    )
    half = pretrain_cost(config, training(batch_size=8), tokenizer=SMALL_TOKENIZER).memory_per_worker
    assert two.gradients_bytes == 2 * one.gradients_bytes
    assert two.activations_bytes == half.activations_bytes
    assert two.peak_bytes == half.peak_bytes + one.gradients_bytes


def test_meter__counts_what_is_held() -> None:
    with dry_run() as meter:
        kept = torch.zeros(1000)
        view = kept[:10]
        assert meter.held_bytes == 4000
        torch.ones(500, dtype=torch.float64).sum()
        assert meter.held_bytes == 4000
        assert meter.peak_bytes >= 8000
        del kept
        assert meter.held_bytes == 4000  # the view needs it
        del view
        assert meter.held_bytes == 0


def steps(state: TrainState, course: TrainingConfig, config: ModelConfig, *, num: int = 1) -> None:
    task = cim_task(state.model, seed=0)
    for _ in range(num):
        batch = views(config.image_size, config.grid * 8, course.batch_size)
        train_step(
            task, state, batch, plan=plan(course, num_images=course.batch_size), training=course, device=CPU
        )


_REAL_STEPS = """
import json, resource, sys, tempfile
from pathlib import Path
import tests.unit.cim_core.test_estimate_memory as here

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

config, course = here.resident_case(sys.argv[1], asynchronous=sys.argv[2] == "True")
before = resident()
cim = here.build_cim(config, here.DiscreteVAE(here.SMALL_TOKENIZER, generator=here.torch.Generator()))
state = here.TrainState(model=cim, optimizer=here.build_optimizer(cim, course))
here.steps(state, course, config, num=2)
with tempfile.TemporaryDirectory() as folder:
    if course.async_checkpoints:
        snapshot = here.take_snapshot(state, fingerprint={})
        background = here.Background()
        background.do(lambda: snapshot.write(Path(folder)))
        here.steps(state, course, config)
        background.close()
# Not ru_maxrss: a child begins with its parent's.
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(json.dumps(int(peak.split()[1]) * 1024 - before))
"""


def resident_case(name: str, *, asynchronous: bool) -> tuple[ModelConfig, TrainingConfig]:
    """Large enough that what PyTorch itself loads at the first step does not count."""
    config = replace(model(name), image_size=112, patch_size=8)
    course = training(batch_size=16, async_checkpoints=asynchronous)
    return replace(config, enhancer=EnhancerConfig(name=name)), course


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "asynchronous"),
    [("vit_tiny_patch16_224", False), ("vit_tiny_patch16_224", True), ("resnet18", True)],
)
def test_memory__is_what_a_process_grows_by(name: str, asynchronous: bool) -> None:  # noqa: FBT001
    """Two steps, and a third while the snapshot is written."""
    config, course = resident_case(name, asynchronous=asynchronous)
    cost = pretrain_cost(config, course, tokenizer=SMALL_TOKENIZER)
    # Without this, freed blocks stay with the C library, which then holds up to a fifth more.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _REAL_STEPS, name, str(asynchronous)]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=root)
    grown = json.loads(done.stdout)
    assert cost.memory_per_worker.peak_bytes == pytest.approx(grown, rel=0.2), asdict(cost.memory_per_worker)
