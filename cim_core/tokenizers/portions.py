"""A frozen tokenizer's work in portions that a processor's caches hold; it may, as no gradient goes back."""

from collections.abc import Callable

import torch
from torch import Tensor

# Four images of 64 x 64: a map of a tokenizer 64 wide then takes 4 MiB. With 16 images of 112 x 112 it saves
# a third of the decoder's time and a quarter of the encoder's (docs/lab-log.md, speed of the step).
PORTION_PIXELS = 2**14


def in_portions(run: Callable[[Tensor], Tensor], x_B: Tensor, *, side: int) -> Tensor:
    """`run(x_B)`, on a CPU a few images of `side` pixels at a time; a GPU gets them all at once."""
    if x_B.device.type != "cpu":
        return run(x_B)
    num_images = max(1, PORTION_PIXELS // side**2)
    return torch.cat([run(part) for part in torch.split(x_B, num_images)])
