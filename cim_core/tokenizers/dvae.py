"""A discrete VAE in the DALL-E layout (Ramesh et al., 2021, appendix A) that we train ourselves.

The reconstruction loss is a Gaussian's negative log-likelihood at its best variance: half the
logarithm of the mean squared error, in nats a colour value. Three reasons: it needs no scale by hand
beside the commitment or KL term, however far training has come; the KL weight keeps the paper's
meaning, which assumes nats; and it goes for the squared error, which a decoder that many tokens
share can lower, where a sharper likelihood would reward detail that the tokens cannot carry.

Shape letters in this file:
    B  images on this rank      H, W  image sides, pixels      h, w  tokens a side
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cim_core.config import TokenizerConfig
from cim_core.engine import dist
from cim_core.tokenizers.base import check_images
from cim_core.tokenizers.network import Decoder, Encoder, Layout, initialise, map_pixels, unmap_pixels
from cim_core.tokenizers.quantise import QUANTISERS

# 96 dB: better than 8 bits can show, and keeps the logarithm finite on a perfect copy.
SMALLEST_ERROR = 2.5e-10


@dataclass(frozen=True)
class TokenizerOutput:
    """One training pass: the loss with its graph, the rest detached."""

    loss: Tensor
    reconstruction_B3HW: Tensor  # in [0, 1]
    metrics: dict[str, Tensor]


class DiscreteVAE(nn.Module):
    """Encoder, quantiser and decoder; satisfies `Tokenizer`.

    All weights are drawn from `generator`, in the same order on every machine.
    """

    is_fake = False

    def __init__(self, config: TokenizerConfig, *, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = config.vocab_size
        self.stride = config.stride
        layout = Layout(width=config.width, stride=config.stride, blocks_per_group=config.blocks_per_group)
        self.quantiser = QUANTISERS[config.quantiser](config)
        self.encoder = Encoder(layout, num_outputs=self.quantiser.num_inputs)
        self.decoder = Decoder(layout, code_dim=config.code_dim)
        if torch.get_default_device().type != "meta":  # there are no numbers to draw there
            initialise(self.encoder, generator=generator)
            initialise(self.decoder, generator=generator)
            self.quantiser.initialise(generator=generator)

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Ids int64 [B, h, w] of float images in [0, 1]; ValueError where the stride does not fit."""
        check_images(images_B3HW, stride=self.stride)
        return self.quantiser.ids(self.encoder(map_pixels(images_B3HW)))

    @torch.no_grad()
    def decode(self, ids_Bhw: Tensor) -> Tensor:
        """Float images [B, 3, H, W] in [0, 1] of int64 ids."""
        return self._paint(self.quantiser.lookup(ids_Bhw)).clamp(0, 1)

    def forward(self, images_B3HW: Tensor, *, progress: float, generator: torch.Generator) -> TokenizerOutput:
        """As `training_losses`: the entry for wrappers that have to see the call, such as DDP."""
        return self.training_losses(images_B3HW, progress=progress, generator=generator)

    def training_losses(
        self, images_B3HW: Tensor, *, progress: float, generator: torch.Generator
    ) -> TokenizerOutput:
        """Reconstruct float images in [0, 1]; in training mode the codebook moves on as well.

        `progress` in [0, 1] is the share of the training that is over. ValueError where the images
        do not fit the stride.
        """
        check_images(images_B3HW, stride=self.stride)
        z_BChw = self.encoder(map_pixels(images_B3HW))
        quantised = self.quantiser(z_BChw, progress=progress, generator=generator)
        painted_B3HW = self._paint(quantised.code_BDhw)
        error = (painted_B3HW - images_B3HW.float()).square().mean()
        reconstruction, shared_error = _calibrated(error)
        psnr = -10 * shared_error.log10()
        metrics = {"reconstruction": reconstruction.detach(), "psnr": psnr} | quantised.metrics
        return TokenizerOutput(
            loss=reconstruction + quantised.loss,
            reconstruction_B3HW=painted_B3HW.detach().clamp(0, 1),
            metrics=metrics,
        )

    def _paint(self, code_BDhw: Tensor) -> Tensor:
        """Pixels of codes, not yet clamped: a clamp would cut the gradient just where it is needed."""
        logits_B3HW = self.decoder(code_BDhw)[:, :3]
        return unmap_pixels(logits_B3HW.float().sigmoid())


def _calibrated(error: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood in nats at the best variance, and that variance, over all ranks.

    The variance is shared, so that the ranks' mean gradient is that of one process with all images.
    """
    variance = (dist.all_reduce_sum(error) / dist.world_size()).clamp(min=SMALLEST_ERROR)
    return (error / variance - 1 + variance.log()) / 2, variance
