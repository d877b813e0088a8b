"""What a look at a run says, and that it leaves no trace."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from cim_core import diagnostics
from cim_core.cim import CIM
from cim_core.config import ModelConfig
from cim_core.data.dataset import ViewConfig, Views
from cim_core.diagnostics import PORTION, diagnose, feature_std, mean_features, rank_me, shared_gradients
from cim_core.engine.step import Task
from cim_core.task import cim_task
from tests.unit.cim_core import tiny
from tests.unit.cim_core.cim_models import model_config, peer_config, rng, tiny_cim, tiny_peer, views_for

FEATURES = {"diag_feature_std", "diag_rankme"}
GRADIENTS = {"diag_gradient_generator", "diag_gradient_enhancer", "diag_gradient_cosine"}
DROPS = model_config(name="vit_tiny_patch16_224", options={"depth": 2, "embed_dim": 32, "num_heads": 2,
                                                           "drop_path_rate": 0.3})  # fmt: skip


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_rank_me__is_the_paper_s_formula() -> None:
    features = normal(20, 8) * torch.arange(1, 9)
    values = np.linalg.svd(features.double().numpy(), compute_uv=False)
    shares = values / np.abs(values).sum() + 1e-7
    assert rank_me(features) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_rank_me__counts_directions_of_equal_strength(rank: int) -> None:
    orthonormal, _ = torch.linalg.qr(normal(30, 8))
    features = orthonormal[:, :rank] @ torch.eye(8)[:rank]
    assert rank_me(features) == pytest.approx(rank, rel=1e-3)


def test_rank_me__of_features_that_are_not_finite() -> None:
    assert math.isnan(rank_me(torch.tensor([[1.0, math.inf]])))


def test_feature_std__is_0_where_collapsed_and_1_where_spread_evenly() -> None:
    assert feature_std(torch.full((5, 7), 3.0) * torch.arange(1, 6)[:, None]) == pytest.approx(0, abs=1e-6)
    assert feature_std(normal(4000, 32)) == pytest.approx(1, rel=0.01)


def test_feature_std__by_hand() -> None:
    """Two unit vectors (1, 0) and (0, 1): each channel has deviation 1/2, and sqrt(2) / 2 is the result."""
    assert feature_std(torch.tensor([[5.0, 0.0], [0.0, 0.1]])) == pytest.approx(2**0.5 / 2)


@pytest.mark.parametrize("count", [3, PORTION + 3])
def test_mean_features__are_of_the_real_images_in_eval_mode(count: int) -> None:
    cim = tiny_cim(model_config(name="test_resnet")).train()
    views = views_for(cim, num_images=count)
    images = cim.normalise(views.pixels_B3HW.float() / 255)
    expected = cim.eval().enhancer(images).mean(dim=(2, 3))
    torch.testing.assert_close(mean_features(cim.train().enhancer, views.pixels_B3HW), expected)


def slow_gradients(cim: CIM, portions: Sequence[Views]) -> Mapping[str, float]:
    """The gradients that an optimizer would see after backward passes over all portions."""
    first = ("patch_embed", "blocks.0")
    shared = [p for name, p in cim.enhancer.backbone.named_parameters() if name.startswith(first)]
    found = []
    for name, weight in (("mim", 1.0), (cim.objective_name, cim.weight)):
        cim.zero_grad()
        generator = rng(3)
        for portion in portions:
            loss = weight * cim(portion, generator=generator).losses[name] / len(portions)
            loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in shared if p.grad is not None]))
    mim, enhancer = found
    return {
        "gradient_generator": mim.norm().item(),
        "gradient_enhancer": enhancer.norm().item(),
        "gradient_cosine": (mim @ enhancer / mim.norm() / enhancer.norm()).item(),
    }


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("objective", ["respix", "revdet"])
def test_shared_gradients__are_those_that_the_optimizer_would_see(
    objective: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cim = tiny_cim(model_config(objective=objective, shared_blocks=1)).eval()
    views = views_for(cim, num_images=4)
    monkeypatch.setattr(diagnostics, "PORTION", 4 // parts)
    expected = slow_gradients(cim, views.split(parts))
    assert shared_gradients(cim, views, generator=rng(3)) == pytest.approx(expected, rel=1e-4)


def test_shared_gradients__weight_of_the_loss_counts() -> None:
    base = model_config(shared_blocks=1)
    assert base.objective is not None
    heavy = replace(base, objective=replace(base.objective, weight=20.0))
    views = views_for(tiny_cim(base))
    light, more = (shared_gradients(tiny_cim(c), views, generator=rng(3)) for c in (base, heavy))
    assert more["gradient_enhancer"] == pytest.approx(2 * light["gradient_enhancer"], rel=1e-4)
    assert more["gradient_generator"] == light["gradient_generator"]


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (model_config(), FEATURES | GRADIENTS),
        (model_config(shared_blocks=0), FEATURES),
        (model_config(name="test_resnet"), FEATURES),
    ],
    ids=["shared", "nothing shared", "cnn"],
)
def test_diagnose__has_gradients_only_where_layers_are_shared(config: ModelConfig, names: set[str]) -> None:
    cim = tiny_cim(config)
    found = diagnose(cim, views_for(cim), generator=rng())
    assert set(found) == names
    assert all(math.isfinite(value) for value in found.values())


def test_diagnose__serves_any_method_that_has_an_enhancer() -> None:
    peer = tiny_peer(peer_config("mae"))
    assert set(diagnose(peer, views_for(peer), generator=rng())) == FEATURES


class Looking(tiny.Recorder):
    """Looks at the model whenever a picture is due."""

    def __init__(self, folder: Path, *, cim: CIM, stop_at: int | None = None) -> None:
        super().__init__(folder, stop_at=stop_at)
        self.cim = cim
        self.found: list[dict[str, float]] = []

    def on_sample(self, step: int) -> None:
        super().on_sample(step)
        self.found.append(diagnose(self.cim, views_for(self.cim, num_images=5), generator=rng(step)))


@pytest.mark.parametrize("config", [model_config(), DROPS, model_config(name="test_resnet")],
                         ids=["vit", "drop path", "cnn"])  # fmt: skip
def test_run__is_bit_equal_with_and_without_looks(config: ModelConfig, tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path / "images", side=40)
    ends = []
    for looks in (True, False):
        before = torch.get_rng_state()
        cim = tiny_cim(config).train()
        make_recorder: Callable[..., tiny.Recorder] = partial(Looking, cim=cim) if looks else tiny.Recorder
        task: Task[Views] = cim_task(cim, seed=0)
        views = ViewConfig(image_size=32, token_size=cim.grid * cim.tokenizer.stride)
        ran = tiny.run(
            images,
            tmp_path / "out",
            model=cim,
            task=task,
            config=tiny.training(steps=4),
            views=views,
            make_recorder=make_recorder,
        )
        gradients = {name: p.grad for name, p in cim.named_parameters() if p.grad is not None}
        ends.append((cim.state_dict(), gradients))
        assert torch.equal(torch.get_rng_state(), before)
        assert all(part.training for part in cim.modules())
        assert not looks or len(cast(Looking, ran.recorder).found) == 2
    (weights, grads), (plain_weights, plain_grads) = ends
    assert all(torch.equal(weights[name], plain_weights[name]) for name in plain_weights)
    assert grads.keys() == plain_grads.keys()
    assert all(torch.equal(grads[name], plain_grads[name]) for name in grads)
