"""Structural similarity against scikit-image."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from cim_core.evaluation.ssim import ssim


def pictures(seed: int, *, height: int = 24, width: int = 17) -> Tensor:
    """Two smooth pictures in [0, 1], as photographs are, and not noise alone."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, 5, 4, generator=g)
    return torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")


def theirs(image: Tensor, other: Tensor) -> float:
    a, b = (x.permute(1, 2, 0).double().numpy() for x in (image, other))
    value = structural_similarity(
        a, b, channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return float(np.float64(value))


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.3])
def test_ssim__is_scikit_images(noise: float) -> None:
    images = pictures(0)
    others = (images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(1))).clamp(
        0, 1
    )
    expected = [theirs(a, b) for a, b in zip(images, others, strict=True)]
    assert ssim(images, others).tolist() == pytest.approx(expected, abs=1e-9)


def test_ssim__of_equals_is_one_and_of_unlike_pictures_far_less() -> None:
    images = pictures(0)
    assert ssim(images, images).tolist() == pytest.approx([1.0, 1.0])
    assert ssim(images, pictures(3)).max() < 0.9


def test_ssim__needs_a_window() -> None:
    with pytest.raises(ValueError, match="at least 11 pixels, got 24 x 10"):
        ssim(pictures(0, width=10), pictures(0, width=10))
