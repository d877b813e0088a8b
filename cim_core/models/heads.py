"""Heads that turn a feature map of any stride into pixels or into one logit a token position.

Shape letters in this file:
    B  images      D  feature channels      C  output channels
    h  feature positions a side             s  output positions a side
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from cim_core.models.init import init_linear


class UpscaleHead(nn.Module):
    """A linear layer per feature position and a pixel shuffle, to an exact output side.

    For a ViT and pixels this is one linear layer per token (METHOD: as in MAE); for a CNN it is
    SimMIM's 1x1 convolution with PixelShuffle. Where the ratio of the sides is no integer, the shuffle
    goes to the next larger one and the result is averaged down, so every output sees its position.
    """

    def __init__(self, width: int, channels: int, *, feature_side: int, target_side: int) -> None:
        super().__init__()
        ratio = -(-target_side // feature_side)
        self.target_side = target_side
        self.proj = nn.Conv2d(width, channels * ratio**2, kernel_size=1)
        self.shuffle = nn.PixelShuffle(ratio)
        self.exact = feature_side * ratio == target_side
        init_linear(self.proj)

    def forward(self, features_BDhh: Tensor) -> Tensor:
        """Map features [B, D, h, h] to [B, C, s, s]."""
        out_BCrr: Tensor = self.shuffle(self.proj(features_BDhh))
        return out_BCrr if self.exact else F.adaptive_avg_pool2d(out_BCrr, self.target_side)


class PixelHead(UpscaleHead):
    """RESPIX: the normalised target image [B, 3, H, W] from the feature map [B, D, h, h]."""

    def __init__(self, width: int, *, feature_side: int, target_side: int) -> None:
        super().__init__(width, 3, feature_side=feature_side, target_side=target_side)


class DetectionHead(UpscaleHead):
    """REVDET: one logit a token position, [B, N] in row-major order, from the map [B, D, h, h]."""

    def __init__(self, width: int, *, feature_side: int, target_side: int) -> None:
        super().__init__(width, 1, feature_side=feature_side, target_side=target_side)

    def forward(self, features_BDhh: Tensor) -> Tensor:
        """Map features [B, D, h, h] to logits [B, N], N = target_side ** 2."""
        return super().forward(features_BDhh).flatten(1)


HeadBuilder = Callable[..., UpscaleHead]
