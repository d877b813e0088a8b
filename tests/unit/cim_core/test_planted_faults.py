"""METHOD section 10: every check passes on the real code and goes red where its mistake is planted."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cim_core import cim as cim_module
from cim_core import pretraining as pretraining_module
from cim_core.engine import step as step_module
from cim_core.masking import make_mask
from cim_core.models.enhancer import Enhancer
from cim_core.models.generator import SmallBEiT
from cim_core.models.heads import DetectionHead
from cim_core.objectives.base import ObjectiveOutput, Truth
from cim_core.objectives.respix import WindowStatistics
from cim_core.objectives.revdet import Revdet
from cim_core.tokenizers import dvae as dvae_module
from cim_core.tokenizers.dvae import DiscreteVAE
from cim_core.tokenizers.fake import FakeTokenizer
from tests.unit.cim_core import fault_checks as checks

Plant = Callable[[pytest.MonkeyPatch], None]


def mask_never_applied(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SmallBEiT, "apply_mask", lambda self, tokens_BND, mask_BN: tokens_BND)


def images_from_minus_one(patch: pytest.MonkeyPatch) -> None:
    for module in (cim_module, pretraining_module):
        patch.setattr(module, "to_unit", lambda pixels: pixels.float() / 127.5 - 1)


def pixels_not_mapped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dvae_module, "map_pixels", lambda images: images)


def raw_decoder_output(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DiscreteVAE, "_paint", lambda self, code: self.decoder(code)[:, :3])


def sigmoid_without_unmapping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dvae_module, "unmap_pixels", lambda mapped: mapped)


def one_mask_for_the_batch(patch: pytest.MonkeyPatch) -> None:
    real = make_mask
    patch.setattr(cim_module, "make_mask", lambda num, *args: real(1, *args).expand(num, -1))


def one_verdict_for_the_picture(patch: pytest.MonkeyPatch) -> None:
    real = DetectionHead.forward

    def forward(self: DetectionHead, features_BDhh: Tensor) -> Tensor:
        logits_BN = real(self, features_BDhh)
        return logits_BN.mean(dim=1, keepdim=True).expand_as(logits_BN)

    patch.setattr(DetectionHead, "forward", forward)


def labels_are_mask_bits(patch: pytest.MonkeyPatch) -> None:
    real = Revdet.forward

    def forward(self: Revdet, features_BDhh: Tensor, truth: Truth) -> ObjectiveOutput:
        return real(self, features_BDhh, replace(truth, replaced_BN=truth.mask_BN))

    patch.setattr(Revdet, "forward", forward)


def tiny_variance_floor(patch: pytest.MonkeyPatch) -> None:
    real = WindowStatistics.__init__
    patch.setattr(WindowStatistics, "__init__", lambda self, window: real(self, window, eps=1e-12))


def features_of_stage_three(patch: pytest.MonkeyPatch) -> None:
    def forward(self: Enhancer, images_B3HW: Tensor) -> Tensor:
        net = self.backbone
        x = net.maxpool(net.act1(net.bn1(net.conv1(images_B3HW))))  # type: ignore[operator]
        x = net.layer3(net.layer2(net.layer1(x)))  # type: ignore[operator]
        x = torch.nn.functional.adaptive_avg_pool2d(x, self.side)
        return x.repeat(1, -(-self.width // x.shape[1]), 1, 1)[:, : self.width]

    patch.setattr(Enhancer, "forward", forward)


def features_that_weigh_nothing(patch: pytest.MonkeyPatch) -> None:
    real = Enhancer.forward
    patch.setattr(Enhancer, "forward", lambda self, images_B3HW: 0 * real(self, images_B3HW))


def schedule_never_stepped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(step_module, "set_learning_rate", lambda state, training, plan: training.learning_rate)


def fake_that_does_not_say_so(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FakeTokenizer, "is_fake", False)


FAULTS: dict[Plant, Callable[[], None]] = {
    mask_never_applied: checks.generator_cannot_read_the_answer,
    images_from_minus_one: checks.tokenizer_is_given_images_from_0_to_1,
    pixels_not_mapped: checks.tokenizer_network_sees_its_own_mapping,
    raw_decoder_output: checks.decoder_output_becomes_pixels,
    sigmoid_without_unmapping: checks.decoder_output_becomes_pixels,
    one_mask_for_the_batch: checks.every_image_has_a_mask_of_its_own,
    one_verdict_for_the_picture: checks.revdet_judges_every_position_by_itself,
    labels_are_mask_bits: checks.lucky_samples_count_as_golden,
    tiny_variance_floor: checks.flat_areas_have_calm_targets,
    features_of_stage_three: checks.last_stage_of_a_cnn_learns,
    features_that_weigh_nothing: checks.last_stage_of_a_cnn_learns,
    schedule_never_stepped: checks.learning_rate_follows_the_schedule,
    fake_that_does_not_say_so: checks.a_fake_tokenizer_has_to_be_asked_for,
}


@pytest.mark.parametrize("check", dict.fromkeys(FAULTS.values()), ids=lambda check: check.__name__)
def test_check__passes_on_the_real_code(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_check__goes_red_where_the_fault_is_planted(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        FAULTS[plant]()
