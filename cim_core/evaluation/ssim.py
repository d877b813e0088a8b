"""Structural similarity of two images (Wang, Bovik, Sheikh and Simoncelli, 2004).

Shape letters in this file:
    B  images      H, W  image sides, pixels      h, w  positions of a window that lies inside
"""

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW = 11  # pixels a side; smaller images have no similarity
_DEVIATION = 1.5  # of the Gaussian weights inside the window, pixels
_C1, _C2 = 0.01**2, 0.03**2  # for values in [0, 1]


def ssim(images_B3HW: Tensor, others_B3HW: Tensor) -> Tensor:
    """Similarity [B] of float images in [0, 1], at most 1: each channel's mean over all whole windows.

    Raises ValueError where a side is shorter than a window.
    """
    height, width = images_B3HW.shape[-2:]
    if min(height, width) < WINDOW:
        raise ValueError(f"SSIM needs sides of at least {WINDOW} pixels, got {height} x {width}")
    x, y = images_B3HW.double(), others_B3HW.double()
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x.square()
    variance_y = _blur(y * y) - mean_y.square()
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x.square() + mean_y.square() + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blur(x_B3HW: Tensor) -> Tensor:
    """Gaussian means [B, 3, h, w], one direction after the other."""
    places = torch.arange(WINDOW, dtype=x_B3HW.dtype, device=x_B3HW.device) - WINDOW // 2
    weights = (-places.square() / (2 * _DEVIATION**2)).exp()
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    rows = F.conv2d(x_B3HW, weights, groups=3)
    return F.conv2d(rows, weights.transpose(2, 3), groups=3)
