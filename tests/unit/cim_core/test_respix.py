from typing import Literal

import pytest
import torch
from torch import Tensor

from cim_core.config import ObjectiveConfig
from cim_core.objectives.base import Truth
from cim_core.objectives.respix import PatchStatistics, Respix, WindowStatistics, line_means, masked_mean


def by_hand(image_CHW: Tensor, window: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each pixel's window in float64, one pixel at a time."""
    image = image_CHW.double()
    mean, deviation = torch.empty_like(image), torch.empty_like(image)
    before, after = (window - 1) // 2, window // 2
    for c, y, x in torch.cartesian_prod(*(torch.arange(n) for n in image.shape)).tolist():
        patch = image[c, max(0, y - before) : y + after + 1, max(0, x - before) : x + after + 1]
        mean[c, y, x] = patch.mean()
        deviation[c, y, x] = (patch.var(correction=0) + eps).sqrt()
    return mean, deviation


@pytest.mark.parametrize("window", [2, 3, 7, 8, 20, 64])
def test_statistics__match_windows_by_hand(window: int) -> None:
    images = torch.rand(3, 3, 11, 13, generator=torch.Generator().manual_seed(0))
    mean, deviation = WindowStatistics(window)(images)
    for b in range(3):
        expected_mean, expected_deviation = by_hand(images[b], window, 1e-6)
        assert torch.allclose(mean[b].double(), expected_mean, atol=1e-6)
        assert torch.allclose(deviation[b].double(), expected_deviation, rtol=1e-5, atol=1e-5)


def test_statistics__a_window_on_a_border_is_one_mean_of_what_it_covers() -> None:
    lines_3x3 = line_means(3, 2, device=torch.device("cpu"))
    assert lines_3x3.tolist() == [[0.5, 0.5, 0], [0, 0.5, 0.5], [0, 0, 1]]


def test_statistics__an_even_window_reaches_further_right_and_down() -> None:
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 4] = 1
    mean, _ = WindowStatistics(4)(image)
    assert (mean[0, 0] > 1e-4).nonzero().tolist() == [[y, x] for y in range(2, 6) for x in range(2, 6)]


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_statistics__a_bright_flat_image_has_the_floor_as_deviation(level: float) -> None:
    mean, deviation = WindowStatistics(8)(torch.full((1, 3, 20, 20), level))
    assert torch.allclose(mean, torch.tensor(level))
    assert torch.allclose(deviation, torch.tensor(1e-3), rtol=0.01)


def test_statistics__stay_exact_under_autocast() -> None:
    images = torch.rand(1, 3, 16, 16)
    expected = WindowStatistics(8)(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean, deviation = WindowStatistics(8)(images)
    assert mean.dtype == torch.float32
    assert torch.equal(mean, expected[0])
    assert torch.equal(deviation, expected[1])


def patches_by_hand(image_CHW: Tensor, side: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each pixel's patch in float64: MAE's, over pixels and channels together."""
    image = image_CHW.double()
    mean, deviation = torch.empty_like(image), torch.empty_like(image)
    for y, x in torch.cartesian_prod(*(torch.arange(n) for n in image.shape[1:])).tolist():
        top, left = y - y % side, x - x % side
        numbers = [float(n) for n in image[:, top : top + side, left : left + side].flatten()]
        middle = sum(numbers) / len(numbers)
        variance = sum((number - middle) ** 2 for number in numbers) / (len(numbers) - 1)
        mean[:, y, x], deviation[:, y, x] = middle, (variance + eps) ** 0.5
    return mean, deviation


@pytest.mark.parametrize("side", [2, 3, 6])
def test_patches__match_a_loop_by_hand(side: int) -> None:
    images = torch.rand(2, 3, 6, 12, generator=torch.Generator().manual_seed(0))
    mean, deviation = PatchStatistics(side)(images)
    for b in range(2):
        expected_mean, expected_deviation = patches_by_hand(images[b], side, 1e-6)
        assert torch.allclose(mean[b].expand(3, -1, -1).double(), expected_mean, atol=1e-6)
        assert torch.allclose(deviation[b].expand(3, -1, -1).double(), expected_deviation, rtol=1e-4)


def test_patches__a_flat_image_has_the_floor_as_deviation() -> None:
    mean, deviation = PatchStatistics(8)(torch.full((1, 3, 16, 16), 0.7))
    assert torch.allclose(mean, torch.tensor(0.7))
    assert torch.allclose(deviation, torch.tensor(1e-3), rtol=0.01)


def test_patches__stay_exact_under_autocast() -> None:
    images = torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean, deviation = PatchStatistics(8)(images)
    expected = PatchStatistics(8)(images)
    assert torch.equal(mean, expected[0])
    assert torch.equal(deviation, expected[1])


def test_target__without_normalisation_is_the_image() -> None:
    known = truth()
    assert torch.equal(objective(normalise="none").target(known.clean_B3HW), known.clean_B3HW)


def test_target__by_patch_is_normalised_by_patch() -> None:
    known = truth()
    target = objective(normalise="patch").target(known.clean_B3HW)
    mean, deviation = patches_by_hand(known.clean_B3HW[1], 4, 1e-6)
    assert torch.allclose(target[1].double(), (known.clean_B3HW[1].double() - mean) / deviation, atol=1e-4)
    by_patch = target.unflatten(3, (2, 4)).unflatten(2, (2, 4)).transpose(3, 4).flatten(4)  # type: ignore[no-untyped-call]
    assert by_patch.mean(dim=(1, 4)).abs().max().item() < 1e-5


def objective(
    *, l1: float = 1.0, l2: float = 1.0, normalise: Literal["window", "patch", "none"] = "window"
) -> Respix:
    config = ObjectiveConfig(name="respix", window=4, l1=l1, l2=l2, normalise=normalise)
    return Respix(config, width=6, feature_side=2, image_size=8, grid=2)


def truth() -> Truth:
    replaced = torch.tensor([[True, False, False, False], [False, True, True, False]])
    mask = torch.tensor([[True, True, False, False], [False, True, True, False]])
    clean = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return Truth(clean_B3HW=clean, mask_BN=mask, replaced_BN=replaced)


def test_loss__is_the_weighted_sum_over_all_pixels() -> None:
    features, known = torch.randn(2, 6, 2, 2), truth()
    model = objective(l1=0.7, l2=0.2)
    output = model(features, known)
    absolute = squared = 0.0
    for b in range(2):
        mean, deviation = by_hand(known.clean_B3HW[b], 4, 1e-6)
        difference = output.prediction[b].double() - (known.clean_B3HW[b].double() - mean) / deviation
        absolute += difference.detach().abs().sum().item() / (2 * 3 * 64)
        squared += difference.detach().square().sum().item() / (2 * 3 * 64)
    assert output.loss.item() == pytest.approx(0.7 * absolute + 0.2 * squared, rel=1e-4)
    assert output.metrics["respix_l1"].item() == pytest.approx(absolute, rel=1e-4)
    assert output.metrics["respix_l2"].item() == pytest.approx(squared, rel=1e-4)


def test_metrics__tell_replaced_from_kept_positions() -> None:
    known, model = truth(), objective()
    output = model(torch.randn(2, 6, 2, 2), known)
    error = (output.prediction - model.target(known.clean_B3HW)).abs()
    replaced = torch.stack(
        [error[0, :, :4, :4].mean(), error[1, :, :4, 4:].mean(), error[1, :, 4:, :4].mean()]
    )
    kept_sum = error.mean(dim=1).view(2, 2, 4, 2, 4).mean(dim=(2, 4)).sum() - replaced.sum()
    assert output.metrics["respix_error_replaced"].item() == pytest.approx(replaced.mean().item(), rel=1e-5)
    assert output.metrics["respix_error_kept"].item() == pytest.approx(kept_sum.item() / 5, rel=1e-5)


def test_metrics__carry_no_gradient_and_the_loss_does() -> None:
    output = objective()(torch.randn(2, 6, 2, 2), truth())
    assert output.loss.requires_grad
    assert not any(metric.requires_grad for metric in output.metrics.values())


@pytest.mark.parametrize("normalise", ["window", "patch", "none"])
def test_picture__of_the_exact_target_is_the_original(normalise: Literal["window", "patch", "none"]) -> None:
    model, known = objective(normalise=normalise), truth()
    target = model.target(known.clean_B3HW)
    grey = torch.zeros_like(known.clean_B3HW)
    restored = model.picture(target, clean_B3HW=known.clean_B3HW, corrupted_B3HW=grey)
    assert torch.allclose(restored, known.clean_B3HW, atol=1e-5)


def test_masked_mean__of_nothing_is_zero() -> None:
    assert masked_mean(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)).item() == 0


def test_masked_mean__of_a_single_position_is_its_value() -> None:
    mask = torch.tensor([[False, True, False]])
    assert masked_mean(torch.tensor([[1.0, 5.0, 2.0]]), mask).item() == 5


def test_picture__stays_between_black_and_white() -> None:
    model, known = objective(), truth()
    wild = torch.full_like(known.clean_B3HW, 1000.0)
    wild[:, :, ::2] *= -1
    picture = model.picture(wild, clean_B3HW=known.clean_B3HW, corrupted_B3HW=known.clean_B3HW)
    assert (picture.min().item(), picture.max().item()) == (0, 1)
