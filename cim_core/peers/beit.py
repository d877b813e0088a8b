"""BEiT (arXiv 2106.08254): name the visual tokens of masked patches, with the encoder itself.

The task of CIM's generator, without one: what the generator learns for its own sake is here what the
encoder is for. Each fact of it, with where it was looked up (its code is `beit/` of microsoft/unilm) and
what is ours, is in docs/method.md.

Shape letters in this file:
    B  images on this rank      N  positions of an image      D  encoder width
    M  masked positions of all B images together              V  vocabulary of the tokenizer
    H, W  image height and width, pixels
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cim_core.config import ModelConfig
from cim_core.data.dataset import Views
from cim_core.engine.transfer import send
from cim_core.masking import make_mask, masked_positions
from cim_core.models.init import init_linear
from cim_core.peers.base import MaskTokenPeer, PeerOutput
from cim_core.pretraining import greyed, to_unit
from cim_core.tokenizers.base import Tokenizer


@dataclass(frozen=True, kw_only=True)
class BeitOutput(PeerOutput):
    """A step of BEiT; the prediction is [M, V], logits."""

    golden_BN: Tensor  # the tokenizer's tokens of the original


class Beit(MaskTokenPeer):
    """Encoder with a mask token, and one linear layer to the vocabulary."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        self.head = nn.Linear(self.enhancer.width, tokenizer.vocab_size)
        init_linear(self.head)

    def forward(self, views: Views, *, generator: torch.Generator) -> BeitOutput:
        """One step on one batch; every random choice is `generator`'s."""
        # 1. Two views of one crop; the frozen tokenizer names the target from the second.
        clean_B3HW = to_unit(views.pixels_B3HW)
        golden_BN = self.tokenize(views.token_pixels_B3HW)
        # 2. Blocks of positions are masked.
        mask_BN = make_mask(len(golden_BN), self.grid, self.config.masking, generator)
        mask_BN, positions_M = (send(x, golden_BN.device) for x in (mask_BN, masked_positions(mask_BN)))
        # 3. The encoder names the tokens there, of which it sees nothing.
        features_BND = self.encode(self.normalise(clean_B3HW), mask_BN)
        logits_MV = self.head(features_BND.flatten(0, 1).index_select(0, positions_M)).float()
        golden_M = golden_BN.take(positions_M)
        loss = F.cross_entropy(logits_MV, golden_M)
        right_M = logits_MV.detach().argmax(dim=-1) == golden_M
        return BeitOutput(
            loss=loss,
            losses={"mim": loss},
            metrics={
                "mim_loss": loss.detach(),
                "mim_accuracy": right_M.float().mean(),
                "mask_share": mask_BN.float().mean(),
            },
            clean_B3HW=clean_B3HW,
            mask_BN=mask_BN,
            prediction=logits_MV,
            golden_BN=golden_BN,
        )

    @torch.no_grad()
    def columns(self, output: BeitOutput) -> dict[str, Tensor]:
        """The original, what of it is seen, and the likeliest tokens as the tokenizer decodes them."""
        clean_B3HW, mask_BN = output.clean_B3HW, output.mask_BN
        tokens_BN = output.golden_BN.masked_scatter(mask_BN, output.prediction.argmax(dim=-1))
        decoded_B3TT = self.tokenizer.decode(tokens_BN.view(-1, self.grid, self.grid)).float()
        return {
            "original": clean_B3HW,
            "masked": greyed(clean_B3HW, mask_BN, self.grid),
            "decoded": F.interpolate(decoded_B3TT, size=clean_B3HW.shape[-2:], mode="bilinear").clamp(0, 1),
        }
