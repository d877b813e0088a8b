"""Which images a step sees: an endless stream that is a pure function of the position.

Position p of the stream is place p % n of epoch p // n, whose order is a permutation of its own. Step
s takes positions s * batch_size and on; rank r takes the r-th contiguous slice of them. So nothing is
dropped or doubled at an epoch's end, and starting anywhere needs no history.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from cim_core.errors import ConfigError
from cim_core.seeding import generator_for


class SampleId(NamedTuple):
    """One use of one image: its crop differs from epoch to epoch."""

    epoch: int
    place: int  # in `Index.entries`


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The order of all images over all epochs."""

    num_images: int
    batch_size: int  # over all ranks
    seed: int

    def at(self, position: int) -> SampleId:
        """The sample at `position` of the stream."""
        epoch, place = divmod(position, self.num_images)
        return SampleId(epoch, int(epoch_order(self.num_images, self.seed, epoch)[place]))

    def batch(self, step: int, *, rank: int = 0, world_size: int = 1) -> list[SampleId]:
        """What `rank` of `world_size` sees in the step that follows `step` completed ones."""
        share = equal_share(self.batch_size, world_size)
        first = step * self.batch_size + rank * share
        return [self.at(position) for position in range(first, first + share)]


def equal_share(batch_size: int, parts: int) -> int:
    """Images in each of `parts` (ranks x micro-batches) of a step.

    Raises:
        ConfigError: the batch cannot be divided equally, so that means would not be means.
    """
    if batch_size % parts:
        lesson = (
            f"{batch_size} images cannot be divided equally among {parts} parts (workers x accumulation);"
            f" use {max(1, batch_size // parts) * parts}, or other resources.workers"
        )
        raise ConfigError([("training.batch_size", lesson)])
    return batch_size // parts


@lru_cache(maxsize=2)  # a batch may lie across the border of two epochs
def epoch_order(num_images: int, seed: int, epoch: int) -> Tensor:
    """The order of `epoch`: int64 [num_images], each index once. Read only: the result is kept."""
    return torch.randperm(num_images, generator=generator_for(seed, "order", epoch))
