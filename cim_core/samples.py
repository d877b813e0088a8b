"""Pictures of what a model in pre-training does to a few images, for the eye.

Shape letters in this file:
    B  images      H, W  image height and width, pixels
"""

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cim_core.data.dataset import Views
from cim_core.evaluation.features import evaluating
from cim_core.pretraining import Pretraining

MAX_ROWS = 8
MIN_CELL = 128  # pixels; smaller images are enlarged by a whole factor
_GAP = 4
_HEADER = 24
_BACKGROUND, _INK = (255, 255, 255), (20, 20, 20)


@torch.no_grad()
def sample_grid(model: Pretraining, views: Views, *, generator: torch.Generator) -> Image.Image:
    """A picture with a row for each image, 8 at most, and the columns that the method has.

    CIM: `original | masked | corrupted | enhancer's output`, which is the restored image of respix
    (`Respix.picture` says what of it is given) or the probability of each position to be replaced, as red
    over the corrupted image. Peers: `original | masked | prediction`. The model's mode is kept.
    """
    few = views.portions(MAX_ROWS)[0]
    with evaluating(model):
        output = model(few, generator=generator)
    return _paint(model.columns(output))


def _paint(columns: Mapping[str, Tensor]) -> Image.Image:
    """Columns of images [B, 3, H, W] in [0, 1], each under its title."""
    num_rows, _, height, width = next(iter(columns.values())).shape
    scale = max(1, -(-MIN_CELL // min(height, width)))
    cell_h, cell_w = height * scale, width * scale
    size = (len(columns) * (cell_w + _GAP) + _GAP, _HEADER + num_rows * (cell_h + _GAP))
    canvas = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, (title, images) in enumerate(columns.items()):
        left = _GAP + number * (cell_w + _GAP)
        draw.text((left, _HEADER // 2), title, fill=_INK, font=ImageFont.load_default(size=14), anchor="lm")
        for row, pixels in enumerate(_to_bytes(images)):
            cell = Image.fromarray(pixels).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            canvas.paste(cell, (left, _HEADER + row * (cell_h + _GAP)))
    return canvas


def _to_bytes(images_B3HW: Tensor) -> np.ndarray:
    """Images in [0, 1] as uint8 [B, H, W, 3]."""
    scaled = (images_B3HW.float().clamp(0, 1) * 255).round().to(torch.uint8)
    array: np.ndarray = scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return array
