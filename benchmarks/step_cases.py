"""What benchmarks/train_step.py measures: networks, sizes, and the methods whose steps are compared."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from cim_core.cim import build_cim
from cim_core.config import (
    EnhancerConfig,
    GeneratorConfig,
    Method,
    ModelConfig,
    ObjectiveConfig,
    TokenizerSource,
)
from cim_core.data.dataset import Views
from cim_core.methods import build_model
from cim_core.seeding import generator_for
from cim_core.tokenizers.dalle import DalleConfig, DalleTokenizer
from cim_core.tokenizers.network import initialise


@dataclass(frozen=True, kw_only=True)
class Case:
    """One enhancer with its generator and a tokenizer of DALL-E's layout, sizes in pixels."""

    enhancer: EnhancerConfig
    generator: GeneratorConfig
    batch_size: int
    image_size: int = 224
    patch_size: int = 16
    tokenizer: DalleConfig = field(default_factory=DalleConfig)

    def model(self, objective: Literal["respix", "revdet"]) -> ModelConfig:
        """The configuration of the model."""
        return ModelConfig(
            tokenizer=TokenizerSource(source="random"),
            enhancer=self.enhancer,
            objective=ObjectiveConfig(name=objective),
            generator=self.generator,
            image_size=self.image_size,
            patch_size=self.patch_size,
        )


_SMALL = {"image_size": 64, "patch_size": 8, "tokenizer": DalleConfig(width=64)}
CPU_CASES: Mapping[str, Case] = MappingProxyType(
    {
        "ViT 192x6, 64 px": Case(
            enhancer=EnhancerConfig(name="vit_tiny_patch16_224", options={"depth": 6}),
            generator=GeneratorConfig(depth=4),
            batch_size=16,
            **_SMALL,  # type: ignore[arg-type]
        ),
        "ResNet-18, 64 px": Case(
            enhancer=EnhancerConfig(name="resnet18"),
            generator=GeneratorConfig(depth=4, width=192, heads=3),
            batch_size=16,
            **_SMALL,  # type: ignore[arg-type]
        ),
    }
)
GPU_CASES: Mapping[str, Case] = MappingProxyType(
    {
        "ViT-B/16, 224 px": Case(
            enhancer=EnhancerConfig(name="vit_base_patch16_224"),
            generator=GeneratorConfig(depth=4),
            batch_size=256,
        ),
        "ViT-S/16, 224 px": Case(
            enhancer=EnhancerConfig(name="vit_small_patch16_224"),
            generator=GeneratorConfig(depth=4),
            batch_size=256,
        ),
        "ResNet-50, 224 px": Case(
            enhancer=EnhancerConfig(name="resnet50"), generator=GeneratorConfig(depth=4), batch_size=256
        ),
    }
)

# Models of other methods that get the same batch and the same `train_step`; each is timed beside CIM.
PEERS: Mapping[str, Method] = MappingProxyType({"BEiT": "beit", "SimMIM": "simmim", "MAE": "mae"})


def peer_of(case: Case, method: Method) -> nn.Module:
    """The same encoder under another method; only plain ViTs have peers."""
    config = ModelConfig(
        method=method,
        tokenizer=TokenizerSource(source="random") if method == "beit" else None,
        enhancer=replace(case.enhancer, shared_blocks=None),
        image_size=case.image_size,
        patch_size=case.patch_size,
    )
    return build_model(config, random_tokenizer(case.tokenizer) if method == "beit" else None)


def peers(case: Case) -> Mapping[str, Method]:
    """The methods that CIM is measured by in this case."""
    return PEERS if case.enhancer.name.startswith("vit_") else {}


def cim_of(case: Case, objective: Literal["respix", "revdet"]) -> nn.Module:
    """The CIM model of a case."""
    return build_cim(case.model(objective), random_tokenizer(case.tokenizer))


def random_tokenizer(config: DalleConfig) -> DalleTokenizer:
    """A tokenizer without training: it costs what a trained one does."""
    generator = generator_for(0, "bench", "tokenizer")
    tokenizer = DalleTokenizer(config, origin={})
    initialise(tokenizer, generator=generator)
    with torch.no_grad():
        tokenizer.table.weight.copy_(torch.randn(tokenizer.table.weight.shape, generator=generator))
        tokenizer.table.bias.zero_()
    return tokenizer


def pictures(case: Case) -> Views:
    """Smooth random pictures at both sizes."""
    coarse = torch.rand(case.batch_size, 3, 6, 6, generator=generator_for(0, "bench", "pictures"))
    token_side = case.image_size // case.patch_size * DalleTokenizer.stride
    pixels, token_pixels = (
        (F.interpolate(coarse, size=(side, side), mode="bilinear") * 255).to(torch.uint8)
        for side in (case.image_size, token_side)
    )
    ids_B2 = torch.zeros(case.batch_size, 2, dtype=torch.int64)
    return Views(pixels_B3HW=pixels, token_pixels_B3HW=token_pixels, ids_B2=ids_B2)
