"""The small BEiT that proposes a token for each masked position.

Shape letters in this file:
    B  images      N  token positions      M  masked positions of all images together
    D  width       V  vocabulary           H, W  image height and width, pixels
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from timm.layers import PatchEmbed
from timm.models import beit, vision_transformer
from torch import Tensor, nn

from cim_core.config import GeneratorConfig
from cim_core.errors import ConfigError
from cim_core.masking import masked_positions
from cim_core.models.init import init_blocks, init_linear, trunc_normal

CNN_WIDTH = 384  # of a generator whose enhancer is no ViT; METHOD: two re-implementations use it
HEAD_WIDTH = 64

# BEiT's blocks take a bias of the attention, and have none on their keys.
BLOCKS: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {"absolute": vision_transformer.Block, "relative": beit.Block}
)


@dataclass(frozen=True, kw_only=True)
class SharedLayers:
    """The first layers of a ViT enhancer, which the generator uses and the enhancer owns."""

    patch_embed: nn.Module
    blocks: Sequence[nn.Module]
    width: int
    heads: int


class SmallBEiT(nn.Module):
    """Patch embedding, mask token, positions, blocks, norm, one linear layer to the vocabulary.

    Absolute positions are learned vectors, added once. Relative ones are BEiT's: a learned bias of the
    attention for each distance, one table of (2g - 1)^2 + 3 rows for all blocks (g positions a side; the
    last three rows are class to patch, patch to class, class to class), and no absolute ones.

    Shared layers are used here but not registered here: they appear once, under the enhancer, in
    `parameters()` and in the state_dict, and they are initialised, moved and decayed there.
    """

    def __init__(
        self,
        config: GeneratorConfig,
        *,
        image_size: int,
        patch_size: int,
        vocab_size: int,
        enhancer_width: int | None = None,
        shared: SharedLayers | None = None,
    ) -> None:
        """`enhancer_width` is that of a ViT enhancer, None for a CNN; it is the default width."""
        super().__init__()
        width = config.width or enhancer_width or CNN_WIDTH
        heads = config.heads or (shared.heads if shared else max(1, width // HEAD_WIDTH))
        _check_sizes(config, width=width, heads=heads, shared=shared)
        grid = image_size // patch_size
        self.num_positions = grid**2
        own_embed = None if shared else PatchEmbed(image_size, patch_size, embed_dim=width)
        shared_blocks = tuple(shared.blocks) if shared else ()
        num_own = config.depth - len(shared_blocks)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = own_embed
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        relative = config.positions == "relative"
        self.pos_embed = None if relative else nn.Parameter(torch.empty(1, 1 + self.num_positions, width))
        self.rel_pos_bias = beit.RelativePositionBias((grid, grid), heads) if relative else None
        block = partial(BLOCKS[config.positions], width, heads, qkv_bias=True, norm_layer=norm)
        self.blocks = nn.ModuleList(block(init_values=config.layer_scale or None) for _ in range(num_own))
        self.norm = norm(width)
        self.lm_head = nn.Linear(width, vocab_size)
        # A tuple, because nn.Module registers modules that are attributes but not those in tuples.
        self._shared = (shared.patch_embed if shared else None, shared_blocks)
        self._init_own_weights()

    def forward(self, images_B3HW: Tensor, mask_BN: Tensor, positions_M: Tensor | None = None) -> Tensor:
        """Logits [M, V] at the masked positions, in the order of `mask_BN.nonzero()`.

        `images_B3HW` are ImageNet-normalised; `mask_BN` is boolean, True where masked. `positions_M`
        are its `masked_positions`; where they are not given, the mask is asked, which waits for a GPU.
        """
        if positions_M is None:
            positions_M = masked_positions(mask_BN)
        shared_embed, shared_blocks = self._shared
        embed = self.patch_embed if shared_embed is None else shared_embed
        assert embed is not None
        tokens_BND = self.apply_mask(embed(images_B3HW), mask_BN)
        cls_B1D = self.cls_token.expand(len(tokens_BND), -1, -1)
        x = torch.cat([cls_B1D.to(tokens_BND.dtype), tokens_BND], dim=1)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        bias = {} if self.rel_pos_bias is None else {"shared_rel_pos_bias": self.rel_pos_bias()}
        for block in (*shared_blocks, *self.blocks):
            x = block(x, **bias)
        hidden_MD = self.norm(x)[:, 1:].flatten(0, 1).index_select(0, positions_M)
        logits_MV: Tensor = self.lm_head(hidden_MD)
        return logits_MV

    def apply_mask(self, tokens_BND: Tensor, mask_BN: Tensor) -> Tensor:
        """Put the mask token in place of every masked patch embedding, so that none can be read."""
        return torch.where(mask_BN[..., None], self.mask_token.to(tokens_BND.dtype), tokens_BND)

    def shared_parameters(self) -> list[nn.Parameter]:
        """The weights that are used here and belong to the enhancer; empty where nothing is shared."""
        shared_embed, shared_blocks = self._shared
        layers = [layer for layer in (shared_embed, *shared_blocks) if layer is not None]
        return [parameter for layer in layers for parameter in layer.parameters()]

    def _init_own_weights(self) -> None:
        for parameter in (self.mask_token, self.cls_token, self.pos_embed):
            if parameter is not None:
                trunc_normal(parameter)
        if self.rel_pos_bias is not None:
            nn.init.zeros_(self.rel_pos_bias.relative_position_bias_table)
        if self.patch_embed is not None:
            init_linear(self.patch_embed.proj)
        init_blocks(self.blocks, first=1 + len(self._shared[1]))
        init_linear(self.lm_head)


def _check_sizes(config: GeneratorConfig, *, width: int, heads: int, shared: SharedLayers | None) -> None:
    problems = []
    if width % heads:
        problems.append(("generator.heads", f"must divide the width {width}, got {heads}"))
    if shared is not None:
        if config.positions == "relative":
            told = (
                "must be absolute where blocks are shared: the enhancer's know no relative bias, got relative"
            )
            problems.append(("generator.positions", told))
        lesson = "must equal the enhancer's {0}, whose blocks are shared, got {1}; drop it or share no blocks"
        if width != shared.width:
            problems.append(("generator.width", lesson.format(shared.width, width)))
        if heads != shared.heads:
            problems.append(("generator.heads", lesson.format(shared.heads, heads)))
        if len(shared.blocks) > config.depth:
            rule = f"must be at least the {len(shared.blocks)} blocks shared with the enhancer"
            problems.append(("generator.depth", f"{rule}, got {config.depth}"))
    if problems:
        raise ConfigError(problems)
