"""How weights start, in one place.

    weight of a linear layer or 1x1 convolution      truncated normal, std 0.02
    patch embedding                                  truncated normal, std 0.02
    biases                                           0
    norms                                            1, 0
    class token, mask token, absolute positions      truncated normal, std 0.02
    relative position bias                           0
    layer scale                                      generator.layer_scale
    attention output, 2nd MLP layer of block l       divided by sqrt(2 l), l counted from 1

Source: BEiT's pre-training code (arXiv 2106.08254), which cuts the normal at one standard
deviation; so do we. Blocks and patch embedding that the generator shares belong to the enhancer and
are initialised there, once.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

STD = 0.02


def init_linear(layer: nn.Linear | nn.Conv2d) -> None:
    """Fill a linear layer or convolution in place."""
    trunc_normal(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def trunc_normal(weight: Tensor) -> None:
    """Fill `weight` in place from a normal of std 0.02 that is cut at one std."""
    nn.init.trunc_normal_(weight, std=STD, a=-STD, b=STD)


def init_blocks(blocks: Iterable[nn.Module], *, first: int = 1) -> None:
    """Fill timm ViT blocks in place; `first` is the number of the first one, counted from 1."""
    for number, block in enumerate(blocks, start=first):
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                init_linear(layer)
        with torch.no_grad():
            block.attn.proj.weight.div_(math.sqrt(2 * number))  # type: ignore[union-attr, operator]
            block.mlp.fc2.weight.div_(math.sqrt(2 * number))  # type: ignore[union-attr, operator]


def init_plain_vit(backbone: nn.Module) -> None:
    """Fill a timm `VisionTransformer` of plain blocks in place, as the table above says."""
    for name in ("cls_token", "reg_token", "pos_embed"):
        if (parameter := getattr(backbone, name, None)) is not None:
            trunc_normal(parameter)
    init_linear(backbone.patch_embed.proj)  # type: ignore[arg-type, union-attr]
    init_blocks(backbone.blocks)  # type: ignore[arg-type]
