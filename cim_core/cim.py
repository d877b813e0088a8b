"""Corrupted Image Modeling (arXiv 2202.03382): one training step, to be read from top to bottom.

Shape letters in this file:
    B  images on this rank            H, W  image height and width, pixels (image_size)
    g  token positions a side         N  token positions of an image, g * g
    M  masked positions of all B images together
    V  vocabulary of the tokenizer    D  enhancer width      h  its feature positions a side
    T  side of the tokenizer's images, pixels: g * stride

Images are uint8 as data and float in [0, 1] inside; only the two networks see ImageNet-normalised
ones. A frozen tokenizer and a small trainable BEiT make a corrupted image of each original; the
enhancer, the network that is wanted, learns to undo or to find the corruption.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cim_core.config import ModelConfig
from cim_core.data.dataset import Views
from cim_core.ema import RunningAverage
from cim_core.errors import ModelError
from cim_core.masking import make_mask
from cim_core.models.enhancer import Enhancer
from cim_core.models.generator import SmallBEiT
from cim_core.objectives.base import ObjectiveOutput, Truth
from cim_core.registry import DEFAULT_WEIGHTS, build_objective
from cim_core.seeding import seed_for
from cim_core.tokenizers.base import Tokenizer

FAKE_SOURCE = "fake"  # the only way to get the stand-in of tests
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """The loss and every intermediate that it came from; metrics stay on the device."""

    loss: Tensor
    losses: dict[str, Tensor]  # unweighted terms by name
    metrics: dict[str, Tensor]
    golden_BN: Tensor  # the tokenizer's tokens of the original
    mask_BN: Tensor
    sampled_BN: Tensor  # golden tokens, overwritten by samples where masked
    replaced_BN: Tensor  # masked and sampled != golden
    logits_MV: Tensor
    clean_B3HW: Tensor  # [0, 1]
    corrupted_B3HW: Tensor  # [0, 1]
    prediction: Tensor  # respix: normalised pixels [B, 3, H, W]; revdet: logits [B, N]


class CIM(nn.Module):
    """Generator, enhancer and objective around a frozen tokenizer.

    The tokenizer is no part of `parameters()` or `state_dict()` (it has an artifact of its own), but it
    moves with `.to(...)`. It stays frozen and in eval mode whatever `train()` says.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = config
        self.grid = config.grid
        self._frozen = (_freeze(tokenizer),)  # in a tuple, where nn.Module does not register it
        sizes = {"image_size": config.image_size, "patch_size": config.patch_size}
        self.enhancer = Enhancer(config.enhancer, **sizes)
        decay = config.enhancer.ema_decay
        self.average = None if decay is None else RunningAverage(self.enhancer.backbone, decay=decay)
        num_shared = config.enhancer.shared_blocks
        if num_shared is None:
            num_shared = self.enhancer.default_shared_blocks(config.generator)
        self.generator = SmallBEiT(
            config.generator,
            **sizes,
            vocab_size=tokenizer.vocab_size,
            enhancer_width=self.enhancer.width if self.enhancer.is_vit else None,
            shared=self.enhancer.shared_layers(num_shared),
        )
        self.objective = build_objective(
            config.objective,
            width=self.enhancer.width,
            feature_side=self.enhancer.side,
            image_size=config.image_size,
            grid=config.grid,
        )
        self.weight = config.objective.weight or DEFAULT_WEIGHTS[config.objective.name]
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, views: Views, *, generator: torch.Generator) -> StepOutput:
        """One step on one batch; every random choice is `generator`'s (a CPU generator serves any device)."""
        # 1. Two views of one crop: the original, and the tokenizer's.
        clean_B3HW = to_unit(views.pixels_B3HW)
        # 2. Golden tokens.
        golden_BN = self.tokenize(views.token_pixels_B3HW)
        # 3. A mask of its own for every image.
        mask_BN = make_mask(len(golden_BN), self.grid, self.config.masking, generator).to(golden_BN.device)
        # 4. The small BEiT proposes tokens for masked positions, of which it sees nothing.
        logits_MV = self.generator(self.normalise(clean_B3HW), mask_BN).float()
        mim_loss = F.cross_entropy(logits_MV, golden_BN[mask_BN])
        # 5. Its samples replace the golden tokens there.
        sampled_M = sample_tokens(logits_MV, self.config.generator.temperature, generator)
        sampled_BN = golden_BN.masked_scatter(mask_BN, sampled_M)
        replaced_BN = mask_BN & (sampled_BN != golden_BN)
        # 6. The frozen decoder paints the corrupted image.
        corrupted_B3HW = self.corrupt(sampled_BN)
        # 7. The enhancer sees only that.
        features_BDhh = self.enhancer(self.normalise(corrupted_B3HW))
        truth = Truth(clean_B3HW=clean_B3HW, mask_BN=mask_BN, replaced_BN=replaced_BN)
        judged: ObjectiveOutput = self.objective(features_BDhh, truth)
        # 8. One loss for both networks; no gradient crosses the corrupted image.
        return StepOutput(
            loss=mim_loss + self.weight * judged.loss,
            losses={"mim": mim_loss, self.config.objective.name: judged.loss},
            metrics={
                "mim_loss": mim_loss.detach(),
                "enhancer_loss": judged.loss.detach(),
                **generator_metrics(logits_MV.detach(), golden_BN[mask_BN], sampled_M),
                "mask_share": mask_BN.float().mean(),
                "replaced_share": replaced_BN.float().mean(),
                **judged.metrics,
            },
            golden_BN=golden_BN,
            mask_BN=mask_BN,
            sampled_BN=sampled_BN,
            replaced_BN=replaced_BN,
            logits_MV=logits_MV,
            clean_B3HW=clean_B3HW,
            corrupted_B3HW=corrupted_B3HW,
            prediction=judged.prediction,
        )

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
        return self.tokenizer.encode(to_unit(token_pixels_B3TT)).flatten(1)

    @torch.no_grad()
    def corrupt(self, tokens_BN: Tensor) -> Tensor:
        """The decoder's image of the tokens, brought to image_size: [B, 3, H, W] in [0, 1]."""
        decoded_B3TT = self.tokenizer.decode(tokens_BN.view(-1, self.grid, self.grid)).float()
        side = self.config.image_size
        if decoded_B3TT.shape[-1] != side:
            shrinks = decoded_B3TT.shape[-1] > side
            mode = self.config.interpolation
            decoded_B3TT = F.interpolate(decoded_B3TT, size=(side, side), mode=mode, antialias=shrinks)
        # Bicubic overshoots at edges.
        return decoded_B3TT.clamp(0, 1)

    def normalise(self, images_B3HW: Tensor) -> Tensor:
        """Images in [0, 1] as both networks want them: ImageNet mean 0, deviation 1."""
        return (images_B3HW - self.mean) / self.std

    @property
    def encoder(self) -> nn.Module:
        """The timm network to take away: the running average of the enhancer's weights where there is one."""
        encoder: nn.Module = self.enhancer.backbone if self.average is None else self.average.module
        return encoder

    @property
    def tokenizer(self) -> Tokenizer:
        """The frozen tokenizer."""
        return self._frozen[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        # Behind .to(), .cuda() and the like: the unregistered tokenizer has to come along.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if isinstance(self.tokenizer, nn.Module):
            self.tokenizer._apply(fn)  # type: ignore[no-untyped-call]
        return self


def build_cim(config: ModelConfig, tokenizer: Tokenizer, *, seed: int = 0) -> CIM:
    """A CIM model whose initial weights are a function of `seed`; torch's own generator is left alone.

    Raises ModelError or ConfigError where the configuration names what cannot be built.
    """
    if not callable(getattr(tokenizer, "encode", None)) or not callable(getattr(tokenizer, "decode", None)):
        raise ModelError(
            f"tokenizer: must be able to encode and decode, got {type(tokenizer).__name__}; train one "
            f"(kind: tokenizer) or name the stand-in of tests explicitly, source: {FAKE_SOURCE}"
        )
    if tokenizer.is_fake and config.tokenizer.source != FAKE_SOURCE:
        raise ModelError(
            f"tokenizer.source: {config.tokenizer.source!r} gave the untrained stand-in of tests, which "
            f"would make the training worthless; write source: {FAKE_SOURCE} where that is meant"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "init", "cim"))
        return CIM(config, tokenizer)


def to_unit(pixels: Tensor) -> Tensor:
    """Bytes as floats in [0, 1]. Anything but bytes is refused: its range could only be guessed."""
    if pixels.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, 0 to 255, got {pixels.dtype}")
    return pixels.float() / 255


@torch.no_grad()
def sample_tokens(logits_MV: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Draw one token a row from softmax(logits / temperature): [M], int64, in float32, no gradient."""
    probabilities_MV = (logits_MV.float() / temperature).softmax(dim=-1)
    return torch.multinomial(probabilities_MV, 1, generator=on_device(generator, logits_MV.device)).squeeze(1)


def on_device(generator: torch.Generator, device: torch.device) -> torch.Generator:
    """`generator`, or one on `device` that is seeded from it: torch wants both on one device."""
    if generator.device.type == device.type:
        return generator
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(device).manual_seed(seed)


@torch.no_grad()
def generator_metrics(logits_MV: Tensor, golden_M: Tensor, sampled_M: Tensor) -> dict[str, Tensor]:
    """How good and how sure the generator is at masked positions; entropy in nats."""
    log_probabilities_MV = logits_MV.log_softmax(dim=-1)
    return {
        "mim_accuracy": (logits_MV.argmax(dim=-1) == golden_M).float().mean(),
        "sample_accuracy": (sampled_M == golden_M).float().mean(),
        "entropy": -(log_probabilities_MV.exp() * log_probabilities_MV).sum(dim=-1).mean(),
    }


def _freeze(tokenizer: Tokenizer) -> Tokenizer:
    if isinstance(tokenizer, nn.Module):
        tokenizer.eval().requires_grad_(requires_grad=False)
    return tokenizer
