"""What features are worth: k-NN and a linear layer on them; encoders, and the controls beside them.

Shape letters in this file:
    B  images      D  feature channels      h  positions a side      S  image side, pixels
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from benchmarks.labelled import Labelled
from cim_core.data.dataset import ImageDataset
from cim_core.data.loading import ImageLoader
from cim_core.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from cim_core.evaluation.features import extract, normalise
from cim_core.evaluation.knn import weighted_knn
from cim_core.evaluation.logistic import logistic_probe
from cim_core.models.enhancer import Enhancer
from cim_core.seeding import generator_for
from cim_core.tokenizers.dvae import DiscreteVAE
from cim_core.tokenizers.network import map_pixels

PIXEL_SIDE = 16
RECALIBRATION_BATCHES, RECALIBRATION_BATCH = 20, 64


class MeanOverPositions(nn.Module):
    """Gives the pooled features that `extract` asks for: the mean over the positions of a map."""

    def __init__(self, to_map: nn.Module) -> None:
        super().__init__()
        self.to_map = to_map

    def forward_features(self, images_B3SS: Tensor) -> Tensor:
        """The map [B, D, h, h] of ImageNet-normalised images."""
        map_BDhh: Tensor = self.to_map(images_B3SS)
        return map_BDhh

    def forward_head(self, map_BDhh: Tensor, *, pre_logits: bool) -> Tensor:
        """[B, D]."""
        assert pre_logits
        return map_BDhh.mean(dim=(2, 3))


class Pixels(nn.Module):
    """Every pixel is a feature."""

    def forward_features(self, images_B3SS: Tensor) -> Tensor:
        """As they are."""
        return images_B3SS

    def forward_head(self, images_B3SS: Tensor, *, pre_logits: bool) -> Tensor:
        """[B, 3 * S * S]."""
        assert pre_logits
        return images_B3SS.flatten(1)


class Unnormalised(nn.Module):
    """What begins with pixels in [0, 1], of images that come ImageNet-normalised."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def pixels(self, images_B3SS: Tensor) -> Tensor:
        """In [0, 1], but for rounding."""
        return images_B3SS * self.std + self.mean


class TokenizerMap(Unnormalised):
    """The tokenizer's encoder up to the layer that names the codes."""

    def __init__(self, tokenizer: DiscreteVAE) -> None:
        super().__init__()
        self.blocks = tokenizer.encoder.blocks[:-1]

    def forward(self, images_B3SS: Tensor) -> Tensor:
        """Maps [B, D, h, h] of ImageNet-normalised images."""
        map_BDhh: Tensor = self.blocks(map_pixels(self.pixels(images_B3SS)))
        return map_BDhh


class DecodedMap(Unnormalised):
    """An encoder's map of decoded pictures: what CIM would show it with no token replaced."""

    def __init__(self, to_map: nn.Module, tokenizer: DiscreteVAE, *, token_size: int) -> None:
        """`token_size`: pixels a side of what the tokenizer sees."""
        super().__init__()
        self.to_map, self.tokenizer, self.token_size = to_map, tokenizer, token_size

    def forward(self, images_B3SS: Tensor) -> Tensor:
        """Maps [B, D, h, h] of ImageNet-normalised images."""
        small = _resized(self.pixels(images_B3SS), self.token_size)
        decoded = self.tokenizer.decode(self.tokenizer.encode(small))
        map_BDhh: Tensor = self.to_map((_resized(decoded, images_B3SS.shape[-1]) - self.mean) / self.std)
        return map_BDhh


def _resized(pixels: Tensor, side: int) -> Tensor:
    shrinks = pixels.shape[-1] > side
    resized = F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=shrinks)
    return resized.clamp(0, 1)  # bicubic overshoots at edges


class StageMap(nn.Module):
    """The map of one stage of a CNN, counted as timm counts them in `feature_info`."""

    def __init__(self, enhancer: Enhancer, stage: int) -> None:
        super().__init__()
        self.backbone: Any = enhancer.backbone
        self.stage = stage

    def forward(self, images_B3SS: Tensor) -> Tensor:
        """Maps [B, D, h, h] of ImageNet-normalised images."""
        (map_BDhh,) = self.backbone.forward_intermediates(
            images_B3SS, indices=[self.stage], intermediates_only=True
        )
        return map_BDhh  # type: ignore[no-any-return]


def inner_stages(enhancer: Enhancer) -> list[int]:
    """The two stages of a CNN before its last one; in a ResNet they are `layer2` and `layer3`."""
    info: Any = enhancer.backbone.feature_info
    return list(range(len(info)))[-3:-1]


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Two labelled sets: all of them for the end, some of them for curves."""

    full: tuple[Labelled, Labelled]  # votes or trains, is classified
    few: tuple[Labelled, Labelled]
    device: torch.device

    def knn(self, encoder: nn.Module, *, image_size: int) -> float:
        """k-NN accuracy on some of the images."""
        return self._knn(self._features(self.few, encoder, image_size))

    def all(self, encoder: nn.Module, *, image_size: int, seed: int) -> dict[str, float]:
        """k-NN and linear accuracy on all of the images; `l2` as chosen by the linear probe."""
        features = self._features(self.full, encoder, image_size)
        linear = logistic_probe(
            *features,
            num_classes=self.num_classes,
            generator=generator_for(seed, "learning", "held out"),
        )
        return {"knn": self._knn(features), "linear": linear.accuracy, "l2": linear.l2}

    @property
    def num_classes(self) -> int:
        """Of both sets."""
        return len(self.full[0].index.classes)

    def _knn(self, features: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
        k = min(20, len(features[0]))
        return weighted_knn(*features, k=k, num_classes=self.num_classes)

    def _features(
        self, sets: tuple[Labelled, Labelled], encoder: nn.Module, image_size: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        train, val = (
            extract(encoder, part.of(image_size), batch_size=128, device=self.device) for part in sets
        )
        return (*train, *val)


def controls(tokenizer: DiscreteVAE, *, grid: int) -> dict[str, tuple[nn.Module, int]]:
    """What the features of a pre-training have to be better than: encoder and side of its images, pixels."""
    return {
        "pixels": (Pixels(), PIXEL_SIDE),
        "tokenizer-features": (MeanOverPositions(TokenizerMap(tokenizer)), grid * tokenizer.stride),
    }


def recalibrated(enhancer: Enhancer, dataset: ImageDataset, *, device: torch.device) -> Enhancer:
    """A copy whose batch-norm statistics are those of real images, augmented as in training."""
    enhancer = copy.deepcopy(enhancer)
    loader = ImageLoader(dataset, batch_size=min(RECALIBRATION_BATCH, len(dataset)))
    batches = loader.steps(0, RECALIBRATION_BATCHES)
    update_bn((normalise(views.pixels_B3HW.to(device)) for views in batches), enhancer)
    return enhancer


def probed(
    probes: Probes,
    enhancer: Enhancer,
    dataset: ImageDataset,
    *,
    image_size: int,
    seed: int,
    decoded: nn.Module | None = None,
) -> dict[str, float]:
    """All that is said of one encoder.

    `own_...` is by timm's own pooling where that is another (the class token of a plain ViT), `bn_...`
    with recalibrated batch norm where there is any; `dataset` holds the real images for it. `decoded`, a
    map of reconstructions, asks for more: `decoded_...` of it, `stage2_...` of an inner stage of a CNN
    with recalibrated batch norm.
    """
    found = probes.all(MeanOverPositions(enhancer), image_size=image_size, seed=seed)
    others: dict[str, nn.Module] = {}
    if enhancer.is_vit:
        others["own"] = enhancer.backbone
    if decoded is not None:
        others["decoded"] = MeanOverPositions(decoded)
    if any(isinstance(layer, nn.BatchNorm2d) for layer in enhancer.modules()):
        calibrated = recalibrated(enhancer, dataset, device=probes.device)
        others["bn"] = MeanOverPositions(calibrated)
        for stage in inner_stages(calibrated) if decoded is not None else ():
            others[f"stage{stage}"] = MeanOverPositions(StageMap(calibrated, stage))
    for name, encoder in others.items():
        again = probes.all(encoder, image_size=image_size, seed=seed)
        found |= {f"{name}_knn": again["knn"], f"{name}_linear": again["linear"]}
    return found
