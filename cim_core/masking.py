"""Which token positions of an image are replaced: a mask of its own for every image.

Shape letters in this file:
    B  images on this rank
    g  token positions a side      N  token positions, g * g

Masks are boolean, True where a token is replaced. Both strategies draw the number of masked
positions per image, uniformly between `round(min_ratio * N)` and `round(max_ratio * N)`, and leave
at least one position masked and one visible, so that no loss is a mean over nothing.
"""

import math

import torch
from torch import Tensor

from cim_core.masking_config import MaskingConfig

_TRIES = 10  # placements tried before a block is given up, as in BEiT
_MIN_ASPECT = 0.3  # blocks are at most 1 / 0.3 times as long as they are wide, as in BEiT


def make_mask(num_images: int, grid: int, config: MaskingConfig, generator: torch.Generator) -> Tensor:
    """Draw a mask [B, N] with the strategy that `config` names; all randomness is `generator`'s.

    Here and below `config` is a filled one, as `ModelConfig.resolved` holds it.
    """
    assert config.strategy is not None
    return _STRATEGIES[config.strategy](num_images, grid, config, generator)


def masked_positions(mask_BN: Tensor) -> Tensor:
    """The places of the True ones in the flattened mask: [M], int64, in order.

    To be asked where the mask was made, on the CPU: how many there are is known there without waiting.
    """
    return mask_BN.flatten().nonzero().squeeze(1)


def random_mask(num_images: int, grid: int, config: MaskingConfig, generator: torch.Generator) -> Tensor:
    """Mask positions drawn without replacement; returns [B, N]. The paper's choice."""
    counts_B1 = _draw_counts(num_images, grid, config, generator)[:, None]
    noise_BN = torch.rand(num_images, grid * grid, generator=generator)
    rank_BN = noise_BN.argsort(dim=1).argsort(dim=1)
    return rank_BN < counts_B1


def block_mask(num_images: int, grid: int, config: MaskingConfig, generator: torch.Generator) -> Tensor:
    """Mask rectangles until the drawn count is reached, as BEiT does; returns [B, N].

    The count may end below the drawn one (where no further block fits), never above it. Source:
    BEiT (arXiv 2106.08254), algorithm 1, with the constants of its published launcher.
    """
    counts = _draw_counts(num_images, grid, config, generator).tolist()
    masks = [_one_block_mask(count, grid, config.block_min_cells, generator) for count in counts]
    return torch.stack(masks).flatten(1)


def count_range(grid: int, config: MaskingConfig) -> tuple[int, int]:
    """The smallest and the largest number of masked positions that may be drawn."""
    num_positions = grid * grid
    assert config.min_ratio is not None
    assert config.max_ratio is not None
    low = min(max(round(config.min_ratio * num_positions), 1), num_positions - 1)
    high = min(max(round(config.max_ratio * num_positions), low), num_positions - 1)
    if not 1 <= low <= high:
        raise ValueError(
            f"image_size / patch_size gives {num_positions} token position(s); masking needs at least 2: "
            "one to replace and one to keep"
        )
    return low, high


def _draw_counts(num_images: int, grid: int, config: MaskingConfig, generator: torch.Generator) -> Tensor:
    low, high = count_range(grid, config)
    return torch.randint(low, high + 1, (num_images,), generator=generator)


def _one_block_mask(target: int, grid: int, min_cells: int, generator: torch.Generator) -> Tensor:
    """One [g, g] mask of at most `target` cells, and at least one."""
    mask_gg = torch.zeros(grid, grid, dtype=torch.bool)
    while (remaining := target - int(mask_gg.sum())) > 0:
        if not _add_block(mask_gg, remaining, min(min_cells, target), generator):
            break
    if not mask_gg.any():
        cell = int(torch.randint(grid * grid, (), generator=generator))
        mask_gg.view(-1)[cell] = True
    return mask_gg


def _add_block(mask_gg: Tensor, remaining: int, min_cells: int, generator: torch.Generator) -> bool:
    """Try to mask one more rectangle that adds 1 to `remaining` cells; False if none was found."""
    grid = mask_gg.shape[0]
    for _ in range(_TRIES):
        u_area, u_aspect, u_top, u_left = torch.rand(4, generator=generator).tolist()
        # `remaining` may be below `min_cells`; the interval then runs the other way round, as in BEiT.
        area = min_cells + u_area * (remaining - min_cells)
        aspect = math.exp((1 - 2 * u_aspect) * math.log(_MIN_ASPECT))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < grid and 0 < width < grid):
            continue
        top, left = int(u_top * (grid - height + 1)), int(u_left * (grid - width + 1))
        block = mask_gg[top : top + height, left : left + width]
        if 0 < block.numel() - int(block.sum()) <= remaining:
            block[:] = True
            return True
    return False


_STRATEGIES = {"random": random_mask, "block": block_mask}
