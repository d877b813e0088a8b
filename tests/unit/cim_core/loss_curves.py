"""Short trainings on drawn pictures with fixed seeds, whose losses are kept in loss_curves.json.

Run as a module, it writes the file anew: only where a change is meant to change the numbers.
"""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cim_core.cim import build_cim
from cim_core.config import (
    DecoderConfig,
    EnhancerConfig,
    GeneratorConfig,
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
from cim_core.methods import build_model
from cim_core.optim import build_optimizer
from cim_core.seeding import generator_for
from cim_core.task import cim_task
from cim_core.tokenizers.dvae import DiscreteVAE
from cim_core.tokenizers.task import tokenizer_task
from tests.unit.cim_core.cim_models import TINY_VIT

FILE = Path(__file__).with_name("loss_curves.json")
STEPS, BATCH = 6, 4
VIT = EnhancerConfig(name="vit_tiny_patch16_224", options=TINY_VIT)
CNN = EnhancerConfig(name="test_resnet")
ENHANCERS = {"vit": VIT, "cnn": CNN}
CURVES = (
    *((family, objective) for family in ENHANCERS for objective in ("respix", "revdet")),
    ("tokenizer", "vq"),
    ("tokenizer", "relaxed"),
    ("peer", "beit"),
    ("peer", "simmim"),
    ("peer", "mae"),
)
TRAINING = TrainingConfig(
    steps=STEPS, batch_size=BATCH, accumulation=2, learning_rate=1e-3, precision="fp32", seed=0
)


def machine() -> dict[str, str]:
    """What bit-equal numbers hang on, beside the code: libraries choose kernels by processor."""
    return {"torch": torch.__version__, "cpu": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def curve(family: str, name: str) -> list[dict[str, float]]:
    """The loss terms of every step, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _trained(family, name)
    finally:
        torch.set_num_threads(threads)


def _trained(family: str, name: str) -> list[dict[str, float]]:
    families = {"tokenizer": _tokenizer, "peer": _peer}
    model, task, terms = families[family](name) if family in families else _cim(family, name)
    state = TrainState(model=model.train(), optimizer=build_optimizer(model, TRAINING))
    course = plan(TRAINING, num_images=BATCH * STEPS)
    points = []
    for step in range(STEPS):
        result = train_step(
            task, state, _batch(step), plan=course, training=TRAINING, device=torch.device("cpu")
        )
        points.append({term: result.metrics[term].item() for term in (*terms, "grad_norm")})
    return points


def _dvae(**changes: Any) -> DiscreteVAE:
    config = TokenizerConfig(image_size=32, stride=4, width=4, vocab_size=16, code_dim=4, **changes)
    return DiscreteVAE(config, generator=generator_for(0, "init", "tokenizer"))


def _tokenizer(quantiser: str) -> tuple[DiscreteVAE, Task[Views], tuple[str, ...]]:
    model = _dvae(quantiser=quantiser)
    return model, tokenizer_task(model, seed=0), ("loss", "reconstruction", "perplexity")


def _cim(family: str, objective: str) -> tuple[torch.nn.Module, Task[Views], tuple[str, ...]]:
    config = ModelConfig(
        tokenizer=TokenizerSource(source="given"),
        enhancer=ENHANCERS[family],
        objective=ObjectiveConfig(name=objective),  # type: ignore[arg-type]
        image_size=64,
        patch_size=8,
        generator=GeneratorConfig(depth=3, width=None if family == "vit" else 32),
    )
    model = build_cim(config, _dvae(), seed=0)
    return model, cim_task(model, seed=0), ("mim_loss", "enhancer_loss", "replaced_share")


def _peer(method: str) -> tuple[torch.nn.Module, Task[Views], tuple[str, ...]]:
    config = ModelConfig(
        method=method,  # type: ignore[arg-type]
        tokenizer=TokenizerSource(source="given") if method == "beit" else None,
        enhancer=VIT,
        image_size=64,
        patch_size=8,
        decoder=DecoderConfig(depth=1, width=32, heads=2) if method == "mae" else None,
    )
    model = build_model(config, _dvae() if method == "beit" else None, seed=0)
    return model, cim_task(model, seed=0), ("loss", "mask_share")


def _batch(step: int) -> Views:
    coarse = torch.rand(BATCH, 3, 6, 6, generator=generator_for(0, "pictures", step))
    views = []
    for side in (64, 32):
        pixels = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
        views.append((pixels * 255).round().to(torch.uint8))
    return Views(pixels_B3HW=views[0], token_pixels_B3HW=views[1], ids_B2=torch.zeros(BATCH, 2).long())


def measure() -> Mapping[str, Any]:
    """Every curve, and the machine it was computed on."""
    curves = {f"{family} {name}": curve(family, name) for family, name in CURVES}
    return {"machine": machine(), "curves": curves}


if __name__ == "__main__":
    FILE.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
