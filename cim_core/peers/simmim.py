"""SimMIM (arXiv 2111.09886): regress the pixels of large masked squares with one linear layer.

Each fact of it, with where it was looked up (its code is `models/simmim.py` and `data/data_simmim.py` of
microsoft/SimMIM) and what is ours, is in docs/method.md.

Shape letters in this file:
    B  images on this rank      N  positions of an image      D  encoder width
    g  positions a side         u  mask units a side          H, W  image height and width, pixels
"""

import torch
from torch import Tensor

from cim_core.config import ModelConfig
from cim_core.data.dataset import Views
from cim_core.engine.transfer import send
from cim_core.masking import make_mask
from cim_core.models.heads import PixelHead
from cim_core.models.probe import to_map
from cim_core.peers.base import MaskTokenPeer, PeerOutput, masked_pixel_mean
from cim_core.pretraining import greyed, on_pixels, to_unit


class SimMIM(MaskTokenPeer):
    """Encoder with a mask token, and one linear layer a position to its pixels."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        sides = {"feature_side": self.grid, "target_side": config.image_size}
        self.head = PixelHead(self.enhancer.width, **sides)

    def forward(self, views: Views, *, generator: torch.Generator) -> PeerOutput:
        """One step on one batch; every random choice is `generator`'s."""
        clean_B3HW = to_unit(views.pixels_B3HW)
        target_B3HW = self.normalise(clean_B3HW)
        # 1. Squares of several patches are masked as a whole.
        mask_BN = send(self.draw_mask(len(clean_B3HW), generator), clean_B3HW.device)
        # 2. The encoder sees mask tokens there; one layer makes pixels of every feature.
        features_BND = self.encode(target_B3HW, mask_BN)
        features_BDgg = to_map(features_BND, layout="tokens", num_prefix=0, side=self.grid)
        prediction_B3HW = self.head(features_BDgg).float()
        # 3. The absolute error, of masked pixels alone.
        mask_B1HW = on_pixels(mask_BN, self.grid, self.config.image_size)
        loss = masked_pixel_mean((prediction_B3HW - target_B3HW).abs(), mask_B1HW)
        return PeerOutput(
            loss=loss,
            losses={"pixels": loss},
            metrics={"simmim_l1": loss.detach(), "mask_share": mask_BN.float().mean()},
            clean_B3HW=clean_B3HW,
            mask_BN=mask_BN,
            prediction=prediction_B3HW,
        )

    def draw_mask(self, num_images: int, generator: torch.Generator) -> Tensor:
        """A mask [B, N] of squares of `masking.unit` pixels a side."""
        masking = self.config.masking
        assert masking.unit is not None
        unit = masking.unit // self.config.patch_size  # positions a side
        num_units = self.grid // unit
        mask_Buu = make_mask(num_images, num_units, masking, generator).view(-1, num_units, num_units)
        return mask_Buu.repeat_interleave(unit, dim=1).repeat_interleave(unit, dim=2).flatten(1)

    def columns(self, output: PeerOutput) -> dict[str, Tensor]:
        """The original, what of it is seen, and the prediction in the masked squares."""
        clean_B3HW = output.clean_B3HW
        mask_B1HW = on_pixels(output.mask_BN, self.grid, self.config.image_size)
        return {
            "original": clean_B3HW,
            "masked": greyed(clean_B3HW, output.mask_BN, self.grid),
            "predicted": torch.where(mask_B1HW > 0, self.denormalise(output.prediction), clean_B3HW),
        }
