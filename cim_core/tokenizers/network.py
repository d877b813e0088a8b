"""Encoder and decoder of the DALL-E discrete VAE, at any width and stride (Ramesh et al., 2021).

The module tree has the official one's names (`blocks.group_1.block_1.res_path.conv_1`), so that the
official weights fit into it: stride 8, width 256, 2 blocks a group, 8192 outputs, 6 colours. The
decoder's first layer is not here: it looks up an id, which is the quantiser's business.

Shape letters in this file:
    B  images on this rank      C  channels          H, W  image sides, pixels
    D  channels of a code       h, w  tokens a side  (H, W divided by the stride)
"""

from collections import OrderedDict
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

# The picture is kept this far from 0 and 1, where a sigmoid would need infinite inputs.
MAP_EPSILON = 0.1


def map_pixels(images: Tensor) -> Tensor:
    """Images in [0, 1] to the network's range [0.1, 0.9]."""
    return images * (1 - 2 * MAP_EPSILON) + MAP_EPSILON


def unmap_pixels(mapped: Tensor) -> Tensor:
    """The inverse of `map_pixels`; not clamped: a sigmoid's output may leave [0, 1]."""
    return (mapped - MAP_EPSILON) / (1 - 2 * MAP_EPSILON)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The shape of encoder and decoder; group i of the encoder is 2^i times `width` wide."""

    width: int
    stride: int
    blocks_per_group: int

    @property
    def num_groups(self) -> int:
        """One group more than halvings of the side."""
        return self.stride.bit_length()

    @property
    def post_gain(self) -> float:
        """Scale of each residual branch, 1 / n^2 for n blocks in a row; it stands in for a norm."""
        return 1 / (self.num_groups * self.blocks_per_group) ** 2

    @property
    def widths(self) -> list[int]:
        """Width of each group from the picture inwards."""
        return [self.width * 2**i for i in range(self.num_groups)]


class EncoderBlock(nn.Module):
    """Residual block: three 3x3 convolutions and a 1x1 through a quarter of the width."""

    def __init__(self, width_in: int, width_out: int, *, post_gain: float) -> None:
        super().__init__()
        self.post_gain = post_gain
        self.id_path = _skip(width_in, width_out)
        self.res_path = _residual_path(width_in, width_out, kernels=(3, 3, 3, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, width_in, H, W] to [B, width_out, H, W]."""
        skip: Tensor = self.id_path(x_BCHW)
        residual: Tensor = self.res_path(x_BCHW)
        return skip + self.post_gain * residual


class DecoderBlock(nn.Module):
    """Residual block: a 1x1 and three 3x3 convolutions through a quarter of the width."""

    def __init__(self, width_in: int, width_out: int, *, post_gain: float) -> None:
        super().__init__()
        self.post_gain = post_gain
        self.id_path = _skip(width_in, width_out)
        self.res_path = _residual_path(width_in, width_out, kernels=(1, 3, 3, 3))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, width_in, H, W] to [B, width_out, H, W]."""
        skip: Tensor = self.id_path(x_BCHW)
        residual: Tensor = self.res_path(x_BCHW)
        return skip + self.post_gain * residual


class Encoder(nn.Module):
    """7x7 convolution, groups of blocks with max-pooling between them, 1x1 convolution."""

    def __init__(self, layout: Layout, *, num_outputs: int) -> None:
        super().__init__()
        widths = layout.widths
        groups: list[tuple[str, nn.Module]] = [("input", empty_conv(3, layout.width, kernel=7))]
        width_in = layout.width
        for i, width in enumerate(widths):
            blocks = _blocks(EncoderBlock, width_in, width, layout=layout)
            if i < len(widths) - 1:
                blocks["pool"] = nn.MaxPool2d(2)
            groups.append((f"group_{i + 1}", nn.Sequential(blocks)))
            width_in = width
        groups.append(("output", _FullPrecision(_output(width_in, num_outputs))))
        self.blocks = nn.Sequential(OrderedDict(groups))

    def forward(self, mapped_B3HW: Tensor) -> Tensor:
        """Mapped pixels [B, 3, H, W] to [B, num_outputs, h, w]."""
        z_BChw: Tensor = self.blocks(_channels_last(mapped_B3HW))
        return z_BChw


class Decoder(nn.Module):
    """The encoder's mirror image with nearest upsampling; its input is the looked-up code."""

    def __init__(self, layout: Layout, *, code_dim: int, num_colours: int = 3) -> None:
        super().__init__()
        widths = layout.widths[::-1]
        groups: list[tuple[str, nn.Module]] = []
        width_in = code_dim
        for i, width in enumerate(widths):
            blocks = _blocks(DecoderBlock, width_in, width, layout=layout)
            if i < len(widths) - 1:
                blocks["upsample"] = nn.Upsample(scale_factor=2.0, mode="nearest")
            groups.append((f"group_{i + 1}", nn.Sequential(blocks)))
            width_in = width
        groups.append(("output", nn.Sequential(_output(width_in, num_colours))))
        self.blocks = nn.Sequential(OrderedDict(groups))

    def forward(self, code_BDhw: Tensor) -> Tensor:
        """Codes [B, D, h, w] to the logits of mapped pixels [B, num_colours, H, W]."""
        logits_BCHW: Tensor = self.blocks(_channels_last(code_BDhw))
        return logits_BCHW


def initialise(module: nn.Module, *, generator: torch.Generator) -> None:
    """Draw every convolution of `module` from N(0, 1 / fan_in) and set its biases to zero.

    The official code does the same. It is drawn on the CPU from `generator`, so equal seeds give
    equal weights on every rank and device.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            fan_in = layer.weight[0].numel()
            drawn = torch.randn(layer.weight.shape, generator=generator) / sqrt(fan_in)
            with torch.no_grad():
                layer.weight.copy_(drawn)
                if layer.bias is not None:
                    layer.bias.zero_()


def _channels_last(x_BCHW: Tensor) -> Tensor:
    # Convolutions pass this layout on; it is the fast one on tensor cores and for bf16 on CPUs.
    return x_BCHW.contiguous(memory_format=torch.channels_last)


def empty_conv(width_in: int, width_out: int, *, kernel: int) -> nn.Conv2d:
    """A convolution whose numbers are still to be drawn: PyTorch would move the global generator."""
    conv = nn.Conv2d(width_in, width_out, kernel, padding=kernel // 2, device="meta")
    return conv.to_empty(device=torch.get_default_device())


def _skip(width_in: int, width_out: int) -> nn.Module:
    return nn.Identity() if width_in == width_out else empty_conv(width_in, width_out, kernel=1)


def _residual_path(width_in: int, width_out: int, *, kernels: tuple[int, ...]) -> nn.Sequential:
    hidden = max(1, width_out // 4)
    sides = [width_in, *[hidden] * (len(kernels) - 1), width_out]
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, kernel in enumerate(kernels):
        layers[f"relu_{i + 1}"] = nn.ReLU()
        layers[f"conv_{i + 1}"] = empty_conv(sides[i], sides[i + 1], kernel=kernel)
    return nn.Sequential(layers)


def _blocks(
    block: type[EncoderBlock] | type[DecoderBlock], width_in: int, width: int, *, layout: Layout
) -> OrderedDict[str, nn.Module]:
    blocks: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(layout.blocks_per_group):
        blocks[f"block_{i + 1}"] = block(width_in if i == 0 else width, width, post_gain=layout.post_gain)
    return blocks


def _output(width: int, num_outputs: int) -> OrderedDict[str, nn.Module]:
    layers: list[tuple[str, nn.Module]] = [
        ("relu", nn.ReLU()),
        ("conv", empty_conv(width, num_outputs, kernel=1)),
    ]
    return OrderedDict(layers)


class _FullPrecision(nn.Sequential):
    """Layers that run in float32 also under autocast: ids hang on small differences."""

    def forward(self, x_BChw: Tensor) -> Tensor:
        y_BChw = x_BChw.float()
        with torch.autocast(x_BChw.device.type, enabled=False):
            for layer in self:
                y_BChw = layer(y_BChw)
        return y_BChw
