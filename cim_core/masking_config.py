"""Which share of an image is masked and how, for each method; standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from cim_core.rules import STRICT, Rules

MOST_CELLS = 10**6
_SMALLEST_UNITS = 6  # mask units a side that an image has at least: SimMIM's 32 pixels at 192 and at 224


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Which positions are masked; the count is uniform between the two ratios. None: the method's own."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    strategy: Literal["random", "block"] | None = None
    min_ratio: float | None = None
    max_ratio: float | None = None
    block_min_cells: int = 16  # block: smallest block, as in BEiT's launcher
    unit: int | None = None  # simmim: side of the squares that are masked as a whole, pixels

    def __post_init__(self) -> None:
        rules = Rules(self)
        rules.within(0.0, 1.0, "min_ratio")
        rules.above(0, 1, "max_ratio")
        ordered = self.min_ratio is None or self.max_ratio is None or self.max_ratio >= self.min_ratio
        rules.check("max_ratio", f"must not be below min_ratio {self.min_ratio}", ok=ordered)
        rules.within(1, MOST_CELLS, "block_min_cells", "unit")
        rules.done()


# 100 to 120 of 196 positions; 75 of 196, in blocks; 60 %; 75 %. Sources: docs/method.md.
MASKING: Mapping[str, MaskingConfig] = MappingProxyType(
    {
        "cim": MaskingConfig(strategy="random", min_ratio=0.51, max_ratio=0.61),
        "beit": MaskingConfig(strategy="block", min_ratio=0.383, max_ratio=0.383),
        "simmim": MaskingConfig(strategy="random", min_ratio=0.6, max_ratio=0.6),
        "mae": MaskingConfig(strategy="random", min_ratio=0.75, max_ratio=0.75),
    }
)


def filled(masking: MaskingConfig, *, method: str, image_size: int, patch_size: int) -> MaskingConfig:
    """`masking` without open fields: what it leaves open is the method's."""
    own = MASKING[method]
    if method == "simmim":
        own = replace(own, unit=_largest_unit(image_size, patch_size))
    given = {f.name: getattr(masking, f.name) for f in fields(MaskingConfig)}
    return replace(own, **{name: value for name, value in given.items() if value is not None})


def _largest_unit(image_size: int, patch_size: int) -> int:
    """Pixels: the largest multiple of the patch that tiles the image, of at least six units a side."""
    units = range(patch_size, image_size // _SMALLEST_UNITS + 1, patch_size)
    return max((unit for unit in units if image_size % unit == 0), default=patch_size)
