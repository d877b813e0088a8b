"""RESPIX: regress the original's pixels at all positions, normalised by their neighbourhood.

Shape letters in this file:
    B  images      C  colour channels (3)      H, W  image height and width, pixels
    N  token positions      D  feature channels      h  feature positions a side
    P  patches a side, each of p x p pixels

Images are in [0, 1]; normalised pixels have no unit. CIM (arXiv 2202.03382), section on RESPIX;
what the paper leaves open is listed in docs/method.md.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cim_core.config import ObjectiveConfig
from cim_core.models.heads import PixelHead
from cim_core.objectives.base import Objective, ObjectiveOutput, Truth

EPS = 1e-6  # added to the variance, as in MAE; without it flat areas become amplified rounding noise


class WindowStatistics(nn.Module):
    """Mean and deviation of the square window around each pixel, per channel.

    A window of even side reaches one pixel further right and down than left and up. Windows that
    overhang the border average only the pixels they cover.
    """

    def __init__(self, window: int, *, eps: float = EPS) -> None:
        super().__init__()
        self.window = window
        self.eps = eps

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Window means and deviations (eps included), each float32 [B, C, H, W]."""
        with torch.autocast(x_BCHW.device.type, enabled=False):
            x = x_BCHW.float()
            # E[x^2] - E[x]^2 cancels; it does so least where the image's own mean is taken off first.
            offset_BC11 = x.mean(dim=(2, 3), keepdim=True)
            x = x - offset_BC11
            sides, device = x.shape[2:], x.device
            rows_HH, columns_WW = (line_means(side, self.window, device=device) for side in sides)
            mean = rows_HH @ x @ columns_WW.T
            variance = (rows_HH @ x.square() @ columns_WW.T - mean.square()).clamp(min=0)
            return mean + offset_BC11, (variance + self.eps).sqrt()


def line_means(side: int, window: int, *, device: torch.device) -> Tensor:
    """[side, side]: row n times a line of pixels is the mean of those that the window around n covers.

    Two such products cost the same for every window; pooling one of 32 pixels takes 1024 additions a pixel.
    """
    place = torch.arange(side, device=device)
    offset = place[None, :] - place[:, None]
    covered = ((offset >= -((window - 1) // 2)) & (offset <= window // 2)).float()
    return covered / covered.sum(dim=1, keepdim=True)


class PatchStatistics(nn.Module):
    """Mean and deviation of the patch that each pixel lies in, one number for all channels, as in MAE.

    Patches of `patch` pixels a side tile the image. As in MAE's code (arXiv 2111.06377) the variance
    is over the p * p * C numbers of a patch together, with Bessel's correction.
    """

    def __init__(self, patch: int, *, eps: float = EPS) -> None:
        super().__init__()
        self.patch = patch
        self.eps = eps

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Patch means and deviations (eps included), each float32 [B, 1, H, W]; `patch` divides H and W."""
        with torch.autocast(x_BCHW.device.type, enabled=False):
            num_images, num_channels, height, width = x_BCHW.shape
            side = self.patch
            tiles = (num_images, num_channels, height // side, side, width // side, side)
            x_BCPpPp = x_BCHW.float().reshape(tiles)
            variance_BPP, mean_BPP = torch.var_mean(x_BCPpPp, dim=(1, 3, 5))
            return self._spread(mean_BPP), self._spread((variance_BPP + self.eps).sqrt())

    def _spread(self, values_BPP: Tensor) -> Tensor:
        """Each patch's value at all of its pixels, [B, 1, H, W]."""
        values_BPW = values_BPP.repeat_interleave(self.patch, dim=2)
        return values_BPW.repeat_interleave(self.patch, dim=1)[:, None]


class NoStatistics(nn.Module):
    """Mean 0 and deviation 1: pixels stay as they are."""

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros and ones, each float32 [B, C, H, W]."""
        zeros_BCHW = torch.zeros_like(x_BCHW, dtype=torch.float32)
        return zeros_BCHW, zeros_BCHW + 1


# What a pixel is normalised by, for a side in pixels: forward gives mean and deviation of each pixel.
STATISTICS: Mapping[str, Callable[[int], nn.Module]] = MappingProxyType(
    {"window": WindowStatistics, "patch": PatchStatistics, "none": lambda _: NoStatistics()}
)


class Respix(Objective):
    """Head and loss: `l1 * mean|d| + l2 * mean d^2` over all pixels, d = prediction - normalised original."""

    def __init__(
        self, config: ObjectiveConfig, *, width: int, feature_side: int, image_size: int, grid: int
    ) -> None:
        super().__init__()
        self.l1, self.l2, self.grid = config.l1, config.l2, grid
        self.statistics = STATISTICS[config.normalise](config.window)
        self.head = PixelHead(width, feature_side=feature_side, target_side=image_size)

    def forward(self, features_BDhh: Tensor, truth: Truth) -> ObjectiveOutput:
        """Judge features [B, D, h, h]; the prediction is [B, 3, H, W] in normalised pixels."""
        prediction_B3HW = self.head(features_BDhh).float()
        difference = prediction_B3HW - self.target(truth.clean_B3HW)
        absolute, squared = difference.abs().mean(), difference.square().mean()
        error_BN = self._error_per_position(difference.detach())
        metrics = {
            "respix_l1": absolute.detach(),
            "respix_l2": squared.detach(),
            "respix_error_replaced": masked_mean(error_BN, truth.replaced_BN),
            "respix_error_kept": masked_mean(error_BN, ~truth.replaced_BN),
        }
        loss = self.l1 * absolute + self.l2 * squared
        return ObjectiveOutput(loss=loss, metrics=metrics, prediction=prediction_B3HW)

    def target(self, clean_B3HW: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] of images in [0, 1]."""
        mean, deviation = self.statistics(clean_B3HW)
        target_B3HW: Tensor = (clean_B3HW.float() - mean) / deviation
        return target_B3HW

    def picture(self, prediction: Tensor, *, clean_B3HW: Tensor, corrupted_B3HW: Tensor) -> Tensor:
        """The prediction [B, 3, H, W] as images in [0, 1].

        The network predicts pixels relative to their window or patch; to be seen, they are put back
        with the statistics OF THE ORIGINAL. So brightness and contrast of the picture are given, and
        only the structure in it is the network's. Without normalisation all of it is.
        """
        del corrupted_B3HW
        mean, deviation = self.statistics(clean_B3HW)
        restored_B3HW: Tensor = prediction.float() * deviation + mean
        return restored_B3HW.clamp(0, 1)

    def _error_per_position(self, difference_B3HW: Tensor) -> Tensor:
        """Mean absolute error of each token position, [B, N]."""
        return F.adaptive_avg_pool2d(difference_B3HW.abs().mean(dim=1), self.grid).flatten(1)


def masked_mean(values_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """Mean of the values where the mask is True; 0 where it is True nowhere."""
    weights = mask_BN.to(values_BN.dtype)
    return (values_BN * weights).sum() / weights.sum().clamp(min=1)
