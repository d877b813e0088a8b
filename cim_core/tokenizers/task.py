"""Training a tokenizer as the engine sees it: a batch in, losses out.

Shape letters in this file:
    B  images of one microbatch on this rank      H, W  image sides, pixels
"""

from typing import Protocol

from torch import Tensor, nn

from cim_core.seeding import generator_for
from cim_core.tokenizers.dvae import TokenizerOutput


class PixelBatch(Protocol):
    """Any batch with a picture of each image."""

    @property
    def pixels_B3HW(self) -> Tensor:  # noqa: N802
        """Bytes [B, 3, H, W], sides multiples of the tokenizer's stride."""
        ...


class TokenizerTask:
    """Loss of a `DiscreteVAE` on one microbatch; `module` may be the model or a wrapper around it."""

    def __init__(self, module: nn.Module, *, seed: int) -> None:
        self.module = module
        self.seed = seed

    def losses(
        self, batch: PixelBatch, *, step: int, micro: int, rank: int, progress: float
    ) -> TokenizerOutput:
        """Noise and restarts depend on (seed, step, rank, micro) alone, so a resumed run draws the same."""
        generator = generator_for(self.seed, "tokenizer", step, rank, micro)
        images_B3HW = batch.pixels_B3HW.float() / 255
        output: TokenizerOutput = self.module(images_B3HW, progress=progress, generator=generator)
        return output


def tokenizer_task(model: nn.Module, *, seed: int) -> TokenizerTask:
    """The task of training `model`, a `DiscreteVAE` that may be wrapped by DistributedDataParallel."""
    return TokenizerTask(model, seed=seed)
