"""Gradient checkpointing changes memory and time, and nothing else."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from cim_core.config import EnhancerConfig, Scalar
from cim_core.errors import ModelError
from cim_core.models.checkpointing import Recomputation, can_checkpoint
from cim_core.models.enhancer import Enhancer
from tests.unit.cim_core.cim_models import TINY_VIT

NETWORKS: Mapping[str, Mapping[str, Scalar]] = {
    "vit_tiny_patch16_224": {**TINY_VIT, "drop_path_rate": 0.5, "proj_drop_rate": 0.2},
    "test_resnet": {"drop_path_rate": 0.5},
    "test_efficientnet": {},  # without stochastic depth its blocks end in a batch norm
    "test_byobnet": {},
    "test_convnext": {"drop_path_rate": 0.5},
    "regnety_002": {},
}
WITH_BATCH_NORM = ["test_resnet", "test_efficientnet", "test_byobnet", "regnety_002"]


def build(name: str, *, grad_checkpointing: bool) -> Enhancer:
    torch.manual_seed(0)
    config = EnhancerConfig(name=name, options=NETWORKS[name], grad_checkpointing=grad_checkpointing)
    return Enhancer(config, image_size=64, patch_size=16).train()


def trained(enhancer: Enhancer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and buffers after three micro-batches."""
    torch.manual_seed(1)
    for _ in range(3):
        enhancer(torch.randn(3, 3, 64, 64)).square().mean().backward()
    gradients = {name: p.grad for name, p in enhancer.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(enhancer.parameters()))
    return gradients, dict(enhancer.named_buffers())


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("name", NETWORKS)
def test_recomputation__gradients_and_statistics_are_bit_equal(name: str) -> None:
    plain = trained(build(name, grad_checkpointing=False))
    recomputed = trained(build(name, grad_checkpointing=True))
    assert differing(plain[0], recomputed[0]) == []
    assert differing(plain[1], recomputed[1]) == []


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_timm_alone__counts_a_batch_twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for our hooks. Should this fail with a newer timm or torch, they can go."""
    monkeypatch.setattr(Recomputation, "_hide", lambda self, layer, _: None)
    plain = trained(build(name, grad_checkpointing=False))
    twice = trained(build(name, grad_checkpointing=True))
    assert differing(plain[0], twice[0]) == []
    assert any("running_mean" in key for key in differing(plain[1], twice[1]))
    assert any("num_batches_tracked" in key for key in differing(plain[1], twice[1]))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_resnet"])
@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_recomputation__runs_a_block_twice(*, name: str, grad_checkpointing: bool) -> None:
    enhancer = build(name, grad_checkpointing=grad_checkpointing)
    blocks = getattr(enhancer.backbone, "blocks", None) or enhancer.backbone.layer3
    first = next(part for part in blocks.modules() if isinstance(part, nn.Linear | nn.Conv2d))  # type: ignore[union-attr]
    calls: list[nn.Module] = []
    first.register_forward_hook(lambda layer, *_: calls.append(layer))
    enhancer(torch.randn(2, 3, 64, 64)).sum().backward()
    assert len(calls) == (2 if grad_checkpointing else 1)


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_recomputation__statistics_are_the_layers_own_again_behind_it(name: str) -> None:
    enhancer = build(name, grad_checkpointing=True)
    before = {name: id(buffer) for name, buffer in enhancer.named_buffers()}
    trained(enhancer)
    assert {name: id(buffer) for name, buffer in enhancer.named_buffers()} == before


def test_recomputation__evaluation_reads_the_running_statistics() -> None:
    plain, other = (
        build("test_resnet", grad_checkpointing=False),
        build("test_resnet", grad_checkpointing=True),
    )
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(plain.eval()(images), other.eval()(images))


def test_recomputation__leaves_names_and_initial_weights_alone() -> None:
    plain, other = (
        build("test_resnet", grad_checkpointing=False),
        build("test_resnet", grad_checkpointing=True),
    )
    assert differing(plain.state_dict(), other.state_dict()) == []


def test_enhancer__a_network_without_it_is_refused() -> None:
    with pytest.raises(
        ModelError, match=r"enhancer.grad_checkpointing: timm .* has none for cs3darknet_s; set"
    ):
        Enhancer(EnhancerConfig(name="cs3darknet_s", grad_checkpointing=True), image_size=64, patch_size=16)


def test_can_checkpoint__asks_timm_and_leaves_it_off() -> None:
    enhancer = build("test_resnet", grad_checkpointing=False)
    assert can_checkpoint(enhancer.backbone)
    assert not enhancer.backbone.grad_checkpointing
    assert not can_checkpoint(nn.Linear(1, 1))
