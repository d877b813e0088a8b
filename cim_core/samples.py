"""Pictures of what a CIM model does to a few images, for the eye.

Shape letters in this file:
    B  images      g  token positions a side      N  token positions, g * g
    H, W  image height and width, pixels
"""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from cim_core.cim import CIM, StepOutput
from cim_core.data.dataset import Views

MAX_ROWS = 8
MIN_CELL = 128  # pixels; smaller images are enlarged by a whole factor
_GAP = 4
_HEADER = 24
_BACKGROUND, _INK, _MASKED = (255, 255, 255), (20, 20, 20), 0.5
_LAST_TITLE = {"respix": "restored", "revdet": "found replaced"}


@torch.no_grad()
def sample_grid(cim: CIM, views: Views, *, generator: torch.Generator) -> Image.Image:
    """A picture of rows `original | masked | corrupted | enhancer's output`, 8 rows at most.

    Respix shows the restored image (`Respix.picture` says what of it is given), revdet the probability
    of each position to be replaced as red over the corrupted image. The model's mode is kept.
    """
    few = Views(
        pixels_B3HW=views.pixels_B3HW[:MAX_ROWS],
        token_pixels_B3HW=views.token_pixels_B3HW[:MAX_ROWS],
        ids_B2=views.ids_B2[:MAX_ROWS],
    )
    was_training = cim.training
    cim.eval()
    try:
        output = cim(few, generator=generator)
    finally:
        cim.train(was_training)
    columns = _columns(cim, output)
    titles = ("original", "masked", "corrupted", _LAST_TITLE[cim.config.objective.name])
    return _paint(columns, titles)


def _columns(cim: CIM, output: StepOutput) -> list[Tensor]:
    clean_B3HW = output.clean_B3HW
    mask_B1gg = output.mask_BN.float().view(-1, 1, cim.grid, cim.grid)
    mask_B1HW = F.interpolate(mask_B1gg, size=clean_B3HW.shape[-2:], mode="nearest")
    result = cim.objective.picture(
        output.prediction, clean_B3HW=clean_B3HW, corrupted_B3HW=output.corrupted_B3HW
    )
    return [clean_B3HW, clean_B3HW * (1 - mask_B1HW) + _MASKED * mask_B1HW, output.corrupted_B3HW, result]


def _paint(columns: list[Tensor], titles: tuple[str, ...]) -> Image.Image:
    """Columns of images [B, 3, H, W] in [0, 1], each under its title."""
    num_rows, _, height, width = columns[0].shape
    scale = max(1, -(-MIN_CELL // min(height, width)))
    cell_h, cell_w = height * scale, width * scale
    size = (len(columns) * (cell_w + _GAP) + _GAP, _HEADER + num_rows * (cell_h + _GAP))
    canvas = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, (images, title) in enumerate(zip(columns, titles, strict=True)):
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
