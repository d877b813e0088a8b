"""Batch norm that would see one value a channel is refused at submit, as torch refuses it in training."""

from typing import Any

import pytest
import torch

from cim_core.config import EnhancerConfig
from cim_core.errors import ModelError
from cim_core.models.enhancer import Enhancer
from service.contracts.enhancers import EnhancerFacts, facts_of, one_image_from
from service.contracts.parsing import parse
from service.errors import InvalidSpecError
from tests.unit.service.test_parsing import pretrain

SIDES = (31, 32, 33, 64, 65)
NETWORKS = [
    "resnet10t", "mobilenetv3_small_050", "regnetx_002", "repvgg_a0", "efficientnet_lite0", "densenet121",
    "dla34", "skresnet18", "selecsls42", "ese_vovnet19b_slim_dw", "ghostnet_100", "mobilevit_xxs",
    "convnext_atto", "test_resnet", "visformer_tiny",
]  # fmt: skip


def spec(
    name: str = "resnet18",
    *,
    side: int = 32,
    batch: int = 1,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    enhancer = {"name": name, "options": options or {}}
    sizes = {"model__image_size": side, "model__patch_size": 8, "training__batch_size": batch}
    return pretrain(model__enhancer=enhancer, **sizes, **changes)


def problems(raw: dict[str, Any]) -> dict[str, str]:
    try:
        parse(raw)
    except InvalidSpecError as error:
        return {problem.path: problem.message for problem in error.errors}
    return {}


def torch_takes(config: EnhancerConfig, side: int, *, images: int) -> bool | None:
    """Whether a training pass runs; None where the network cannot be built for this side."""
    try:
        enhancer = Enhancer(config, image_size=side, patch_size=1).train()
    except ModelError:
        return None
    try:
        enhancer(torch.zeros(images, 3, side, side))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        return False
    return True


def allowed(config: EnhancerConfig, side: int) -> bool:
    facts = facts_of(config)
    assert facts is not None
    least = one_image_from(config, facts)
    return least is not None and side >= least


@pytest.mark.parametrize("name", NETWORKS)
def test_one_image__is_taken_where_torch_takes_it(name: str) -> None:
    config, judged = EnhancerConfig(name=name), []
    for side in SIDES:
        taken = torch_takes(config, side, images=1)
        if taken is not None:
            assert allowed(config, side) is taken, side
            judged.append(side)
    assert torch_takes(config, judged[0], images=2), "two images always have a deviation"


@pytest.mark.parametrize("name", ["resnet10t", "regnetx_002", "efficientnet_lite0", "repvgg_a0"])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_one_image__output_stride_counts(name: str, stride: int) -> None:
    config = EnhancerConfig(name=name, options={"output_stride": stride, "drop_path_rate": 0.1})
    for side in (8, 9, 16, 17, 32, 33):
        assert allowed(config, side) is torch_takes(config, side, images=1), side


def test_submit__batch_norm_of_one_value_is_refused_with_the_ways_out() -> None:
    (message,) = [told for path, told in problems(spec()).items() if path == "training.batch_size"]
    for part in (
        "got 1",
        "resnet18",
        "at 32 pixels",
        "for example 2",
        "model.image_size: 40",
        "output_stride: 16",
    ):
        assert part in message


def test_submit__offers_an_output_stride_that_is_fine_enough() -> None:
    assert "output_stride: 8" in problems(spec(side=16))["training.batch_size"]
    assert "output_stride" not in problems(spec(side=8))["training.batch_size"]
    told = problems(spec(options={"output_stride": 32}))["training.batch_size"]
    assert "output_stride" not in told, "it is given, and its meaning is known"


@pytest.mark.parametrize(
    "sound",
    [
        spec(batch=2),
        spec(side=40),
        spec(options={"output_stride": 16}),
        spec(options={"norm_layer": "groupnorm"}),  # what this changes only a worker can tell
        spec("convnext_atto"),
        spec("vit_tiny_patch16_224"),
        spec("no_such_network"),
    ],
)
def test_submit__anything_else_is_not_refused_for_that(sound: dict[str, Any]) -> None:
    assert "training.batch_size" not in problems(sound)


def test_submit__workers_and_passes_share_the_batch() -> None:
    shared = spec(batch=6, resources={"workers": 3}, training__accumulation=2)
    message = problems(shared)["training.batch_size"]
    assert "resources.workers x training.accumulation = 6" in message
    assert "for example 12" in message
    assert "training.batch_size" not in problems({**shared, "resources": {"workers": 1}})


def test_submit__a_norm_behind_a_pooling_never_takes_one_image() -> None:
    message = problems(spec("skresnet18", side=224))["training.batch_size"]
    assert "for example 2" in message
    assert "image_size:" not in message


def test_facts__networks_without_batch_norm_take_any_image() -> None:
    assert EnhancerFacts(kind="vit", width=8).one_image_from == 1
