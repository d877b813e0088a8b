"""What every method of pre-training has: an encoder to take away, and what surrounds it in each step.

CIM is in `cim_core.cim`, its peers are in `cim_core.peers`; `cim_core.methods` builds either by its name.

Shape letters in this file:
    B  images on this rank            H, W  image height and width, pixels (image_size)
    g  positions a side               N  positions of an image, g * g
    T  side of the tokenizer's images, pixels: g * stride

Images are uint8 as data and float in [0, 1] inside; networks see ImageNet-normalised ones.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cim_core.config import ModelConfig
from cim_core.data.dataset import Views
from cim_core.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from cim_core.ema import RunningAverage
from cim_core.errors import ModelError
from cim_core.models.enhancer import Enhancer
from cim_core.seeding import seed_for
from cim_core.tokenizers.base import Tokenizer
from cim_core.tokenizers.portions import in_portions

FAKE_SOURCE = "fake"  # the only way to get the stand-in of tests
_GREY = 0.5  # of a masked position in a picture


class Output(Protocol):
    """What a forward pass of every method returns; further fields are the method's."""

    @property
    def loss(self) -> Tensor:
        """Scalar with gradient."""

    @property
    def losses(self) -> dict[str, Tensor]:
        """Unweighted terms by name."""

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Scalars on the device, without gradient."""


class Pretraining(nn.Module, ABC):
    """The encoder, its running average where one is wanted, and the frozen tokenizer where there is one.

    The tokenizer is no part of `parameters()` or `state_dict()` (it has an artifact of its own), but it
    moves with `.to(...)`. It stays frozen and in eval mode whatever `train()` says.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config = config.resolved
        self.grid = config.grid
        _freeze(tokenizer)
        self._frozen = (tokenizer,)  # in a tuple, where nn.Module does not register it
        self.enhancer = Enhancer(config.enhancer, image_size=config.image_size, patch_size=config.patch_size)
        decay = config.enhancer.ema_decay
        self.average = None if decay is None else RunningAverage(self.enhancer.backbone, decay=decay)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    @abstractmethod
    def forward(self, views: Views, *, generator: torch.Generator) -> Output:
        """One step on one batch; every random choice is `generator`'s (a CPU generator serves any device)."""

    @abstractmethod
    def columns(self, output: Any) -> Mapping[str, Tensor]:
        """What a step did, as pictures [B, 3, H, W] in [0, 1] under their titles."""

    @torch.no_grad()
    def tokenize(self, token_pixels_B3TT: Tensor) -> Tensor:
        """Golden tokens [B, N] of uint8 images of g * stride pixels a side."""
        side = self.grid * self.tokenizer.stride
        if token_pixels_B3TT.shape[-2:] != (side, side):
            got = " x ".join(str(n) for n in token_pixels_B3TT.shape[-2:])
            raise ModelError(
                f"the tokenizer's view must be {side} x {side} pixels, got {got}: a grid of {self.grid} x "
                f"{self.grid} tokens (image_size / patch_size) of {self.tokenizer.stride} pixels each"
            )
        return in_portions(self.tokenizer.encode, to_unit(token_pixels_B3TT), side=side).flatten(1)

    def normalise(self, images_B3HW: Tensor) -> Tensor:
        """Images in [0, 1] as networks want them: ImageNet mean 0, deviation 1."""
        return (images_B3HW - self.mean) / self.std

    @property
    def encoder(self) -> nn.Module:
        """The timm network to take away: the running average of its weights where there is one."""
        encoder: nn.Module = self.enhancer.backbone if self.average is None else self.average.module
        return encoder

    @property
    def frozen(self) -> Tokenizer | None:
        """The frozen tokenizer; None for a method without one."""
        return self._frozen[0]

    @property
    def tokenizer(self) -> Tokenizer:
        """The frozen tokenizer of a method that has one."""
        assert self.frozen is not None, f"{self.config.method} has no tokenizer"
        return self.frozen

    @property
    def token_size(self) -> int | None:
        """Side of the tokenizer's view, pixels; None for a method without one."""
        return None if self.frozen is None else self.grid * self.frozen.stride

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        # Behind .to(), .cuda() and the like: the unregistered tokenizer has to come along.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        frozen: object = self.frozen
        if isinstance(frozen, nn.Module):
            frozen._apply(fn)  # type: ignore[no-untyped-call]
        return self


ModelT = TypeVar("ModelT", bound=Pretraining)


def build(
    kind: Callable[..., ModelT], config: ModelConfig, tokenizer: Tokenizer | None, *, seed: int
) -> ModelT:
    """A model of `kind` whose initial weights are a function of `seed`; torch's own generator is left alone.

    With one seed the encoders of all methods start with the same weights. Raises ModelError or
    ConfigError where the configuration names what cannot be built.
    """
    _check_tokenizer(config, tokenizer)
    given = () if config.tokenizer is None else (tokenizer,)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "init", "cim"))
        return kind(config, *given)


def to_unit(pixels: Tensor) -> Tensor:
    """Bytes as floats in [0, 1]. Anything but bytes is refused: its range could only be guessed."""
    if pixels.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, 0 to 255, got {pixels.dtype}")
    return pixels.float() / 255


def greyed(images_B3HW: Tensor, mask_BN: Tensor, grid: int) -> Tensor:
    """The images with masked positions in grey, for the eye."""
    mask_B1HW = on_pixels(mask_BN, grid, images_B3HW.shape[-1])
    return images_B3HW * (1 - mask_B1HW) + _GREY * mask_B1HW


def on_pixels(mask_BN: Tensor, grid: int, side: int) -> Tensor:
    """A mask of positions as one of pixels: floats [B, 1, H, W], 1 where masked."""
    return F.interpolate(mask_BN.float().view(-1, 1, grid, grid), size=(side, side), mode="nearest")


def _check_tokenizer(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Raise ModelError unless the tokenizer is what the configuration names."""
    if config.tokenizer is None:
        if tokenizer is not None:
            raise ModelError(f"tokenizer: belongs to cim and beit, not to {config.method}: leave it out")
        return
    if not callable(getattr(tokenizer, "encode", None)) or not callable(getattr(tokenizer, "decode", None)):
        raise ModelError(
            f"tokenizer: must be able to encode and decode, got {type(tokenizer).__name__}; train one "
            f"(kind: tokenizer) or name the stand-in of tests explicitly, source: {FAKE_SOURCE}"
        )
    assert tokenizer is not None
    if tokenizer.is_fake and config.tokenizer.source != FAKE_SOURCE:
        raise ModelError(
            f"tokenizer.source: {config.tokenizer.source!r} gave the untrained stand-in of tests, which "
            f"would make the training worthless; write source: {FAKE_SOURCE} where that is meant"
        )


def _freeze(tokenizer: object) -> None:
    if isinstance(tokenizer, nn.Module):
        tokenizer.eval().requires_grad_(requires_grad=False)
