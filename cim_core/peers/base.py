"""What the peers of CIM have in common: a plain ViT that sees the masked image itself.

Shape letters in this file:
    B  images      N  positions of an image      D  encoder width
    P  prefix tokens (class, register)           L  tokens in a block, prefix tokens included
    H, W  image height and width, pixels
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import checkpoint_seq
from torch import Tensor, nn

from cim_core.config import ModelConfig
from cim_core.errors import ModelError
from cim_core.models.init import trunc_normal
from cim_core.pretraining import Pretraining
from cim_core.tokenizers.base import Tokenizer


@dataclass(frozen=True, kw_only=True)
class PeerOutput:
    """The loss and what it came from; metrics stay on the device."""

    loss: Tensor
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    clean_B3HW: Tensor  # [0, 1]
    mask_BN: Tensor  # True where masked
    prediction: Tensor  # beit: logits [M, V]; simmim, mae: pixels [B, 3, H, W] as the loss sees them


class Peer(Pretraining):
    """A method whose encoder sees the masked image itself, not a corrupted one.

    Patch embeddings are masked, or left out, between the encoder's first layer and its blocks. So the
    encoder must be a plain timm VisionTransformer; its positions are learned, as with CIM.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(config, tokenizer)
        if not self.enhancer.can_share:
            raise ModelError(
                f"enhancer.name: {self.enhancer.plan.name} cannot be pre-trained by {config.method}, which "
                "masks patches between embedding and blocks: name a plain timm VisionTransformer, as "
                "vit_small_patch16_224 is, or choose method cim"
            )

    @property
    def backbone(self) -> Any:
        """The timm VisionTransformer, whose parts are called here one by one."""
        return self.enhancer.backbone

    @abstractmethod
    def encode(self, images_B3HW: Tensor, mask_BN: Tensor) -> Tensor:
        """Features of what is visible of ImageNet-normalised images."""

    def run_blocks(self, tokens_BLD: Tensor) -> Tensor:
        """All blocks and the last norm, as `VisionTransformer.forward_features` runs them."""
        if self.backbone.grad_checkpointing:
            tokens_BLD = checkpoint_seq(self.backbone.blocks, tokens_BLD)
        else:
            tokens_BLD = self.backbone.blocks(tokens_BLD)
        normed_BLD: Tensor = self.backbone.norm(tokens_BLD)
        return normed_BLD

    def called_parts(self) -> list[nn.Module]:
        """What a step calls as a whole, to be compiled: the encoder's parts, not the encoder."""
        others = [part for part in self.children() if part not in (self.enhancer, self.average)]
        return [self.backbone.patch_embed, self.backbone.blocks, *others]

    def denormalise(self, images_B3HW: Tensor) -> Tensor:
        """ImageNet-normalised images as pictures in [0, 1]."""
        return (images_B3HW * self.std + self.mean).clamp(0, 1)


class MaskTokenPeer(Peer):
    """A peer whose encoder sees a learned mask token in place of each masked patch embedding."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__(config, tokenizer)
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.enhancer.width))
        trunc_normal(self.mask_token)

    def encode(self, images_B3HW: Tensor, mask_BN: Tensor) -> Tensor:
        """Features [B, N, D] of all positions; of masked patches nothing but their place is seen."""
        patches_BND = self.backbone.patch_embed(images_B3HW)
        seen_BND = torch.where(mask_BN[..., None], self.mask_token.to(patches_BND.dtype), patches_BND)
        features_BLD = self.run_blocks(self.backbone._pos_embed(seen_BND))
        return features_BLD[:, self.enhancer.plan.num_prefix :]


def masked_pixel_mean(error_B3HW: Tensor, mask_B1HW: Tensor) -> Tensor:
    """Mean over the masked pixels and their channels."""
    num_values = mask_B1HW.sum() * error_B3HW.shape[1]
    return (error_B3HW * mask_B1HW).sum() / num_values
