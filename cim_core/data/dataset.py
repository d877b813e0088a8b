"""Images as tensors: random views for training, the centre for probes.

Shape letters in this file:
    B     images in the batch        H, W  height and width, pixels
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from cim_core.data.index import Index
from cim_core.data.sampler import SampleId
from cim_core.data.transforms import BICUBIC, LANCZOS, Box, centre_square, cut, decode, random_box, to_tensor
from cim_core.data.unreadable import mendable
from cim_core.errors import DataError
from cim_core.seeding import generator_for

PILLOW_PIXEL_BYTES = 4  # an RGB picture in memory
CACHE_BYTES = 256 * 2**20  # in each process; docs/lab-log.md has what it saves


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """What is cut out of each image. Sizes in pixels."""

    image_size: int
    token_size: int | None = None  # side of the tokenizer's input; None: no second view
    crop_min: float = 0.08  # smallest area of the crop, as a share of the picture
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Views:
    """A batch: one crop of each image at two sizes. Pixels are uint8, 0 to 255."""

    pixels_B3HW: Tensor  # image_size a side
    token_pixels_B3HW: Tensor  # token_size a side; [B, 3, 0, 0] where none was asked for
    ids_B2: Tensor  # int64: epoch and index of each sample, for tests and records

    def __len__(self) -> int:
        return len(self.pixels_B3HW)

    def split(self, parts: int) -> list["Views"]:
        """`parts` batches of equal size, in order; the size must be divisible."""
        assert len(self) % parts == 0, f"{len(self)} images do not make {parts} equal parts"
        return self.portions(len(self) // parts)

    def portions(self, size: int) -> list["Views"]:
        """Batches of `size` images, in order; the last one may be smaller."""
        return [
            Views(pixels_B3HW=pixels, token_pixels_B3HW=token_pixels, ids_B2=ids)
            for pixels, token_pixels, ids in zip(
                torch.split(self.pixels_B3HW, size),
                torch.split(self.token_pixels_B3HW, size),
                torch.split(self.ids_B2, size),
                strict=True,
            )
        ]

    def to(self, device: torch.device) -> "Views":
        """The pictures on `device`; the ids stay where they are."""
        return replace(
            self,
            pixels_B3HW=self.pixels_B3HW.to(device, non_blocking=True),
            token_pixels_B3HW=self.token_pixels_B3HW.to(device, non_blocking=True),
        )

    def hold(self, stream: torch.cuda.Stream) -> None:
        """Keep the pictures' memory on a GPU, once released, until `stream` is done with it."""
        self.pixels_B3HW.record_stream(stream)
        self.token_pixels_B3HW.record_stream(stream)

    def pin(self) -> "Views":
        """The pictures in page-locked memory, from which copies to a GPU need not wait."""
        return replace(
            self,
            pixels_B3HW=self.pixels_B3HW.pin_memory(),
            token_pixels_B3HW=self.token_pixels_B3HW.pin_memory(),
        )


class ImageDataset:
    """The images of an index; an item is one use of one image, keyed by (epoch, index)."""

    def __init__(self, index: Index, views: ViewConfig, *, cache_bytes: int = CACHE_BYTES) -> None:
        """Views of `index`; up to `cache_bytes` of decoded pictures are kept (the views stay the same)."""
        self.index = index
        self.views = views
        self._room_bytes = cache_bytes
        self._kept: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, object]:
        """For the loader's processes, which fill a cache of their own."""
        return {**self.__dict__, "_kept": {}}

    def __getitem__(self, key: SampleId) -> Views:
        """The views of one sample as a batch of one: one crop and flip, resized to both sizes."""
        epoch, place = key
        config = self.views
        image = self.picture(place)
        generator = generator_for(config.seed, "augment", epoch, place)
        box = random_box(image.size, crop_min=config.crop_min, generator=generator)
        flip = bool(torch.rand((), generator=generator) < 0.5)
        pixels = _view(image, box, config.image_size, resample=BICUBIC, flip=flip)
        if config.token_size is None:
            token_pixels = torch.empty(3, 0, 0, dtype=torch.uint8)
        else:
            token_pixels = _view(image, box, config.token_size, resample=LANCZOS, flip=flip)
        return Views(
            pixels_B3HW=pixels[None],
            token_pixels_B3HW=token_pixels[None],
            ids_B2=torch.tensor([[epoch, place]]),
        )

    def eval_image(self, place: int) -> Tensor:
        """The largest centred square of image `place`: uint8 [3, image_size, image_size]."""
        image = self.picture(place)
        box = centre_square(image.size)
        return _view(image, box, self.views.image_size, resample=BICUBIC, flip=False)

    def label(self, place: int) -> int:
        """The class of image `place`.

        Raises:
            DataError: the data set has no labels.
        """
        label = self.index.entries[place].label
        if label is None:
            raise DataError(
                f"{self.index.root} has no labels: a labelled data set holds each image at CLASS/FILE, as in"
                " cats/01.jpg"
            )
        return label

    def picture(self, place: int) -> Image.Image:
        """Image `place`, upright, in RGB and full size; others may hold it too, so do not change it.

        Raises:
            OSError: the file cannot be read for a reason that may pass.
            DataError: the file was usable when the index was made, and is gone or not usable any more.
        """
        if (kept := self._kept.get(place)) is not None:
            return kept
        image = self._decoded(place)
        # First come, first kept: an epoch uses every picture once, so evicting would only cost.
        # Threads may race here and keep one picture too many, which harms nothing.
        if (size_bytes := image.width * image.height * PILLOW_PIXEL_BYTES) <= self._room_bytes:
            self._room_bytes -= size_bytes
            self._kept[place] = image
        return image

    def _decoded(self, place: int) -> Image.Image:
        name = self.index.entries[place].name
        with mendable(f"{name} was there when training began and", remedy="put it back, or submit again"):
            data = self.index.read(place)
        try:
            return decode(data)
        except Exception as error:  # Pillow raises many classes for broken data
            raise DataError(
                f"{name} was changed after training began and is not usable any more: {error}"
            ) from error


def collate(items: Sequence[Views]) -> Views:
    """Batches (of one, mostly) put together in the order given."""
    return Views(
        pixels_B3HW=torch.cat([item.pixels_B3HW for item in items]),
        token_pixels_B3HW=torch.cat([item.token_pixels_B3HW for item in items]),
        ids_B2=torch.cat([item.ids_B2 for item in items]),
    )


def _view(image: Image.Image, box: Box, side: int, *, resample: Image.Resampling, flip: bool) -> Tensor:
    small = cut(image, box, side, resample=resample)
    return to_tensor(small.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else small)
