import pytest
import torch

from cim_core.models.heads import DetectionHead, PixelHead


@pytest.mark.parametrize("side", [1, 2, 3, 7, 14, 28, 56])
@pytest.mark.parametrize("target", [14, 15, 65, 224])
def test_pixel_head__reaches_the_target_from_any_stride(side: int, target: int) -> None:
    head = PixelHead(8, feature_side=side, target_side=target)
    assert head(torch.randn(2, 8, side, side)).shape == (2, 3, target, target)


@pytest.mark.parametrize("side", [1, 2, 4, 5, 7])
def test_detection_head__gives_one_logit_a_position(side: int) -> None:
    head = DetectionHead(8, feature_side=side, target_side=5)
    assert head(torch.randn(2, 8, side, side)).shape == (2, 25)


def test_pixel_head__is_one_linear_layer_per_token_where_the_sides_fit() -> None:
    head = PixelHead(8, feature_side=2, target_side=8)
    features = torch.randn(1, 8, 2, 2)
    assert head.proj.bias is not None
    patch = head.proj.weight[:, :, 0, 0] @ features[0, :, 1, 0] + head.proj.bias
    expected = patch.view(3, 4, 4)
    assert torch.allclose(head(features)[0, :, 4:8, 0:4], expected, atol=1e-6)


def test_detection_head__is_row_major() -> None:
    head = DetectionHead(1, feature_side=3, target_side=3)
    torch.nn.init.ones_(head.proj.weight)
    features = torch.arange(9.0).view(1, 1, 3, 3)
    assert head(features)[0].tolist() == list(range(9))


def test_detection_head__shrinks_by_averaging_so_that_every_feature_counts() -> None:
    head = DetectionHead(1, feature_side=6, target_side=3)
    torch.nn.init.ones_(head.proj.weight)
    features = torch.randn(1, 1, 6, 6)
    expected = features[0, 0, 2:4, 4:6].mean()
    assert head(features)[0, 5].item() == pytest.approx(expected.item(), abs=1e-6)


def test_upscale_head__every_weight_gets_gradient_where_the_sides_do_not_fit() -> None:
    head = PixelHead(4, feature_side=2, target_side=65)
    head(torch.randn(2, 4, 2, 2)).square().mean().backward()
    gradient = head.proj.weight.grad
    assert gradient is not None
    assert bool((gradient.abs().sum(dim=(1, 2, 3)) > 0).all())
