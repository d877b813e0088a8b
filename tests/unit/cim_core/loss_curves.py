"""Short trainings on drawn pictures with fixed seeds; loss_curves.json keeps their losses, a set a machine.

Run as a module, it writes this machine's set: on a machine without one, or where a change is meant to
change the numbers. Sets of other machines that no longer agree with it are dropped and told.
"""

import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
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

Curve = list[dict[str, float]]

# Relative, of a loss or share and of the gradient's norm, on one release of torch. On an EPYC, kernels
# of AVX2 against those of AVX512 in torch, oneDNN and MKL: 1.7e-7 and 1.2e-6; against none: 6.4e-6 and 2e-5.
ROUNDING, ROUNDING_UNLIKE = (1e-6, 2e-6), (1e-5, 4e-5)
# From the step on where a token tipped: of a batch's 256, or of the codes that they use, a few are others.
TIPPED, FEW_TOKENS = (0.02, 0.2), {"replaced_share": 2 / 256, "perplexity": 0.2}
# Other releases of torch draw other truncated normals (2.11 and 2.15): weights start elsewhere.
OTHER_TORCH = (0.1, 0.5)
VECTORS = ("AVX2", "AVX512")


def machine() -> dict[str, str]:
    """What bit-equal numbers hang on, beside the code: libraries choose kernels by processor."""
    return {"torch": torch.__version__, "cpu": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def departures(
    got: Curve, expected: Curve, *, here: Mapping[str, str], there: Mapping[str, str]
) -> list[str]:
    """What a curve of machine `here` shows that rounding does not explain, beside one of machine `there`."""
    if here == there:
        return _beyond(got, expected, (0.0, 0.0))
    if here["torch"] != there["torch"]:
        return _beyond(got, expected, OTHER_TORCH)
    band = ROUNDING if all(one["cpu"].endswith(VECTORS) for one in (here, there)) else ROUNDING_UNLIKE
    first = next((step for step in range(len(expected)) if _tipped(got[step], expected[step])), len(expected))
    return [
        *_beyond(got[:first], expected[:first], band),
        *_beyond(got[first:], expected[first:], TIPPED, before=first),
    ]


def _tipped(point: Mapping[str, float], target: Mapping[str, float]) -> bool:
    """Whether a few tokens of this step are others: more would be another training."""
    gaps = {name: abs(point[name] - target[name]) for name in FEW_TOKENS if name in target}
    return any(gaps.values()) and all(gap <= FEW_TOKENS[name] for name, gap in gaps.items())


def _beyond(
    got: Sequence[Mapping[str, float]],
    expected: Sequence[Mapping[str, float]],
    band: tuple[float, float],
    *,
    before: int = 0,
) -> list[str]:
    of_loss, of_norm = band
    lines = []
    for step, (point, target) in enumerate(zip(got, expected, strict=True), start=before + 1):
        assert point.keys() == target.keys()
        for name, value in target.items():
            allowed = (of_norm if name == "grad_norm" else of_loss) * abs(value)
            if not abs(point[name] - value) <= allowed:
                lines.append(f"step {step}: {name} is {point[name]!r}, not {value!r}")
    return lines


def curve(family: str, name: str) -> Curve:
    """The loss terms of every step, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _trained(family, name)
    finally:
        torch.set_num_threads(threads)


def _trained(family: str, name: str) -> Curve:
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


def recorded() -> list[dict[str, Any]]:
    """The sets of the file: each the curves by name, and the machine that they were computed on."""
    sets: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return sets


def _agrees(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    here, there = one["machine"], other["machine"]
    return not any(
        departures(points, other["curves"][name], here=here, there=there)
        for name, points in one["curves"].items()
    )


def record(sets: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """`sets` with this machine's curves in place of those that it had, without what disagrees with them."""
    new = {
        "machine": machine(),
        "curves": {f"{family} {name}": curve(family, name) for family, name in CURVES},
    }
    others = [one for one in sets if one["machine"] != new["machine"]]
    kept = [one for one in others if _agrees(new, one)]
    for one in others:
        if one not in kept:
            sys.stderr.write(f"dropped, it disagrees now: {one['machine']}\n")
    return [*kept, new]


if __name__ == "__main__":
    FILE.write_text(json.dumps(record(recorded()), indent=1) + "\n", encoding="utf-8")
