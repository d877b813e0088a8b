import math
from typing import Literal

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from cim_core.config import ObjectiveConfig
from cim_core.objectives.base import Truth
from cim_core.objectives.revdet import Revdet, area_under_roc, balanced_accuracy

REPLACED = torch.tensor([[True, False, False, False], [False, True, True, False]])
MASK = torch.tensor([[True, True, False, False], [True, True, True, False]])


def judge(logits_BN: Tensor, *, replaced: Tensor = REPLACED) -> tuple[Revdet, Tensor, dict[str, Tensor]]:
    """The objective on features that are the logits themselves."""
    model = Revdet(ObjectiveConfig(name="revdet"), width=1, feature_side=2, image_size=8, grid=2)
    torch.nn.init.ones_(model.head.proj.weight)
    truth = Truth(clean_B3HW=torch.zeros(2, 3, 8, 8), mask_BN=MASK, replaced_BN=replaced)
    output = model(logits_BN.view(2, 1, 2, 2), truth)
    assert torch.equal(output.prediction, logits_BN)
    return model, output.loss, output.metrics


def test_loss__is_the_mean_cross_entropy_over_all_positions() -> None:
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    _, loss, _ = judge(logits)
    total = 0.0
    for logit, label in zip(logits.flatten().tolist(), REPLACED.flatten().tolist(), strict=True):
        probability = 1 / (1 + math.exp(-logit))
        total -= math.log(probability if label else 1 - probability)
    assert loss.item() == pytest.approx(total / 8, rel=1e-5)


@pytest.mark.parametrize(("upsample", "logits_each"), [("pixel_shuffle", 4), ("bilinear", 1)])
def test_upsample__reaches_the_head(upsample: Literal["pixel_shuffle", "bilinear"], logits_each: int) -> None:
    config = ObjectiveConfig(name="revdet", upsample=upsample)
    model = Revdet(config, width=5, feature_side=2, image_size=32, grid=4)
    assert model.head.proj.weight.shape == (logits_each, 5, 1, 1)


def test_labels__are_replaced_and_not_masked_positions() -> None:
    _, right, _ = judge(torch.where(REPLACED, 9.0, -9.0))
    _, wrong, _ = judge(torch.where(MASK, 9.0, -9.0))
    assert right.item() < 0.001
    assert wrong.item() > 1


def test_metrics__balanced_accuracy_and_positive_rate() -> None:
    logits = torch.tensor([[1.0, 1.0, -1.0, -1.0], [-1.0, 1.0, -1.0, -1.0]])
    _, _, metrics = judge(logits)
    assert metrics["revdet_balanced_accuracy"].item() == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert metrics["revdet_positive_rate"].item() == pytest.approx(3 / 8)


def test_metrics__a_logit_of_zero_or_less_is_no() -> None:
    logits = torch.where(REPLACED, 0.5, 0.0)
    logits[0, 1] = -0.5
    _, _, metrics = judge(logits)
    assert metrics["revdet_balanced_accuracy"].item() == 1


def test_balanced_accuracy__always_no_is_a_half_however_rare_the_positives() -> None:
    labels = torch.zeros(10, 10, dtype=torch.bool)
    labels[0, 0] = True
    assert balanced_accuracy(torch.zeros_like(labels), labels).item() == pytest.approx(0.5)


def test_balanced_accuracy__a_single_positive_that_is_found_counts_whole() -> None:
    labels = torch.tensor([[True, False, False, False]])
    assert balanced_accuracy(labels, labels).item() == 1


@pytest.mark.parametrize("kind", [True, False])
def test_balanced_accuracy__counts_one_kind_where_the_other_is_absent(*, kind: bool) -> None:
    labels = torch.full((1, 4), kind)
    guessed = torch.tensor([[kind, kind, kind, not kind]])
    assert balanced_accuracy(guessed, labels).item() == pytest.approx(0.75)


@pytest.mark.parametrize("levels", [3, 1000])
def test_area_under_roc__agrees_with_scikit_learn(levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    labels = torch.rand(7, 30, generator=generator) < 0.3
    scores = torch.randint(levels, (7, 30), generator=generator).float() + labels  # few levels: many ties
    expected = roc_auc_score(labels.flatten().numpy(), scores.flatten().numpy())
    assert area_under_roc(scores, labels).item() == pytest.approx(expected, rel=1e-6)
    assert 0.5 < expected < 1


@pytest.mark.parametrize("kind", [True, False])
def test_area_under_roc__is_a_half_where_one_kind_is_absent(*, kind: bool) -> None:
    assert area_under_roc(torch.tensor([[0.1, 0.7]]), torch.full((1, 2), kind)).item() == 0.5


@pytest.mark.parametrize(("scores", "expected"), [([0.7, 0.1], 1.0), ([0.1, 0.7], 0.0), ([0.4, 0.4], 0.5)])
def test_area_under_roc__of_a_single_pair(scores: list[float], expected: float) -> None:
    assert area_under_roc(torch.tensor([scores]), torch.tensor([[True, False]])).item() == expected


def test_metrics__area_under_roc_is_of_the_logits_and_not_of_their_sign() -> None:
    _, _, metrics = judge(torch.where(REPLACED, 3.0, 1.0))
    assert metrics["revdet_auc"].item() == 1
    assert metrics["revdet_balanced_accuracy"].item() == 0.5


def test_picture__is_red_where_the_network_suspects_and_grey_elsewhere() -> None:
    model, _, _ = judge(torch.zeros(2, 4))
    logits = torch.tensor([[30.0, -30.0, -30.0, -30.0], [-30.0] * 4])
    corrupted = torch.rand(2, 3, 8, 8)
    picture = model.picture(logits, clean_B3HW=corrupted, corrupted_B3HW=corrupted)
    grey = corrupted.mean(dim=1)
    assert torch.allclose(picture[0, :, 6, 6], grey[0, 6, 6].expand(3), atol=1e-6)
    assert torch.allclose(picture[0, :, 1, 1], 0.4 * grey[0, 1, 1] + torch.tensor([0.6, 0.0, 0.0]), atol=1e-6)
