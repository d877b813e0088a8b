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


def enlarged_by_hand(row: list[float], side: int) -> list[float]:
    """Linear interpolation between pixel centres; beyond the outer centres the outer values go on."""
    result = []
    for place in range(side):
        centre = (place + 0.5) * len(row) / side - 0.5
        left = min(max(int(centre // 1), 0), len(row) - 1)
        right = min(left + 1, len(row) - 1)
        share = min(max(centre - left, 0.0), 1.0)
        result.append(row[left] * (1 - share) + row[right] * share)
    return result


@pytest.mark.parametrize(("side", "target"), [(2, 4), (2, 5), (7, 14), (1, 3)])
def test_bilinear_head__is_one_logit_a_position_enlarged(side: int, target: int) -> None:
    head = DetectionHead(3, feature_side=side, target_side=target, upsample="bilinear")
    features = torch.randn(1, 3, side, side)
    weight, bias = head.proj.weight[0, :, 0, 0], head.proj.bias
    assert head.proj.weight.shape == (1, 3, 1, 1)
    assert bias is not None
    coarse = [[(weight @ features[0, :, y, x] + bias).item() for x in range(side)] for y in range(side)]
    wide = [enlarged_by_hand(row, target) for row in coarse]
    columns = [enlarged_by_hand(list(column), target) for column in zip(*wide, strict=True)]
    expected = torch.tensor(columns).T.flatten()
    assert torch.allclose(head(features)[0], expected, atol=1e-5)


def test_bilinear_head__equals_a_linear_layer_on_the_enlarged_features() -> None:
    head = DetectionHead(3, feature_side=2, target_side=4, upsample="bilinear")
    torch.nn.init.constant_(head.proj.bias, 0.3)  # type: ignore[arg-type]
    features = torch.randn(2, 3, 2, 2)
    enlarged = torch.nn.functional.interpolate(features, size=(4, 4), mode="bilinear")
    assert torch.allclose(head(features), head.proj(enlarged).flatten(1), atol=1e-6)


@pytest.mark.parametrize("side", [5, 10])
def test_bilinear_head__is_the_other_one_where_the_map_is_not_coarser(side: int) -> None:
    features = torch.randn(1, 3, side, side)
    shuffled = DetectionHead(3, feature_side=side, target_side=5)
    bilinear = DetectionHead(3, feature_side=side, target_side=5, upsample="bilinear")
    bilinear.load_state_dict(shuffled.state_dict())
    assert torch.equal(shuffled(features), bilinear(features))


def test_upscale_head__every_weight_gets_gradient_where_the_sides_do_not_fit() -> None:
    head = PixelHead(4, feature_side=2, target_side=65)
    head(torch.randn(2, 4, 2, 2)).square().mean().backward()
    gradient = head.proj.weight.grad
    assert gradient is not None
    assert bool((gradient.abs().sum(dim=(1, 2, 3)) > 0).all())
