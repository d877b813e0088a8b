"""The same networks put together as one would at first: what `train_step` is measured against.

Shape letters in this file:
    B  images      N  token positions of an image, g * g      g  token positions a side
    V  vocabulary of the tokenizer      H, W  image height and width, pixels
    T  side of the tokenizer's images, pixels

Eager, in fp32, with the layouts that torch chooses: a loop over the images for the masks, the
vocabulary's layer and the sampling at all positions, decoding by a 1x1 convolution over one-hot maps,
torch's AdamW as it comes, and a log line with the loss after each step.
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cim_core.cim import CIM
from cim_core.data.dataset import Views
from cim_core.masking import count_range
from cim_core.objectives.base import Truth
from cim_core.optim import parameter_groups
from cim_core.tokenizers.dalle import DalleTokenizer
from cim_core.tokenizers.network import map_pixels, unmap_pixels

CLIP_NORM, LEARNING_RATE, WEIGHT_DECAY, BETAS = 3.0, 1e-3, 0.05, (0.9, 0.98)


class PlainStep:
    """Steps of `cim`, whose tokenizer has DALL-E's layout; `log` gets a line after each."""

    def __init__(self, cim: CIM, *, log: Callable[[str], object]) -> None:
        assert isinstance(cim.tokenizer, DalleTokenizer)
        self.cim, self.tokenizer, self.log = cim, cim.tokenizer, log
        groups = parameter_groups(cim, weight_decay=WEIGHT_DECAY)
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS)

    def step(self, views: Views) -> None:
        """Forward, backward, update, log line."""
        self.optimizer.zero_grad()
        mim_loss, enhancer_loss = self.losses(views)
        loss = mim_loss + self.cim.weight * enhancer_loss
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.cim.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.log(f"loss {loss.item():.4f}, mim {mim_loss.item():.4f}, gradient {norm.item():.3f}")

    def losses(
        self, views: Views, *, mask_BN: Tensor | None = None, sampled_BN: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The generator's loss and the enhancer's; masks and samples are drawn where not given."""
        cim, device = self.cim, cim_device(self.cim)
        clean_B3HW = views.pixels_B3HW.to(device).float() / 255
        golden_BN = self._encode(views.token_pixels_B3HW.to(device).float() / 255)
        mask_BN = (self._masks(len(golden_BN)) if mask_BN is None else mask_BN).to(device)
        everywhere = torch.arange(mask_BN.numel(), device=device)
        logits_BNV = cim.generator(cim.normalise(clean_B3HW), mask_BN, everywhere).view(*mask_BN.shape, -1)
        mim_loss = F.cross_entropy(logits_BNV[mask_BN], golden_BN[mask_BN])
        if sampled_BN is None:
            drawn = torch.multinomial(logits_BNV.detach().flatten(0, 1).softmax(dim=-1), 1)
            sampled_BN = torch.where(mask_BN, drawn.view_as(golden_BN), golden_BN)
        features_BDhh = cim.enhancer(cim.normalise(self._corrupt(sampled_BN)))
        replaced_BN = mask_BN & (sampled_BN != golden_BN)
        truth = Truth(clean_B3HW=clean_B3HW, mask_BN=mask_BN, replaced_BN=replaced_BN)
        return mim_loss, cim.objective(features_BDhh, truth).loss

    def _masks(self, num_images: int) -> Tensor:
        low, high = count_range(self.cim.grid, self.cim.config.masking)
        mask_BN = torch.zeros(num_images, self.cim.grid**2, dtype=torch.bool)
        for row_N in mask_BN:
            row_N[torch.randperm(len(row_N))[: random.randint(low, high)]] = True
        return mask_BN

    @torch.no_grad()
    def _encode(self, images_B3TT: Tensor) -> Tensor:
        logits_BVgg: Tensor = self.tokenizer.encoder.blocks(map_pixels(images_B3TT))
        return logits_BVgg.argmax(dim=1).flatten(1)

    @torch.no_grad()
    def _corrupt(self, tokens_BN: Tensor) -> Tensor:
        grid, table = self.cim.grid, self.tokenizer.table
        one_hot_BggV = F.one_hot(tokens_BN.view(-1, grid, grid), self.tokenizer.vocab_size)
        one_hot_BVgg = one_hot_BggV.permute(0, 3, 1, 2).float()
        code_BDgg = F.conv2d(one_hot_BVgg, table.weight.t()[:, :, None, None], table.bias)
        logits_B6TT = self.tokenizer.decoder.blocks(code_BDgg)
        picture_B3TT = unmap_pixels(logits_B6TT[:, :3].sigmoid()).clamp(0, 1)
        if picture_B3TT.shape[-1] != self.cim.config.image_size:
            picture_B3TT = F.interpolate(picture_B3TT, size=self.cim.config.image_size, mode="bicubic")
        return picture_B3TT.clamp(0, 1)


def cim_device(cim: CIM) -> torch.device:
    """Where the model lies."""
    return next(cim.parameters()).device
