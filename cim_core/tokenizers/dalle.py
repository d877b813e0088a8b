"""The tokenizer of DALL-E (Ramesh et al., 2021), frozen: 8192 tokens of 8 x 8 pixels.

Shape letters in this file:
    B  images on this rank      H, W  image sides, pixels      h, w  tokens a side
    V  tokens in the vocabulary D  width of a token's code
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cim_core.tokenizers.base import check_images
from cim_core.tokenizers.network import Decoder, Encoder, Layout, map_pixels, unmap_pixels

STRIDE = 8
# Three means and three scales of the logit-Laplace distribution; a picture needs the means alone.
NUM_COLOURS = 6


@dataclass(frozen=True, kw_only=True)
class DalleConfig:
    """The sizes that the official code leaves open; the defaults are those of the official files."""

    width: int = 256  # n_hid: groups are 1, 2, 4, 8 times as wide
    blocks_per_group: int = 2
    vocab_size: int = 8192
    code_dim: int = 128  # n_init: what the decoder's first layer makes of a token

    def __post_init__(self) -> None:
        for name, size in asdict(self).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")

    @property
    def layout(self) -> Layout:
        """The shape of encoder and decoder."""
        return Layout(width=self.width, stride=STRIDE, blocks_per_group=self.blocks_per_group)


class CodeTable(nn.Module):
    """The decoder's first layer, a 1x1 convolution over one-hot tokens, as the look-up that it is."""

    def __init__(self, vocab_size: int, code_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, code_dim))
        self.bias = nn.Parameter(torch.empty(code_dim))

    def forward(self, ids_Bhw: Tensor) -> Tensor:
        """Codes float32 [B, D, h, w] of int64 ids."""
        code_BhwD: Tensor = F.embedding(ids_Bhw, self.weight) + self.bias
        return code_BhwD.permute(0, 3, 1, 2)


class DalleTokenizer(nn.Module):
    """Encoder, table and decoder in eval mode; satisfies `Tokenizer`. The weights have to be loaded.

    `origin` says which files the weights came from: `encoder_sha256` and `decoder_sha256`.
    """

    is_fake = False
    stride = STRIDE

    def __init__(self, config: DalleConfig, *, origin: Mapping[str, str]) -> None:
        super().__init__()
        self.config = config
        self.origin = dict(origin)
        self.vocab_size = config.vocab_size
        self.encoder = Encoder(config.layout, num_outputs=config.vocab_size)
        self.table = CodeTable(config.vocab_size, config.code_dim)
        self.decoder = Decoder(config.layout, code_dim=config.code_dim, num_colours=NUM_COLOURS)
        self.eval().requires_grad_(requires_grad=False)

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Ids int64 [B, h, w] of float images in [0, 1]; ValueError where the stride does not fit."""
        check_images(images_B3HW, stride=STRIDE)
        logits_BVhw: Tensor = self.encoder(map_pixels(images_B3HW))
        return logits_BVhw.argmax(dim=1)

    @torch.no_grad()
    def decode(self, ids_Bhw: Tensor) -> Tensor:
        """Float images [B, 3, H, W] in [0, 1] of int64 ids."""
        logits_B6HW: Tensor = self.decoder(self.table(ids_Bhw))
        return unmap_pixels(logits_B6HW[:, :3].float().sigmoid()).clamp(0, 1)


def dalle_on_meta(config: DalleConfig, *, origin: Mapping[str, str]) -> DalleTokenizer:
    """The network without memory for its weights, to load them with `assign=True`."""
    with torch.device("meta"):
        return DalleTokenizer(config, origin=origin)
