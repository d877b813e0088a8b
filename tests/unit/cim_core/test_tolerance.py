"""How far each speed option may move the golden loss curves, in numbers that docs/spec.md states too."""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cim_core.config import TrainingConfig
from cim_core.durations import plan
from cim_core.engine.acceleration import accelerate
from cim_core.engine.state import TrainState
from cim_core.engine.step import train_step
from cim_core.objectives.respix import WindowStatistics
from cim_core.optim import build_optimizer
from cim_core.task import cim_task
from tests.architecture.tree import ROOT
from tests.unit.cim_core import loss_curves
from tests.unit.cim_core.cim_models import model_config, tiny_cim, views_for
from tests.unit.cim_core.loss_curves import ENHANCERS, TRAINING, Curve, curve

CPU = torch.device("cpu")
CASES = [(family, objective) for family in ENHANCERS for objective in ("respix", "revdet")]
COMPILER = os.environ.get("CXX", "g++")  # what inductor calls

# Of each loss term, `distance` from the curve without the option. Measured on an EPYC with AVX512, torch
# 2.15, the largest of CASES and terms: over the golden six steps, and over twelve where rounding grew.
TOLERANCE = {
    "fused_optimizer": 5e-6,  # 3.3e-8; 1.7e-6 over twelve
    "channels_last": 5e-6,  # 4.3e-8; 1.4e-6 over twelve
    "precision": 2e-3,  # bf16: 5.6e-4
    "compile": 5e-5,  # 1.4e-5
}
FAST: dict[str, Any] = {"fused_optimizer": True, "channels_last": True, "precision": "bf16"}


def distance(got: Curve, expected: Curve) -> float:
    """Of the worst loss term: the mean absolute difference over the steps, relative to the term's mean."""
    gaps = []
    for term in ("mim_loss", "enhancer_loss"):
        apart = sum(abs(one[term] - other[term]) for one, other in zip(got, expected, strict=True))
        gaps.append(apart / sum(abs(point[term]) for point in expected))
    return max(gaps)


def trained(family: str, objective: str, **options: Any) -> Curve:
    """The golden curve's training with options of TrainingConfig changed."""

    def build(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
        accelerate(model, training, CPU)
        return build_optimizer(model, training)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_curves, "TRAINING", replace(TRAINING, **options))
        patch.setattr(loss_curves, "build_optimizer", build)
        return curve(family, objective)


@cache
def plain(family: str, objective: str) -> Curve:
    return trained(family, objective)


@pytest.mark.parametrize("option", FAST)
@pytest.mark.parametrize(("family", "objective"), CASES)
def test_option__moves_the_golden_curve_within_its_tolerance(
    family: str, objective: str, option: str
) -> None:
    """A mean over the steps, since under bf16 a token or two are drawn otherwise and move one step's loss."""
    fast = trained(family, objective, **{option: FAST[option]})
    assert distance(fast, plain(family, objective)) <= TOLERANCE[option]


def test_bf16__is_no_plain_run() -> None:
    """Else the tolerance would hold of an option that does nothing."""
    assert distance(trained("vit", "respix", precision="bf16"), plain("vit", "respix")) > 1e-5


@pytest.mark.parametrize(
    ("option", "fault"),
    [
        ("fused_optimizer", {"weight_decay": 0.0}),
        ("fused_optimizer", {"beta2": 0.97}),
        ("channels_last", {"weight_decay": 0.0}),
        ("precision", {"beta1": 0.5}),
        ("precision", {"learning_rate": 1.2e-3}),
    ],
)
@pytest.mark.parametrize("family", ENHANCERS)
def test_tolerance__is_less_than_a_wrong_update(family: str, option: str, fault: dict[str, float]) -> None:
    faulty = trained(family, "revdet", **{option: FAST[option]}, **fault)
    assert distance(faulty, plain(family, "revdet")) > TOLERANCE[option]


def rounded(real: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    return lambda self, x: tuple(part.bfloat16().float() for part in real(self, x))


def test_tolerance__is_less_than_targets_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plain("vit", "respix")
    monkeypatch.setattr(WindowStatistics, "forward", rounded(WindowStatistics.forward))
    assert distance(trained("vit", "respix", precision="bf16"), expected) > TOLERANCE["precision"]


def smallest(**options: Any) -> Curve:
    """The golden curve's settings on a network that compiles in seconds."""
    training = replace(TRAINING, accumulation=1, **options)
    width = {"depth": 1, "embed_dim": 16, "num_heads": 1}
    model = tiny_cim(model_config(options=width, depth=1)).train()
    accelerate(model, training, CPU)
    state = TrainState(model=model, optimizer=build_optimizer(model, training))
    course, points = plan(training, num_images=24), []
    for step in range(loss_curves.STEPS):
        batch = views_for(model, num_images=4, seed=step)
        result = train_step(cim_task(model, seed=0), state, batch, plan=course, training=training, device=CPU)
        points.append({name: value.item() for name, value in result.metrics.items()})
    return points


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler: {COMPILER} is not on the path")
def test_compile__moves_a_curve_within_its_tolerance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of CASES were measured for TOLERANCE; compiling them takes minutes, so here it is one tiny ViT."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    expected = smallest()
    torch._dynamo.reset()
    compiled = smallest(compile=True)
    assert list(tmp_path.rglob("*.so")), "nothing was compiled"
    assert distance(compiled, expected) <= TOLERANCE["compile"]
    assert distance(smallest(weight_decay=0.0, learning_rate=1.2e-3), expected) > TOLERANCE["compile"]


@pytest.mark.parametrize("option", TOLERANCE)
def test_spec_page__states_the_tolerance(option: str) -> None:
    page = (ROOT / "docs" / "spec.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| `training.{option}` |"))
    stated = re.search(r"within (\de-\d) of the golden curve", row)
    assert stated is not None
    assert float(stated[1]) == TOLERANCE[option]
