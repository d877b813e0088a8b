"""Tiny CIM models and batches for the tests of this folder."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cim_core.cim import CIM, build_cim
from cim_core.config import (
    DecoderConfig,
    EnhancerConfig,
    GeneratorConfig,
    MaskingConfig,
    Method,
    ModelConfig,
    ObjectiveConfig,
    Scalar,
    TokenizerSource,
)
from cim_core.data.dataset import Views
from cim_core.methods import build_model
from cim_core.pretraining import Pretraining
from cim_core.tokenizers.base import Tokenizer
from cim_core.tokenizers.fake import FakeTokenizer

TINY_VIT: Mapping[str, Scalar] = {"depth": 2, "embed_dim": 32, "num_heads": 2}


def model_config(
    *,
    name: str = "vit_tiny_patch16_224",
    objective: str = "respix",
    image_size: int = 32,
    patch_size: int = 8,
    shared_blocks: int | None = None,
    depth: int = 2,
    masking: MaskingConfig | None = None,
    options: Mapping[str, Scalar] | None = None,
) -> ModelConfig:
    if options is None:
        options = TINY_VIT if name.startswith("vit_tiny") else {}
    assert objective in ("respix", "revdet")
    return ModelConfig(
        tokenizer=TokenizerSource(source="fake"),
        enhancer=EnhancerConfig(name=name, shared_blocks=shared_blocks, options=options),
        objective=ObjectiveConfig(name="respix" if objective == "respix" else "revdet"),
        image_size=image_size,
        patch_size=patch_size,
        generator=GeneratorConfig(depth=depth, width=None if shared_blocks != 0 else 32, heads=None),
        masking=masking or MaskingConfig(),
    )


def tiny_cim(config: ModelConfig | None = None, *, tokenizer: Tokenizer | None = None, seed: int = 0) -> CIM:
    return build_cim(config or model_config(), tokenizer or FakeTokenizer(vocab_size=16, stride=4), seed=seed)


def peer_config(
    method: Method,
    *,
    name: str = "vit_tiny_patch16_224",
    image_size: int = 32,
    patch_size: int = 4,
    masking: MaskingConfig | None = None,
    options: Mapping[str, Scalar] = TINY_VIT,
    grad_checkpointing: bool = False,
) -> ModelConfig:
    """A peer with 8 x 8 positions; MAE's decoder has two blocks."""
    return ModelConfig(
        method=method,
        tokenizer=TokenizerSource(source="fake") if method == "beit" else None,
        enhancer=EnhancerConfig(name=name, options=options, grad_checkpointing=grad_checkpointing),
        image_size=image_size,
        patch_size=patch_size,
        decoder=DecoderConfig(depth=2, width=24, heads=2) if method == "mae" else None,
        masking=masking or MaskingConfig(),
    )


def tiny_peer(config: ModelConfig, *, seed: int = 0) -> Pretraining:
    tokenizer = FakeTokenizer(vocab_size=16, stride=4) if config.tokenizer is not None else None
    return build_model(config, tokenizer, seed=seed)


def views_for(cim: Pretraining, *, num_images: int = 3, seed: int = 0) -> Views:
    """Smooth random pictures: the token view is the same picture at the tokenizer's size."""
    coarse = torch.rand(num_images, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    side = cim.config.image_size
    token_pixels = torch.empty(num_images, 3, 0, 0, dtype=torch.uint8)
    return Views(
        pixels_B3HW=_resize(coarse, side),
        token_pixels_B3HW=token_pixels if cim.token_size is None else _resize(coarse, cim.token_size),
        ids_B2=torch.zeros(num_images, 2, dtype=torch.int64),
    )


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _resize(images: Tensor, side: int) -> Tensor:
    resized = torch.nn.functional.interpolate(images, size=(side, side), mode="bilinear")
    return (resized * 255).round().to(torch.uint8)
