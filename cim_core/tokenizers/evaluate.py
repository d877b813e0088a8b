"""How good a tokenizer is: numbers over a set of images, and a picture for the eye.

Shape letters in this file:
    B  images      H, W  image sides, pixels      V  vocabulary of the tokenizer
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from cim_core.config import TokenizerConfig
from cim_core.evaluation.ssim import WINDOW, ssim
from cim_core.tokenizers.base import Tokenizer
from cim_core.tokenizers.quantise import usage

COLLAPSED = 0.1  # a perplexity below this share of the vocabulary
# Peak rate times width: above it the first steps throw encoders off, far below it the logits of `relaxed`
# do not outgrow the noise (docs/lab-log.md, 2026-11-28, widths 16 and 64).
RATE_TIMES_WIDTH = 0.128
MAX_ROWS = 8
MIN_CELL = 128  # pixels; smaller pictures are enlarged by a whole factor
TITLES = ("original", "reconstruction")
_GAP, _HEADER = 4, 20
_BACKGROUND, _INK = (255, 255, 255), (20, 20, 20)
# 96 dB, better than 8 bits can show: keeps a perfect copy finite.
_SMALLEST_ERROR = 2.5e-10


@torch.no_grad()
def evaluate_tokenizer(tokenizer: Tokenizer, batches: Iterable[Tensor]) -> Iterator[tuple[str, float]]:
    """Yield (name, value): what is lost between an image and its tokens, over all `batches`.

    Args:
        tokenizer: on the device of the images.
        batches: float images [B, 3, H, W] in [0, 1].

    Yields:
        `psnr` in dB, of the squared error averaged over all images; `ssim`, the images' mean, left out
        where a side is under 11 pixels; `codes_used`, the share of the vocabulary that occurs;
        `perplexity` of the tokens, 1 to V.

    Raises:
        ValueError: there is no image, or a side is no multiple of the stride.
    """
    squared_error, num_values, num_images, similarity = 0.0, 0, 0, 0.0
    counts_V = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    for images_B3HW in batches:
        ids_Bhw = tokenizer.encode(images_B3HW)
        copies_B3HW = tokenizer.decode(ids_Bhw).float()
        difference = copies_B3HW - images_B3HW.float()
        squared_error += difference.double().square().sum().item()
        num_values += difference.numel()
        num_images += len(images_B3HW)
        large = min(images_B3HW.shape[-2:]) >= WINDOW
        similarity += ssim(images_B3HW, copies_B3HW).sum().item() if large else float("nan")
        counts_V += torch.bincount(ids_Bhw.flatten().cpu(), minlength=tokenizer.vocab_size)
    if num_values == 0:
        raise ValueError("a tokenizer cannot be evaluated on no image")
    error = max(squared_error / num_values, _SMALLEST_ERROR)
    yield "psnr", -10 * torch.tensor(error, dtype=torch.float64).log10().item()
    if not math.isnan(similarity):
        yield "ssim", similarity / num_images
    yield from ((name, value.item()) for name, value in usage(counts_V.double()).items())


def collapse(metrics: Mapping[str, float], config: TokenizerConfig) -> str | None:
    """What is wrong with a codebook of which hardly anything is used; None where it is sound.

    `metrics` holds `perplexity` and `codes_used`, as from `evaluate_tokenizer`, over many more tokens
    than codes.
    """
    perplexity, bar = metrics["perplexity"], COLLAPSED * config.vocab_size
    if perplexity >= bar:
        return None
    rate = (
        f"bring training.learning_rate near {RATE_TIMES_WIDTH / config.width:.2g}, lengthen training.warmup"
    )
    remedies = f"{rate}, raise model.kl_weight" if config.quantiser == "relaxed" else rate
    return (
        f"the codebook has collapsed: its {config.vocab_size} codes are used like {perplexity:.1f} even ones "
        f"(below {bar:.0f}; {metrics['codes_used']:.0%} occur at all), so tokens say little. Train "
        f"longer, {remedies}, give a smaller model.vocab_size or more varied images"
    )


@torch.no_grad()
def reconstruction_grid(tokenizer: Tokenizer, images_B3HW: Tensor) -> Image.Image:
    """A picture with a row `original | reconstruction` for each image, 8 rows at most.

    Images are floats [B, 3, H, W] in [0, 1] on the tokenizer's device.
    """
    few_B3HW = images_B3HW[:MAX_ROWS]
    copies_B3HW = tokenizer.decode(tokenizer.encode(few_B3HW))
    num_rows, _, height, width = few_B3HW.shape
    scale = max(1, -(-MIN_CELL // min(height, width)))
    cell_w, cell_h = width * scale, height * scale
    size = (_GAP + 2 * (cell_w + _GAP), _HEADER + num_rows * (cell_h + _GAP))
    picture = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for column, (title, images) in enumerate(zip(TITLES, (few_B3HW, copies_B3HW), strict=True)):
        left = _GAP + column * (cell_w + _GAP)
        draw.text((left, 4), title, fill=_INK)
        for row, image_3HW in enumerate(images):
            cell = _to_pil(image_3HW).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            picture.paste(cell, (left, _HEADER + row * (cell_h + _GAP)))
    return picture


def _to_pil(image_3HW: Tensor) -> Image.Image:
    pixels_HW3 = (image_3HW.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels_HW3.cpu().contiguous().numpy())
