"""Images that several runs look at, decoded once."""

import dataclasses
import functools

from PIL import Image
from torch import Tensor

from cim_core.data.dataset import ImageDataset, ViewConfig
from cim_core.data.index import Index


def thinned(index: Index, most: int) -> Index:
    """Every k-th image, `most` at most."""
    return dataclasses.replace(index, entries=index.entries[:: -(-len(index) // most)])


def decoded(images: ImageDataset) -> ImageDataset:
    """The same, its pictures in memory up to the first that has no room: no clock counts their decoding."""
    for place in range(len(images)):
        if images.picture(place) is not images.picture(place):
            break
    return images


class Labelled:
    """Labelled images, every k-th of a set, each decoded once for all runs."""

    def __init__(self, index: Index, most: int) -> None:
        self.index = thinned(index, most)
        self._sets: dict[int, ImageDataset] = {}

    def of(self, image_size: int) -> ImageDataset:
        """The images at this size."""
        views = ViewConfig(image_size=image_size)
        return self._sets.setdefault(image_size, KeptDataset(self.index, views, cache_bytes=0))


class KeptDataset(ImageDataset):
    """A data set that keeps the few bytes that a probe looks at instead of whole pictures."""

    def eval_image(self, place: int) -> Tensor:
        if place not in self._pixels:
            self._pixels[place] = super().eval_image(place)
        return self._pixels[place]

    @functools.cached_property
    def _pixels(self) -> dict[int, Tensor]:
        return {}


class SameImages(ImageDataset):
    """Other views of the images of `source`, which decodes and keeps them."""

    def __init__(self, source: ImageDataset, views: ViewConfig) -> None:
        super().__init__(source.index, views, cache_bytes=0)
        self._source = source

    def picture(self, place: int) -> Image.Image:
        return self._source.picture(place)
