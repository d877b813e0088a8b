"""One check for each mistake that re-implementations of CIM make; test_planted_faults plants them all.

A check asserts on the real code. It is worth something only because it goes red where the mistake
is planted, which is tested beside it.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cim_core.cim import build_cim
from cim_core.config import (
    GeneratorConfig,
    ObjectiveConfig,
    TokenizerConfig,
    TokenizerSource,
    TrainingConfig,
)
from cim_core.data.dataset import Views
from cim_core.durations import Plan
from cim_core.engine.state import TrainState
from cim_core.engine.step import train_step
from cim_core.errors import ModelError
from cim_core.models.generator import SmallBEiT
from cim_core.objectives.respix import Respix
from cim_core.objectives.revdet import Revdet
from cim_core.optim import build_optimizer
from cim_core.schedule import learning_rate
from cim_core.task import cim_task
from cim_core.tokenizers.dvae import DiscreteVAE
from cim_core.tokenizers.fake import FakeTokenizer
from tests.unit.cim_core.cim_models import model_config, rng, tiny_cim, views_for


def generator_cannot_read_the_answer() -> None:
    """What a masked patch shows must not change any logit."""
    config = GeneratorConfig(depth=1, width=32, heads=2)
    model = SmallBEiT(config, image_size=24, patch_size=8, vocab_size=11).eval()
    mask = torch.zeros(1, 9, dtype=torch.bool)
    mask[0, 4] = True
    images = torch.randn(1, 3, 24, 24, generator=rng())
    changed = images.clone()
    changed[:, :, 8:16, 8:16] += 5
    assert torch.equal(model(images, mask), model(changed, mask))


class RecordingTokenizer(FakeTokenizer):
    """Keeps the lowest and highest value that it was given."""

    def encode(self, images_B3HW: Tensor) -> Tensor:
        self.seen = (images_B3HW.min().item(), images_B3HW.max().item())
        return super().encode(images_B3HW)


def tokenizer_is_given_images_from_0_to_1() -> None:
    """Black is 0 and white is 1 for the tokenizer, not -1 and 1 and not ImageNet-normalised."""
    tokenizer = RecordingTokenizer(vocab_size=16, stride=4)
    cim = tiny_cim(tokenizer=tokenizer)
    halves = torch.cat([torch.zeros(2, 3, 16, 8), torch.full((2, 3, 16, 8), 255.0)], dim=3).byte()
    views = views_for(cim, num_images=2)
    cim(Views(pixels_B3HW=views.pixels_B3HW, token_pixels_B3HW=halves, ids_B2=views.ids_B2), generator=rng())
    assert tokenizer.seen == (0.0, 1.0)


def tiny_dvae() -> DiscreteVAE:
    config = TokenizerConfig(image_size=8, stride=2, width=2, vocab_size=4, code_dim=2)
    return DiscreteVAE(config, generator=rng()).eval()


def tokenizer_network_sees_its_own_mapping() -> None:
    """The dVAE's encoder works on 0.8 x + 0.1."""
    model = tiny_dvae()
    seen: list[Tensor] = []
    model.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.encode(torch.tensor([0.0, 0.5, 1.0, 0.25]).view(1, 1, 1, 4).expand(1, 3, 4, 4))
    assert seen[0][0, 0, 0].tolist() == pytest.approx([0.1, 0.5, 0.9, 0.3])


def decoder_output_becomes_pixels() -> None:
    """Sigmoid of the first three channels, mapping undone, clamped."""
    model = tiny_dvae()
    logits = torch.tensor([-10.0, -1.0, 0.0, 1.0, 10.0])

    class Constant(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            return logits.view(1, 1, 1, 5).expand(1, 6, 1, 5)

    model.decoder = Constant()  # type: ignore[assignment]
    pixels = model.decode(torch.zeros(1, 1, 1, dtype=torch.int64))
    expected = [min(max((1 / (1 + math.exp(-x)) - 0.1) / 0.8, 0), 1) for x in logits.tolist()]
    assert pixels.shape == (1, 3, 1, 5)
    assert pixels[0, 0, 0].tolist() == pytest.approx(expected, abs=1e-6)


def every_image_has_a_mask_of_its_own() -> None:
    """Twelve images with the same mask would be chance of less than one in a billion."""
    cim = tiny_cim()
    masks = cim(views_for(cim, num_images=12), generator=rng()).mask_BN
    assert len({tuple(row.tolist()) for row in masks}) > 1


def revdet_judges_every_position_by_itself() -> None:
    """A feature map that differs between positions gives logits that differ likewise."""
    head = Revdet(ObjectiveConfig(name="revdet"), width=4, feature_side=3, image_size=24, grid=3).head
    features = torch.randn(2, 4, 3, 3, generator=rng())
    changed = features.clone()
    changed[0, :, 1, 2] += 1
    differs = head(features) != head(changed)
    assert differs.nonzero().tolist() == [[0, 5]]


def lucky_samples_count_as_golden() -> None:
    """The label is `masked and sampled != golden`, not the mask bit."""
    config = model_config(objective="revdet")
    cim = tiny_cim(config, tokenizer=FakeTokenizer(vocab_size=2, stride=4))
    output = cim(views_for(cim, num_images=8), generator=rng())
    labels = output.mask_BN & (output.sampled_BN != output.golden_BN)
    assert labels.sum() < output.mask_BN.sum()
    expected = nn.functional.binary_cross_entropy_with_logits(output.prediction, labels.float())
    assert output.losses["revdet"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert output.metrics["revdet_positive_rate"].item() == pytest.approx(labels.float().mean().item())


def flat_areas_have_calm_targets() -> None:
    """A flat wall with noise of a hundred-thousandth must not become a target of full contrast."""
    model = Respix(ObjectiveConfig(name="respix"), width=4, feature_side=4, image_size=32, grid=4)
    wall = torch.full((1, 3, 32, 32), 0.7) + 1e-5 * torch.randn(1, 3, 32, 32, generator=rng())
    assert model.target(wall).abs().max().item() < 0.1


def last_stage_of_a_cnn_learns() -> None:
    """The enhancer's loss reaches every weight of the ResNet's stage 4."""
    for objective in ("respix", "revdet"):
        cim = tiny_cim(model_config(name="test_resnet", objective=objective))
        stage = {name: p for name, p in cim.enhancer.backbone.named_parameters() if name.startswith("layer4")}
        # The last norm of a branch starts at zero, behind which nothing is learned in the first step.
        nn.init.ones_(stage["layer4.0.bn2.weight"])
        cim(views_for(cim), generator=rng()).losses[objective].backward()
        assert stage
        assert [name for name, p in stage.items() if p.grad is None or not p.grad.any()] == []


def learning_rate_follows_the_schedule() -> None:
    """The optimizer steps with the schedule's rate, which moves."""
    cim = tiny_cim()
    training = TrainingConfig(steps=4, batch_size=2, precision="fp32")
    plan = Plan(total_steps=4, warmup_steps=2, checkpoint_steps=frozenset({4}), sample_steps=frozenset({4}),
                batch_size=2, num_images=8)  # fmt: skip
    state = TrainState(model=cim, optimizer=build_optimizer(cim, training))
    rates = []
    for step in range(4):
        batch = views_for(cim, num_images=2, seed=step)
        train_step(
            cim_task(cim, seed=0), state, batch, plan=plan, training=training, device=torch.device("cpu")
        )
        rates.append(state.optimizer.param_groups[0]["lr"])
    assert rates == [learning_rate(step, training, plan) for step in range(4)]
    assert len(set(rates)) == 4


def a_fake_tokenizer_has_to_be_asked_for() -> None:
    """A real source that yields the stand-in is refused before any training."""
    asked = model_config()
    real = replace(asked, tokenizer=TokenizerSource(source="job:my-tokenizer"))
    build_cim(asked, FakeTokenizer(vocab_size=16, stride=4))
    try:
        build_cim(real, FakeTokenizer(vocab_size=16, stride=4))
    except ModelError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert "untrained stand-in" in refusal
