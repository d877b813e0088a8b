"""The estimate against published sizes, formulas by hand, and real steps watched by torch's profiler."""

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
    DecoderConfig,
    EnhancerConfig,
    GeneratorConfig,
    Method,
    ModelConfig,
    ObjectiveConfig,
    TokenizerConfig,
    TokenizerSource,
    TrainingConfig,
)
from cim_core.data.dataset import Views
from cim_core.durations import plan
from cim_core.engine.state import TrainState
from cim_core.engine.step import Task, train_step
from cim_core.estimate.cost import Cost, pretrain_cost, tokenizer_cost
from cim_core.estimate.dry_run import dry_run
from cim_core.methods import build_model
from cim_core.optim import build_optimizer
from cim_core.task import cim_task
from cim_core.tokenizers.dvae import DiscreteVAE
from cim_core.tokenizers.task import tokenizer_task

CPU = torch.device("cpu")
SMALL_TOKENIZER = TokenizerConfig(image_size=32, width=8, vocab_size=32, code_dim=16)
TINY = {"depth": 2, "embed_dim": 64, "num_heads": 2}


def training(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"steps": 2, "batch_size": 2, "precision": "fp32", **changes})


def model(name: str, objective: Literal["respix", "revdet"] = "respix", **changes: Any) -> ModelConfig:
    enhancer = EnhancerConfig(name=name, options=TINY if name.startswith("vit_tiny") else {})
    source = TokenizerSource(source="job:tokens")
    return replace(
        ModelConfig(tokenizer=source, enhancer=enhancer, objective=ObjectiveConfig(name=objective)), **changes
    )


def official(name: str, **generator: Any) -> Cost:
    """Beside the official tokenizer, nothing shared."""
    config = model(name, generator=GeneratorConfig(**generator), tokenizer=TokenizerSource(source="dall-e"))
    config = replace(config, enhancer=replace(config.enhancer, shared_blocks=0))
    return pretrain_cost(config, training(), tokenizer=None)


# Sizes


@pytest.mark.parametrize(
    ("name", "macs", "generator_macs", "generator_parameters", "step_macs"),
    [
        # METHOD section 9: multiply-accumulates in 1e9, parameters in 1e6; the small BEiT is 4 deep.
        ("vit_base_patch16_224", 17.6, 6.6, 35.2, 128),
        ("vit_small_patch16_224", 4.6, 1.9, 10.5, 75),
        ("resnet50", 4.1, 1.9, 10.5, 73),
    ],
)
def test_pretrain__published_sizes(
    name: str, macs: float, generator_macs: float, generator_parameters: float, step_macs: float
) -> None:
    cost = official(name, depth=4)
    assert cost.macs_per_image["enhancer"] / 1e9 == pytest.approx(macs, rel=0.02)
    assert cost.macs_per_image["generator"] / 1e9 == pytest.approx(generator_macs, rel=0.03)
    assert cost.parameters["generator"] / 1e6 == pytest.approx(generator_parameters, rel=0.02)
    # Section 8.3: encoding at 112 pixels, and decoding by a table look-up.
    assert cost.macs_per_image["tokenizer_encode"] / 1e9 == pytest.approx(26.1, rel=0.01)
    assert cost.macs_per_image["tokenizer_decode"] / 1e9 == pytest.approx(29.3, rel=0.01)
    assert cost.parameters["tokenizer"] == 53_786_240 + 43_829_766
    assert cost.macs_per_training_image / 1e9 == pytest.approx(step_macs, rel=0.03)


def test_pretrain__a_vit_counted_by_hand() -> None:
    config = replace(model("vit_tiny_patch16_224"), image_size=64, patch_size=8)
    found = pretrain_cost(config, training(), tokenizer=SMALL_TOKENIZER).macs_per_image
    tokens, width, positions, vocabulary = 65, 64, 64, 32
    block = 12 * tokens * width**2 + 2 * tokens**2 * width  # qkv, output, MLP of 4 widths; two products
    embedding = positions * 3 * 8**2 * width
    masked = round((round(0.51 * positions) + round(0.61 * positions)) / 2)
    assert found["enhancer"] == embedding + TINY["depth"] * block
    assert found["head"] == positions * width * 3 * 8**2
    assert found["generator"] == embedding + 4 * block + masked * width * vocabulary


def test_pretrain__shared_layers_are_parameters_once_and_work_twice() -> None:
    config = replace(model("vit_tiny_patch16_224"), image_size=64, patch_size=8)
    alone = replace(config, enhancer=replace(config.enhancer, shared_blocks=0))
    shared, own = (pretrain_cost(c, training(), tokenizer=SMALL_TOKENIZER) for c in (config, alone))
    cim = build_cim(config, DiscreteVAE(SMALL_TOKENIZER, generator=torch.Generator()))
    parts = ("enhancer", "generator", "head")
    assert sum(shared.parameters[part] for part in parts) == sum(p.numel() for p in cim.parameters())
    assert own.parameters["generator"] > shared.parameters["generator"]
    assert own.macs_per_image == shared.macs_per_image


def test_pretrain__block_masks_cost_what_random_ones_do() -> None:
    config = replace(model("vit_tiny_patch16_224"), image_size=64, patch_size=8)
    blocks = replace(config, masking=replace(config.masking, strategy="block"))
    costs = [pretrain_cost(c, training(), tokenizer=SMALL_TOKENIZER) for c in (config, blocks)]
    assert costs[0] == costs[1]


def test_pretrain__an_unknown_tokenizer_is_left_out() -> None:
    config = replace(model("vit_tiny_patch16_224"), image_size=64, patch_size=8)
    cost = pretrain_cost(config, training(), tokenizer=None)
    assert cost.parameters["tokenizer"] == cost.memory_per_worker.tokenizer_bytes == 0
    assert cost.macs_per_image["tokenizer_encode"] == cost.macs_per_image["tokenizer_decode"] == 0
    # The output layer has DALL-E's 8192 tokens.
    own = pretrain_cost(config, training(), tokenizer=SMALL_TOKENIZER)
    assert cost.parameters["generator"] - own.parameters["generator"] == (8192 - 32) * 65


def peer(method: Method, name: str = "vit_tiny_patch16_224", **changes: Any) -> ModelConfig:
    enhancer = EnhancerConfig(name=name, options=TINY if name.startswith("vit_tiny") else {})
    source = TokenizerSource(source="dall-e") if method == "beit" else None
    return ModelConfig(method=method, tokenizer=source, enhancer=enhancer, **changes)


def test_peers__published_sizes() -> None:
    """METHOD section 9: a step of BEiT with ViT-B takes about 80 G, one of MAE about 29 G."""
    steps = {
        method: pretrain_cost(peer(method, "vit_base_patch16_224"), training(), tokenizer=None)
        for method in ("beit", "mae")
    }
    assert steps["beit"].macs_per_training_image / 1e9 == pytest.approx(80, rel=0.03)
    assert steps["mae"].macs_per_training_image / 1e9 == pytest.approx(29, rel=0.03)
    assert list(steps["mae"].macs_per_image) == ["enhancer", "decoder"]
    assert steps["mae"].memory_per_worker.tokenizer_bytes == 0
    assert steps["beit"].parameters["tokenizer"] > 50_000_000


def test_peers__counted_by_hand() -> None:
    sizes: dict[str, Any] = {"image_size": 64, "patch_size": 8}
    decoder = DecoderConfig(depth=3, width=32, heads=2)
    mae = pretrain_cost(peer("mae", decoder=decoder, **sizes), training(), tokenizer=None)
    simmim = pretrain_cost(peer("simmim", **sizes), training(), tokenizer=None)

    def block(tokens: int, width: int) -> int:
        return 12 * tokens * width**2 + 2 * tokens**2 * width

    positions, visible, width, pixels = 64, 16, 64, 3 * 8**2
    embedding = positions * pixels * width
    assert mae.macs_per_image == {
        "enhancer": embedding + 2 * block(visible + 1, width),
        "decoder": (visible + 1) * width * 32 + 3 * block(positions + 1, 32) + positions * 32 * pixels,
    }
    assert simmim.macs_per_image == {
        "enhancer": embedding + 2 * block(positions + 1, width),
        "head": positions * width * pixels,
    }
    assert simmim.macs_per_training_image == 3 * sum(simmim.macs_per_image.values())
    assert simmim.parameters["head"] == width * pixels + pixels + width  # weight, bias, mask token


@pytest.mark.parametrize("method", ["simmim", "mae"])
def test_peers__memory_is_that_of_a_real_step(method: Method) -> None:
    """Weights, gradients and both moments of AdamW, by the real model's own tensors."""
    config = peer(method, image_size=64, patch_size=8)
    cost = pretrain_cost(config, training(), tokenizer=None)
    real = build_model(config)
    trained = sum(p.numel() for p in real.parameters())
    assert sum(cost.parameters.values()) == trained
    assert cost.memory_per_worker.gradients_bytes == 4 * trained
    counters = 4 * len(list(real.parameters()))
    assert cost.memory_per_worker.optimizer_bytes == 2 * 4 * trained + counters
    assert cost.memory_per_worker.activations_bytes > 0


def test_tokenizer__a_search_is_no_training() -> None:
    costs = {q: tokenizer_cost(replace(SMALL_TOKENIZER, quantiser=q), training()) for q in ("vq", "relaxed")}
    for name, cost in costs.items():
        encoder, quantiser, decoder = cost.macs_per_image.values()
        times = 1 if name == "vq" else 3
        assert quantiser == 16 * 32 * 16  # tokens, codes, channels: distances, or a blend
        assert cost.macs_per_training_image == 3 * (encoder + decoder) + times * quantiser
        assert cost.memory_per_worker.tokenizer_bytes == 0


# Memory


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
    return memory.peak_bytes - memory.model_bytes - memory.tokenizer_bytes - memory.optimizer_bytes


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
    fixed = memory.model_bytes + memory.tokenizer_bytes + memory.optimizer_bytes
    assert fixed + trained < memory.peak_bytes <= fixed + trained + memory.activations_bytes


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


_REAL_STEPS = """
import json, resource, sys
from pathlib import Path
import tests.unit.cim_core.test_estimate as here

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

config, course = here.resident_case(sys.argv[1])
before = resident()
cim = here.build_cim(config, here.DiscreteVAE(here.SMALL_TOKENIZER, generator=here.torch.Generator()))
state = here.TrainState(model=cim, optimizer=here.build_optimizer(cim, course))
for _ in range(2):
    batch = here.views(config.image_size, config.grid * 8, course.batch_size)
    here.train_step(
        here.cim_task(cim, seed=0), state, batch,
        plan=here.plan(course, num_images=course.batch_size), training=course, device=here.CPU,
    )
# Not ru_maxrss: a child begins with its parent's.
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(json.dumps(int(peak.split()[1]) * 1024 - before))
"""


def resident_case(name: str) -> tuple[ModelConfig, TrainingConfig]:
    """Large enough that what PyTorch itself loads at the first step does not count."""
    config = replace(model(name), image_size=112, patch_size=8)
    return replace(config, enhancer=EnhancerConfig(name=name)), training(batch_size=16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_memory__is_what_a_process_grows_by(name: str) -> None:
    config, course = resident_case(name)
    cost = pretrain_cost(config, course, tokenizer=SMALL_TOKENIZER)
    # Without this, freed blocks stay with the C library, which then holds up to a fifth more.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _REAL_STEPS, name]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env, cwd=root)
    grown = json.loads(done.stdout)
    assert cost.memory_per_worker.peak_bytes == pytest.approx(grown, rel=0.2), asdict(cost.memory_per_worker)
