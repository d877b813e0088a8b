"""Heads that turn a feature map of any stride into pixels or into one logit a token position.

Shape letters in this file:
    B  images      D  feature channels      C  output channels
    h  feature positions a side             s  output positions a side
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor, nn
from torch.nn import functional as F

from cim_core.models.init import init_linear

# Output positions a side that one feature position gives of its own, for h and s: the layer gives them
# all and the shuffle spreads them, or it gives one and the result is enlarged.
UPSAMPLE: Mapping[str, Callable[[int, int], int]] = MappingProxyType(
    {"pixel_shuffle": lambda feature_side, side: -(-side // feature_side), "bilinear": lambda *_: 1}
)


class UpscaleHead(nn.Module):
    """A linear layer per feature position, brought to an exact output side.

    `pixel_shuffle`: for a ViT and pixels this is one linear layer per token (METHOD: as in MAE); for a
    CNN it is SimMIM's 1x1 convolution with PixelShuffle. Where the ratio of the sides is no integer,
    the shuffle goes to the next larger one and the result is averaged down, so every output sees its
    position. `bilinear`: one output a feature position, enlarged; the same numbers as a linear layer on
    an enlarged feature map, since both are linear and the interpolation's weights add up to 1.
    """

    def __init__(
        self,
        width: int,
        channels: int,
        *,
        feature_side: int,
        target_side: int,
        upsample: str = "pixel_shuffle",
    ) -> None:
        super().__init__()
        ratio = UPSAMPLE[upsample](feature_side, target_side)
        self.target_side = target_side
        self.proj = nn.Conv2d(width, channels * ratio**2, kernel_size=1)
        self.shuffle = nn.PixelShuffle(ratio)
        init_linear(self.proj)

    def forward(self, features_BDhh: Tensor) -> Tensor:
        """Map features [B, D, h, h] to [B, C, s, s]."""
        out_BCrr: Tensor = self.shuffle(self.proj(features_BDhh))
        side = out_BCrr.shape[-1]
        if side < self.target_side:
            return F.interpolate(out_BCrr, size=(self.target_side, self.target_side), mode="bilinear")
        return out_BCrr if side == self.target_side else F.adaptive_avg_pool2d(out_BCrr, self.target_side)


class PixelHead(UpscaleHead):
    """RESPIX: the normalised target image [B, 3, H, W] from the feature map [B, D, h, h]."""

    def __init__(self, width: int, *, feature_side: int, target_side: int) -> None:
        super().__init__(width, 3, feature_side=feature_side, target_side=target_side)


class DetectionHead(UpscaleHead):
    """REVDET: one logit a token position, [B, N] in row-major order, from the map [B, D, h, h]."""

    def __init__(
        self, width: int, *, feature_side: int, target_side: int, upsample: str = "pixel_shuffle"
    ) -> None:
        super().__init__(width, 1, feature_side=feature_side, target_side=target_side, upsample=upsample)

    def forward(self, features_BDhh: Tensor) -> Tensor:
        """Map features [B, D, h, h] to logits [B, N], N = target_side ** 2."""
        return super().forward(features_BDhh).flatten(1)
