"""What the rest of the core knows of a tokenizer: pictures to ids, ids to pictures.

Shape letters in this file:
    B  images on this rank           h, w  tokens a side
    H, W  image sides, pixels: h, w times the stride
"""

from typing import Protocol

from torch import Tensor


class Tokenizer(Protocol):
    """A frozen discrete image tokenizer; both directions run without gradient."""

    @property
    def vocab_size(self) -> int:
        """How many different ids there are: 0 to `vocab_size - 1`."""
        ...

    @property
    def stride(self) -> int:
        """Pixels a token covers on each side."""
        ...

    @property
    def is_fake(self) -> bool:
        """True only for the stand-in of tests, which logs and model cards have to name."""
        ...

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Ids int64 [B, h, w] of float images in [0, 1]; ValueError where the stride does not fit."""
        ...

    def decode(self, ids_Bhw: Tensor) -> Tensor:
        """Float images [B, 3, H, W] in [0, 1] of int64 ids."""
        ...


def check_images(images_B3HW: Tensor, *, stride: int) -> None:
    """Raise ValueError unless these are [B, 3, H, W] floats whose sides the stride divides."""
    shape = tuple(images_B3HW.shape)
    if len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"images must have the shape [batch, 3, height, width], got {list(shape)}")
    if not images_B3HW.is_floating_point():
        raise ValueError(f"images must be floats in [0, 1], got {images_B3HW.dtype}: divide bytes by 255")
    if shape[2] % stride or shape[3] % stride:
        raise ValueError(
            f"image sides must be multiples of the tokenizer's stride {stride}, got {shape[2]} x {shape[3]} "
            "pixels: crop or resize the images"
        )
