from collections.abc import Mapping

import pytest
import torch
from timm.layers import DropPath
from torch import nn

from cim_core.config import EnhancerConfig, GeneratorConfig, ObjectiveConfig, Scalar
from cim_core.errors import ModelError
from cim_core.models.enhancer import Enhancer
from cim_core.models.probe import plan_backbone
from cim_core.objectives.base import Truth
from cim_core.registry import build_objective
from tests.unit.cim_core.cim_models import TINY_VIT


def build(
    name: str, *, size: int = 64, patch: int = 8, options: Mapping[str, Scalar] | None = None
) -> Enhancer:
    return Enhancer(EnhancerConfig(name=name, options=options or {}), image_size=size, patch_size=patch)


def awake(enhancer: Enhancer) -> Enhancer:
    """Norms and residual branches that start at zero would hide, for one step, what is connected."""
    for parameter in enhancer.parameters():
        if parameter.ndim < 2 or not parameter.any():
            torch.nn.init.normal_(parameter, mean=0.5, std=0.2)
    return enhancer.train()


def idle(network: nn.Module) -> list[str]:
    """Parameters whose gradient is missing or zero."""
    return [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize(
    ("name", "size", "patch", "options"),
    [
        ("vit_tiny_patch16_224", 65, 13, {"depth": 2}),
        ("vit_base_patch16_siglip_224", 32, 16, {"depth": 1, "embed_dim": 48, "num_heads": 3}),
        ("vit_relpos_small_patch16_224", 40, 8, {"depth": 2}),
        ("deit3_small_patch16_224", 40, 5, {"depth": 2}),
        ("beit_base_patch16_224", 32, 8, {"depth": 1, "embed_dim": 48, "num_heads": 3}),
        ("convnext_atto", 64, 8, {}),
        ("mobilenetv3_small_050", 65, 13, {}),
        ("swin_tiny_patch4_window7_224", 96, 16, {}),
    ],
)
def test_forward__is_a_map_and_every_parameter_learns(
    name: str, size: int, patch: int, options: dict[str, Scalar]
) -> None:
    enhancer = awake(build(name, size=size, patch=patch, options=options))
    features = enhancer(torch.randn(2, 3, size, size))
    assert features.shape == (2, enhancer.width, enhancer.side, enhancer.side)
    (features * torch.randn_like(features)).sum().backward()
    assert idle(enhancer) == []


# Networks that users will name first; ViTs of their real width, but of two blocks.
NAMED: Mapping[str, tuple[int, int, Mapping[str, Scalar]]] = {
    "vit_tiny_patch16_224": (32, 16, {"depth": 2}),
    "vit_small_patch16_224": (32, 16, {"depth": 2}),
    "vit_base_patch16_224": (32, 16, {"depth": 2}),
    "deit3_small_patch16_224": (32, 16, {"depth": 2}),
    "resnet18": (64, 16, {}),
    "resnet50": (64, 16, {}),
    "wide_resnet50_2": (64, 16, {}),
    "convnext_tiny": (64, 16, {}),
    "regnety_016": (64, 16, {}),
    "efficientnet_b0": (64, 16, {}),
    "swin_tiny_patch4_window7_224": (64, 16, {}),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_network__both_objectives_train_every_parameter(name: str) -> None:
    size, patch, options = NAMED[name]
    enhancer = awake(build(name, size=size, patch=patch, options=options))
    grid = size // patch
    features = enhancer(torch.randn(2, 3, size, size))
    truth = Truth(
        clean_B3HW=torch.rand(2, 3, size, size),
        mask_BN=torch.ones(2, grid * grid, dtype=torch.bool),
        replaced_BN=torch.rand(2, grid * grid) < 0.5,
    )
    for config in (ObjectiveConfig(name="respix"), ObjectiveConfig(name="revdet")):
        objective = build_objective(
            config, width=enhancer.width, feature_side=enhancer.side, image_size=size, grid=grid
        )
        loss = objective(features, truth).loss
        loss.backward(retain_graph=config.name == "respix")
        assert idle(enhancer) == []
        assert idle(objective) == []
        enhancer.zero_grad()


def test_vit__map_holds_the_patch_tokens_in_their_places() -> None:
    enhancer = build("vit_tiny_patch16_224", options=TINY_VIT).eval()
    images = torch.randn(1, 3, 64, 64)
    tokens = enhancer.backbone.forward_features(images)  # type: ignore[operator]
    features = enhancer(images)
    assert enhancer.side == 8
    assert torch.equal(features[0, :, 2, 5], tokens[0, 1 + 2 * 8 + 5])


def test_swin__channels_are_moved_to_the_front() -> None:
    enhancer = build("swin_tiny_patch4_window7_224", size=96).eval()
    images = torch.randn(1, 3, 96, 96)
    features = enhancer(images)
    assert features.shape == (1, 768, 3, 3)
    raw = enhancer.backbone.forward_features(images)  # type: ignore[operator]
    assert torch.equal(features[0, :, 0, 2], raw[0, 0, 2])


def test_patch_size__reaches_vits_only() -> None:
    assert plan_backbone("deit3_small_patch16_224", image_size=40, patch_size=5).train_args["patch_size"] == 5
    for name, size in (("swin_tiny_patch4_window7_224", 96), ("resnet18", 64), ("vit_tiny_r_s16_p8_224", 64)):
        assert "patch_size" not in plan_backbone(name, image_size=size, patch_size=8).train_args


def test_dropout__and_stochastic_depth_are_off_unless_asked_for() -> None:
    def rates(enhancer: Enhancer) -> set[float]:
        return {part.drop_prob for part in enhancer.modules() if isinstance(part, DropPath)}

    assert rates(build("nest_tiny", size=224)) == {0.0}
    asked = build("vit_tiny_patch16_224", options={**TINY_VIT, "drop_path_rate": 0.2})
    assert max(rates(asked)) == pytest.approx(0.2)


def test_cnn__last_stage_is_part_of_the_map() -> None:
    enhancer = build("resnet18")
    assert (enhancer.width, enhancer.side, enhancer.is_vit, enhancer.can_share) == (512, 2, False, False)


def test_plain_vit__starts_as_the_table_says_and_others_as_timm_says() -> None:
    vit = build("vit_tiny_patch16_224", options={"depth": 3})
    blocks = vit.backbone.blocks
    assert float(blocks[2].attn.proj.weight.detach().abs().max()) <= 0.02 / 6**0.5 + 1e-7  # type: ignore[index, union-attr]
    resnet = build("resnet18")
    assert float(resnet.backbone.conv1.weight.detach().abs().max()) > 0.02  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("name", "can_share"),
    [
        ("vit_tiny_patch16_224", True),
        ("deit3_small_patch16_224", True),
        ("beit_base_patch16_224", False),
        ("vit_relpos_small_patch16_224", False),
        ("vit_base_patch16_clip_224", False),  # a norm between embedding and blocks
        ("resnet18", False),
    ],
)
def test_can_share__is_for_plain_vision_transformers(*, name: str, can_share: bool) -> None:
    assert plan_backbone(name, image_size=32, patch_size=16).can_share is can_share


def test_shared_layers__refusal_says_why() -> None:
    with pytest.raises(ModelError, match=r"resnet18 cannot share 2 blocks.*it is a ResNet; set 0"):
        build("resnet18").shared_layers(2)
    with pytest.raises(ModelError, match=r"must not exceed the 2 blocks of vit_tiny_patch16_224, got 3"):
        build("vit_tiny_patch16_224", options=TINY_VIT).shared_layers(3)


def test_default_shared_blocks__are_two_but_never_more_than_there_are() -> None:
    vit = build("vit_tiny_patch16_224", options=TINY_VIT)
    assert vit.default_shared_blocks(GeneratorConfig(depth=4)) == 2
    assert vit.default_shared_blocks(GeneratorConfig(depth=1)) == 1
    assert vit.default_shared_blocks(GeneratorConfig(positions="relative")) == 0
    assert build("resnet18").default_shared_blocks(GeneratorConfig(depth=4)) == 0


def test_name__unknown_one_is_answered_with_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"no model 'resnet_18'; the nearest: .*resnet18"):
        build("resnet_18")


def test_name__a_tag_names_weights_and_is_dropped() -> None:
    assert plan_backbone("resnet18.a1_in1k", image_size=32).name == "resnet18"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("cait_xxs24_224", "serve the class token alone"),
        ("vgg11", "would never be trained"),
        ("pit_ti_224", "one vector for the whole image"),
    ],
)
def test_name__a_network_that_cannot_serve_says_why(name: str, why: str) -> None:
    with pytest.raises(ModelError, match=rf"{name} cannot serve at 64 pixels: .*{why}"):
        plan_backbone(name, image_size=64)


def test_options__that_timm_does_not_know_are_named() -> None:
    with pytest.raises(
        ModelError, match=r"cannot build resnet18 with enhancer.options \{'depht': 3\}.*depht"
    ):
        build("resnet18", options={"depht": 3})


def test_plan__keeps_the_pooling_that_was_asked_for() -> None:
    plan = plan_backbone("vit_tiny_patch16_224", image_size=64, options={"depth": 1, "global_pool": "avg"})
    assert plan.export_args["global_pool"] == "avg"
    assert "global_pool" not in plan_backbone("vit_tiny_patch16_224", image_size=64).export_args


def test_plan__refuses_a_pooling_with_layers_that_would_stay_untrained() -> None:
    with pytest.raises(ModelError, match="'map' has layers behind"):
        plan_backbone("vit_tiny_patch16_224", image_size=64, options={"depth": 1, "global_pool": "map"})
