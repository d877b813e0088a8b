import math
from typing import Literal

import pytest
import torch

from cim_core.masking import block_mask, count_range, make_mask, masked_positions, random_mask
from cim_core.masking_config import MASKING, MaskingConfig
from tests.unit.cim_core.cim_models import rng

Strategy = Literal["random", "block"]
CIM = MASKING["cim"]
BEIT = MaskingConfig(strategy="block", min_ratio=75 / 196, max_ratio=75 / 196, block_min_cells=16)


def test_count_range__defaults_are_100_to_120_of_196() -> None:
    assert count_range(14, CIM) == (100, 120)


@pytest.mark.parametrize(
    ("grid", "low", "high", "expected"),
    [
        (14, 0.0, 0.2, (1, 39)),  # at least one is masked
        (14, 0.5, 0.5, (98, 98)),
        (14, 0.9, 1.0, (176, 195)),  # at least one is kept
        (2, 0.01, 0.01, (1, 1)),
        (2, 1.0, 1.0, (3, 3)),
        (3, 0.2, 0.4, (2, 4)),
    ],
)
def test_count_range__by_hand(grid: int, low: float, high: float, expected: tuple[int, int]) -> None:
    assert count_range(grid, MaskingConfig(min_ratio=low, max_ratio=high)) == expected


def slow_block(target: int, grid: int, min_cells: int, generator: torch.Generator) -> set[tuple[int, int]]:
    """METHOD 7.1 in sets of cells, one cell at a time, with the draws in the same order."""
    masked: set[tuple[int, int]] = set()
    while len(masked) < target:
        remaining = target - len(masked)
        for _ in range(10):
            area_u, aspect_u, y_u, x_u = torch.rand(4, generator=generator).tolist()
            smallest = min(min_cells, target)
            area = smallest + area_u * (remaining - smallest)
            aspect = 0.3 ** (1 - 2 * aspect_u)
            height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if height not in range(1, grid) or width not in range(1, grid):
                continue
            top, left = math.floor(y_u * (grid - height + 1)), math.floor(x_u * (grid - width + 1))
            block = {(top + y, left + x) for y in range(height) for x in range(width)}
            if len(block - masked) in range(1, remaining + 1):
                masked |= block
                break
        else:
            break
    if not masked:
        masked = {divmod(int(torch.randint(grid * grid, (), generator=generator)), grid)}
    return masked


@pytest.mark.parametrize(
    ("grid", "ratios", "min_cells"),
    [
        (14, (75 / 196, 75 / 196), 16),
        (14, (0.51, 0.61), 16),
        (8, (0.1, 0.6), 4),
        (4, (0.2, 0.9), 1),
        (3, (0.9, 0.9), 9),  # no block fits: one cell alone
        (2, (0, 1), 2),
    ],
)
def test_block_mask__is_the_slow_one(grid: int, ratios: tuple[float, float], min_cells: int) -> None:
    low, high = ratios
    config = MaskingConfig(strategy="block", min_ratio=low, max_ratio=high, block_min_cells=min_cells)
    generator = rng(5)
    smallest, largest = count_range(grid, config)
    counts = torch.randint(smallest, largest + 1, (60,), generator=generator)
    expected = [slow_block(count, grid, min_cells, generator) for count in counts.tolist()]
    masks = block_mask(60, grid, config, rng(5)).view(60, grid, grid)
    assert [{(int(y), int(x)) for y, x in mask.nonzero()} for mask in masks] == expected


def test_random_mask__is_the_first_of_a_shuffled_list() -> None:
    config, generator = MaskingConfig(min_ratio=0.2, max_ratio=0.8), rng(5)
    counts = torch.randint(7, 30, (40,), generator=generator).tolist()  # 20 to 80 % of 36
    noise = torch.rand(40, 36, generator=generator).tolist()
    expected = [
        sorted(sorted(range(36), key=row.__getitem__)[:count])
        for row, count in zip(noise, counts, strict=True)
    ]
    masks = random_mask(40, 6, config, rng(5))
    assert [mask.nonzero().flatten().tolist() for mask in masks] == expected


def test_random_mask__counts_are_uniform_over_the_range_and_differ_per_image() -> None:
    counts = random_mask(8_400, 14, CIM, rng()).sum(dim=1)
    assert (int(counts.min()), int(counts.max())) == (100, 120)
    seen = torch.bincount(counts - 100, minlength=21).double()
    chi_square = float(((seen - 400).square() / 400).sum())
    assert chi_square < 45.3  # 0.1 % point of chi-square with 20 degrees of freedom


def test_random_mask__every_position_is_masked_equally_often() -> None:
    share_N = random_mask(20_000, 4, MaskingConfig(min_ratio=0.5, max_ratio=0.5), rng(1)).double().mean(dim=0)
    deviation = math.sqrt(0.25 / 20_000)
    assert (share_N - 0.5).abs().max() < 5 * deviation


def test_random_mask__images_of_a_batch_have_masks_of_their_own() -> None:
    masks = random_mask(64, 14, CIM, rng())
    assert len({tuple(row.tolist()) for row in masks}) == 64


def test_block_mask__matches_beit() -> None:
    """METHOD 7.1: 20,000 draws gave mean 74.5, sd 1.0, the exact target in 67 %, minimum 64."""
    num_draws = 3_000
    counts = block_mask(num_draws, 14, BEIT, rng()).sum(dim=1).double()
    exact = float((counts == 75).double().mean())
    assert counts.max() == 75
    assert counts.min() >= 60
    assert float(counts.mean()) == pytest.approx(74.5, abs=0.05 + 4 * 1.0 / math.sqrt(num_draws))
    assert float(counts.std()) == pytest.approx(1.0, abs=0.2)
    assert exact == pytest.approx(0.67, abs=0.005 + 4 * math.sqrt(0.67 * 0.33 / num_draws))


def test_block_mask__masks_blocks_and_not_scattered_cells() -> None:
    def neighbours(masks: torch.Tensor) -> float:
        grid = masks.view(-1, 14, 14)
        return float((grid[:, :, 1:] & grid[:, :, :-1]).double().mean())

    scattered = MaskingConfig(strategy="random", min_ratio=BEIT.min_ratio, max_ratio=BEIT.max_ratio)
    assert neighbours(block_mask(50, 14, BEIT, rng())) > 1.5 * neighbours(
        random_mask(50, 14, scattered, rng())
    )


def test_block_mask__draws_its_target_per_image() -> None:
    config = MaskingConfig(strategy="block", min_ratio=0.2, max_ratio=0.6)
    counts = block_mask(200, 14, config, rng()).sum(dim=1)
    assert counts.max() <= round(0.6 * 196)
    assert counts.max() - counts.min() > 40


@pytest.mark.parametrize("strategy", ["random", "block"])
@pytest.mark.parametrize("ratio", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("grid", [2, 3, 8])
def test_make_mask__leaves_one_masked_and_one_visible(strategy: Strategy, ratio: float, grid: int) -> None:
    mask = make_mask(50, grid, MaskingConfig(strategy=strategy, min_ratio=ratio, max_ratio=ratio), rng())
    counts = mask.sum(dim=1)
    assert mask.shape == (50, grid * grid)
    assert mask.dtype == torch.bool
    assert counts.min() >= 1
    assert counts.max() <= grid * grid - 1


def test_make_mask__a_single_position_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 token position.*needs at least 2"):
        make_mask(2, 1, CIM, rng())


@pytest.mark.parametrize("config", [CIM, BEIT], ids=["random", "block"])
def test_make_mask__depends_on_the_generator_alone(config: MaskingConfig) -> None:
    torch.manual_seed(1)
    first = make_mask(4, 14, config, rng(3))
    torch.manual_seed(2)
    assert torch.equal(first, make_mask(4, 14, config, rng(3)))
    assert not torch.equal(first, make_mask(4, 14, config, rng(4)))


def test_masked_positions__are_the_places_of_the_true_ones_in_order() -> None:
    mask = torch.tensor([[False, True, False], [False, False, False], [True, False, True]])
    assert masked_positions(mask).tolist() == [1, 6, 8]
    assert masked_positions(mask[:1]).tolist() == [1]
    assert masked_positions(mask[:1]).dtype == torch.int64
