"""A stand-in for tests: a token is the brightness of its cell. Chosen only by the name `fake`.

Shape letters in this file:
    B  images on this rank      h, w  tokens a side      H, W  image sides, pixels
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cim_core.tokenizers.base import check_images


class FakeTokenizer(nn.Module):
    """Flat grey cells in `vocab_size` levels; learns nothing and knows no structure or colour.

    It satisfies `Tokenizer`, and `encode(decode(ids))` gives back the ids.
    """

    is_fake = True

    def __init__(self, *, vocab_size: int = 64, stride: int = 8) -> None:
        super().__init__()
        if vocab_size < 2 or stride < 1:
            raise ValueError(f"vocab_size must be at least 2 and stride 1, got {vocab_size} and {stride}")
        self.vocab_size = vocab_size
        self.stride = stride

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Ids int64 [B, h, w] of float images in [0, 1]; ValueError where the stride does not fit."""
        check_images(images_B3HW, stride=self.stride)
        brightness_BHW = images_B3HW.float().mean(dim=1)
        level_Bhw = F.avg_pool2d(brightness_BHW, self.stride) * self.vocab_size
        return level_Bhw.long().clamp(0, self.vocab_size - 1)

    @torch.no_grad()
    def decode(self, ids_Bhw: Tensor) -> Tensor:
        """Grey float images [B, 3, H, W] in [0, 1], each cell at the middle of its level."""
        level_Bhw = (ids_Bhw.float() + 0.5) / self.vocab_size
        cells_BHW = level_Bhw.repeat_interleave(self.stride, dim=1).repeat_interleave(self.stride, dim=2)
        return cells_BHW[:, None].expand(-1, 3, -1, -1).contiguous()
