"""Pooled features of a frozen timm encoder.

Shape letters in this file:
    R  images of this rank      B  images in a batch      d  feature width      H, W  pixels
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cim_core.data.dataset import ImageDataset
from cim_core.data.transforms import IMAGENET_MEAN, IMAGENET_STD

MAX_THREADS = 8


def extract(
    backbone: nn.Module,
    dataset: ImageDataset,
    *,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Tensor, Tensor]:
    """Features [R, d] float32 and classes [R] int64 of this rank's images, both on the CPU.

    Each image is the largest centred square, resized to the data set's `image_size`, with ImageNet's
    mean and deviation taken out; features are what the encoder's own pooling gives a classifier. Rank r
    takes the r-th contiguous slice; slices differ by at most one image, and the caller puts them together.
    The encoder is moved to `device` and left in the mode it was found in.

    Raises:
        DataError: the data set has no labels.
    """
    places = rank_slice(len(dataset), rank=rank, world_size=world_size)
    labels_R = torch.tensor([dataset.label(place) for place in places], dtype=torch.int64)
    backbone.to(device)
    features: list[Tensor] = []
    with evaluating(backbone), torch.no_grad():
        for pixels_B3HW in _batches(dataset, places, batch_size):
            images_B3HW = normalise(pixels_B3HW.to(device))
            features.append(pooled(backbone, images_B3HW).float().cpu())
        if not features:  # more ranks than images: still a row's width, so that ranks can be put together
            side = dataset.views.image_size
            features.append(pooled(backbone, torch.zeros(1, 3, side, side, device=device)).float().cpu()[:0])
    return torch.cat(features), labels_R


def rank_slice(count: int, *, rank: int, world_size: int) -> range:
    """The places of `rank`: contiguous, together all of `count`, nearly equal."""
    return range(count * rank // world_size, count * (rank + 1) // world_size)


def normalise(pixels_B3HW: Tensor) -> Tensor:
    """uint8 pictures to float32 with ImageNet's mean and deviation taken out."""
    mean = torch.tensor(IMAGENET_MEAN, device=pixels_B3HW.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=pixels_B3HW.device).view(3, 1, 1)
    return (pixels_B3HW.float() / 255 - mean) / std


def pooled(backbone: nn.Module, images_B3HW: Tensor) -> Tensor:
    """What a timm model would give its classifier: [B, d]."""
    features = backbone.forward_features(images_B3HW)  # type: ignore[operator]
    pooled_Bd: Tensor = backbone.forward_head(features, pre_logits=True)  # type: ignore[operator]
    return pooled_Bd


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each submodule's own mode again behind it."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _batches(dataset: ImageDataset, places: Sequence[int], batch_size: int) -> Iterator[Tensor]:
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="decode") as pool:
        for first in range(0, len(places), batch_size):
            yield torch.stack(list(pool.map(dataset.eval_image, places[first : first + batch_size])))
