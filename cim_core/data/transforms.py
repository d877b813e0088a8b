"""From a file's bytes to one upright 8-bit RGB picture, and from there to crops of fixed size.

Shape letters in this file:
    H, W  height and width, pixels

How a picture becomes RGB: grey is repeated; palette, CMYK, YCbCr and LAB are converted by Pillow; what
is transparent lies on white; 16 bits keep their upper 8; floats count as 0 to 1 where none is larger,
else as 0 to 255. The first frame of an animation is taken. EXIF orientation is applied.
"""

import io
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Chosen by content, not by suffix. Formats that start other programs (EPS) or hold no photographs stay out.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 89_478_485  # as Pillow's own warning: 256 MiB of RGB

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # red, green, blue in [0, 1]
BICUBIC, LANCZOS = Image.Resampling.BICUBIC, Image.Resampling.LANCZOS
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureTooLargeError(ValueError):
    """The header promises more pixels than we are willing to decode."""


@dataclass(frozen=True)
class Box:
    """A part of an upright picture, in whole pixels."""

    left: int
    top: int
    width: int
    height: int


def decode(data: bytes) -> Image.Image:
    """The upright RGB picture in `data`.

    Raises:
        PIL.UnidentifiedImageError: no image format of ours.
        PictureTooLargeError: more than `MAX_PIXELS`.
        OSError, SyntaxError, ValueError: truncated or corrupt; Pillow has no class of its own for that.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.width * image.height > MAX_PIXELS:
            size = f"{image.width} x {image.height}"
            raise PictureTooLargeError(f"{size} pixels are more than the limit of {MAX_PIXELS}")
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        rgb = to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in 8-bit RGB, by the rules at the top of this file."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64).clip(0, 0xFFFF) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        scale = 255.0 if values.max() <= 1.0 else 1.0
        return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image.convert("RGBA"))
        return paper.convert("RGB")
    return image.convert("RGB")


def random_box(size: tuple[int, int], *, crop_min: float, generator: torch.Generator) -> Box:
    """A random part of a picture of (width, height) `size`, as in Inception's crop (METHOD.md 7.4).

    Its area is uniform in [crop_min, 1] of the picture, its aspect ratio log-uniform in 3/4 to 4/3.
    After ten misses the largest centred part with an allowed ratio is taken. Always the same count of
    random numbers is drawn, so that what follows does not depend on the misses.
    """
    width, height = size
    draws = torch.rand(10, 4, dtype=torch.float64, generator=generator).tolist()
    for area_draw, ratio_draw, left_draw, top_draw in draws:
        area = width * height * (crop_min + (1 - crop_min) * area_draw)
        ratio = math.exp(math.log(3 / 4) + ratio_draw * math.log(16 / 9))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(left_draw * (width - w + 1)), int(top_draw * (height - h + 1)), w, h)
    return _largest_box(width, height)


def centre_square(size: tuple[int, int]) -> Box:
    """The largest centred square of a picture of (width, height) `size`."""
    width, height = size
    side = min(width, height)
    return Box((width - side) // 2, (height - side) // 2, side, side)


def cut(image: Image.Image, box: Box, side: int, *, resample: Image.Resampling) -> Image.Image:
    """The part `box` of `image`, resized to `side` x `side`."""
    edges = (box.left, box.top, box.left + box.width, box.top + box.height)
    return image.crop(edges).resize((side, side), resample)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB picture to uint8 [3, H, W].

    Turned by numpy: torch takes longer, and keeps helpers of a loader's thread (`cim_core.engine.state`).
    """
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def _largest_box(width: int, height: int) -> Box:
    w = max(1, min(width, round(height * 4 / 3)))
    h = max(1, min(height, round(width * 4 / 3)))
    return Box((width - w) // 2, (height - h) // 2, w, h)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none or where the EXIF block is broken."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a broken side block must not cost the picture; Pillow's parsers raise anything
        return 1
