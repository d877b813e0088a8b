"""Masked Autoencoder (arXiv 2111.06377): encode the visible quarter, decode the rest with a small ViT.

Each fact of it, with where it was looked up (its code is `models_mae.py` of facebookresearch/mae) and what is
ours, is in docs/method.md.

Shape letters in this file:
    B  images on this rank      N  positions of an image      D  encoder width      d  decoder width
    P  prefix tokens (class)    K  visible positions          L  tokens of the encoder, P + K
    g  positions a side         p  pixels of a patch a side   H, W  image height and width, pixels
"""

from functools import partial

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from cim_core.config import DecoderConfig, ModelConfig
from cim_core.data.dataset import Views
from cim_core.engine.transfer import send
from cim_core.masking import count_range, make_mask
from cim_core.objectives.respix import PatchStatistics
from cim_core.peers.base import Peer, PeerOutput, masked_pixel_mean
from cim_core.pretraining import greyed, on_pixels, to_unit


class MAE(Peer):
    """Encoder of visible patches, and a decoder that is thrown away."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert self.config.decoder is not None
        self.decoder = Decoder(
            self.config.decoder,
            encoder_width=self.enhancer.width,
            num_prefix=self.enhancer.plan.num_prefix,
            grid=self.grid,
            patch_size=config.patch_size,
        )
        self.statistics = PatchStatistics(config.patch_size)
        _, num_masked = count_range(self.grid, self.config.masking)
        self.num_visible = self.grid**2 - num_masked

    def forward(self, views: Views, *, generator: torch.Generator) -> PeerOutput:
        """One step on one batch; every random choice is `generator`'s."""
        clean_B3HW = to_unit(views.pixels_B3HW)
        images_B3HW = self.normalise(clean_B3HW)
        # 1. Three quarters of the patches are masked, equally many of each image.
        mask_BN = make_mask(len(clean_B3HW), self.grid, self.config.masking, generator)
        mask_BN = send(mask_BN, clean_B3HW.device)
        # 2. The encoder gets the others alone; the decoder fills in mask tokens and paints all patches.
        features_BLD = self.encode(images_B3HW, mask_BN)
        prediction_B3HW = self.decoder(features_BLD, self.visible(mask_BN)).float()
        # 3. The squared error of masked patches, each normalised by its own mean and deviation.
        mean, deviation = self.statistics(images_B3HW)
        error_B3HW = (prediction_B3HW - (images_B3HW - mean) / deviation).square()
        loss = masked_pixel_mean(error_B3HW, on_pixels(mask_BN, self.grid, self.config.image_size))
        return PeerOutput(
            loss=loss,
            losses={"pixels": loss},
            metrics={"mae_l2": loss.detach(), "mask_share": mask_BN.float().mean()},
            clean_B3HW=clean_B3HW,
            mask_BN=mask_BN,
            prediction=prediction_B3HW,
        )

    def encode(self, images_B3HW: Tensor, mask_BN: Tensor) -> Tensor:
        """Features [B, L, D] of prefix tokens and visible patches, these in the order of their places."""
        tokens_BLD = self.backbone._pos_embed(self.backbone.patch_embed(images_B3HW))
        num_prefix = self.enhancer.plan.num_prefix
        index_BKD = self.visible(mask_BN)[..., None].expand(-1, -1, tokens_BLD.shape[-1])
        visible_BKD = tokens_BLD[:, num_prefix:].gather(1, index_BKD)
        return self.run_blocks(torch.cat([tokens_BLD[:, :num_prefix], visible_BKD], dim=1))

    def visible(self, mask_BN: Tensor) -> Tensor:
        """Visible positions in ascending order, [B, K]; K is known beforehand, so nothing is read back."""
        return mask_BN.to(torch.uint8).argsort(dim=1, stable=True)[:, : self.num_visible]

    @torch.no_grad()
    def columns(self, output: PeerOutput) -> dict[str, Tensor]:
        """The original, what of it is seen, and the prediction in the masked patches.

        Brightness and contrast of each predicted patch are those of the original: what the network is
        asked for is relative to them.
        """
        clean_B3HW = output.clean_B3HW
        mean, deviation = self.statistics(self.normalise(clean_B3HW))
        painted_B3HW = self.denormalise(output.prediction * deviation + mean)
        mask_B1HW = on_pixels(output.mask_BN, self.grid, self.config.image_size)
        return {
            "original": clean_B3HW,
            "masked": greyed(clean_B3HW, output.mask_BN, self.grid),
            "predicted": torch.where(mask_B1HW > 0, painted_B3HW, clean_B3HW),
        }


class Decoder(nn.Module):
    """A small plain ViT over all positions, with fixed sin-cos ones, and one linear layer to pixels."""

    positions: Tensor

    def __init__(
        self, config: DecoderConfig, *, encoder_width: int, num_prefix: int, grid: int, patch_size: int
    ) -> None:
        super().__init__()
        self.grid, self.patch_size, self.num_prefix = grid, patch_size, num_prefix
        norm = partial(nn.LayerNorm, eps=1e-6)
        block = partial(Block, config.width, config.heads, qkv_bias=True, norm_layer=norm)
        self.embed = nn.Linear(encoder_width, config.width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.blocks = nn.Sequential(*(block() for _ in range(config.depth)))
        self.norm = norm(config.width)
        self.head = nn.Linear(config.width, 3 * patch_size**2)
        positions_Nd = build_sincos2d_pos_embed([grid, grid], config.width)
        self.register_buffer("positions", positions_Nd[None], persistent=False)
        self._init_weights()

    def forward(self, features_BLD: Tensor, visible_BK: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] from the features of prefix tokens and visible patches."""
        embedded_BLd = self.embed(features_BLD)
        prefix_BPd, visible_BKd = embedded_BLd.tensor_split([self.num_prefix], dim=1)
        num_images, width = len(embedded_BLd), embedded_BLd.shape[-1]
        tokens_BNd = self.mask_token.to(embedded_BLd.dtype).expand(num_images, self.grid**2, width)
        tokens_BNd = tokens_BNd.scatter(1, visible_BK[..., None].expand(-1, -1, width), visible_BKd)
        # Prefix tokens have no place: their position is zero.
        x = torch.cat([prefix_BPd, tokens_BNd + self.positions], dim=1)
        hidden_BNd = self.norm(self.blocks(x))[:, self.num_prefix :]
        return self._as_image(self.head(hidden_BNd))

    def _as_image(self, pixels_BNq: Tensor) -> Tensor:
        """Each position's 3 * p * p numbers at its place, [B, 3, H, W]."""
        g, p = self.grid, self.patch_size
        tiles_Bgg3pp = pixels_BNq.reshape(-1, g, g, 3, p, p)
        return tiles_Bgg3pp.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, g * p, g * p)

    def _init_weights(self) -> None:
        """As MAE's code: Xavier's uniform distribution, and a normal one of std 0.02 for the mask token."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.mask_token, std=0.02)
