"""Tiny CIM models and batches for the tests of this folder."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cim_core.cim import CIM, build_cim
from cim_core.config import (
    EnhancerConfig,
    GeneratorConfig,
    MaskingConfig,
    ModelConfig,
    ObjectiveConfig,
    Scalar,
    TokenizerSource,
)
from cim_core.data.dataset import Views
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


def views_for(cim: CIM, *, num_images: int = 3, seed: int = 0) -> Views:
    """Smooth random pictures: the token view is the same picture at the tokenizer's size."""
    coarse = torch.rand(num_images, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    side = cim.config.image_size
    token_side = cim.grid * cim.tokenizer.stride
    return Views(
        pixels_B3HW=_resize(coarse, side),
        token_pixels_B3HW=_resize(coarse, token_side),
        ids_B2=torch.zeros(num_images, 2, dtype=torch.int64),
    )


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _resize(images: Tensor, side: int) -> Tensor:
    resized = torch.nn.functional.interpolate(images, size=(side, side), mode="bilinear")
    return (resized * 255).round().to(torch.uint8)
