"""The network that is being pre-trained: any timm ViT or CNN, seen as images to a feature map.

Shape letters in this file:
    B  images      D  feature channels      h  feature positions a side
    H, W  image height and width, pixels
"""

from contextlib import nullcontext

import timm
from timm.layers import DropPath
from torch import Tensor, nn

from cim_core.config import EnhancerConfig, GeneratorConfig
from cim_core.errors import ModelError
from cim_core.models.checkpointing import Recomputation
from cim_core.models.generator import SharedLayers
from cim_core.models.init import init_plain_vit
from cim_core.models.probe import BackbonePlan, plan_backbone, raw_features, to_map

DEFAULT_SHARED_BLOCKS = 2  # of a plain ViT; docs/method.md says how sure that is


class Enhancer(nn.Module):
    """A timm model without classifier, built so that every parameter is trained.

    Plain ViTs start as docs/method.md says; all other networks keep their authors' initialisation.
    """

    def __init__(self, config: EnhancerConfig, *, image_size: int, patch_size: int) -> None:
        """Raises ModelError, with the reason, where timm has no such model or it cannot serve."""
        super().__init__()
        self.plan: BackbonePlan = plan_backbone(
            config.name, image_size=image_size, patch_size=patch_size, options=config.options
        )
        self.image_size = image_size
        self.backbone: nn.Module = timm.create_model(self.plan.name, **self.plan.train_args)
        if not any("drop" in key for key in config.options):
            _switch_off_dropout(self.backbone)
        if self.plan.can_share:
            init_plain_vit(self.backbone)
        self._recomputation = _recomputation(self.backbone, self.plan) if config.grad_checkpointing else None

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Features [B, D, h, h] of ImageNet-normalised images of `image_size` pixels a side."""
        plan = self.plan
        with self._recomputation.first_pass() if self._recomputation else nullcontext():
            features = raw_features(self.backbone, images_B3HW, through_head=plan.through_head)
        return to_map(features, layout=plan.layout, num_prefix=plan.num_prefix, side=plan.side)

    @property
    def width(self) -> int:
        """Channels of the feature map."""
        return self.plan.width

    @property
    def side(self) -> int:
        """Positions a side of the feature map."""
        return self.plan.side

    @property
    def is_vit(self) -> bool:
        """Whether the network is a stack of layers over one grid of patches."""
        return self.plan.is_vit

    @property
    def can_share(self) -> bool:
        """Whether a generator can use the first layers: plain timm VisionTransformers only."""
        return self.plan.can_share

    def default_shared_blocks(self, generator: GeneratorConfig) -> int:
        """How many blocks are shared where the configuration leaves it open."""
        if not self.can_share or generator.positions == "relative":
            return 0
        return min(DEFAULT_SHARED_BLOCKS, generator.depth, self.plan.depth or 0)

    def shared_layers(self, num_blocks: int) -> SharedLayers | None:
        """Patch embedding and first blocks, for the generator; None where `num_blocks` is 0."""
        if num_blocks == 0:
            return None
        plan = self.plan
        if not plan.can_share:
            raise ModelError(
                f"enhancer.shared_blocks: {plan.name} cannot share {num_blocks} blocks with the generator: "
                f"only plain timm VisionTransformers can, and it is a {_what_it_is(self.backbone)}; set 0"
            )
        assert plan.depth is not None
        assert plan.heads is not None
        if num_blocks > plan.depth:
            raise ModelError(
                f"enhancer.shared_blocks: must not exceed the {plan.depth} blocks of {plan.name}, "
                f"got {num_blocks}"
            )
        blocks = list(self.backbone.blocks)[:num_blocks]  # type: ignore[arg-type]
        embed: nn.Module = self.backbone.patch_embed  # type: ignore[assignment]
        return SharedLayers(patch_embed=embed, blocks=blocks, width=plan.width, heads=plan.heads)


def _switch_off_dropout(backbone: nn.Module) -> None:
    """A few networks of timm drop paths by default; the method has neither dropout nor stochastic depth."""
    for part in backbone.modules():
        if isinstance(part, DropPath):
            part.drop_prob = 0.0
        elif isinstance(part, nn.Dropout):
            part.p = 0.0


def _recomputation(backbone: nn.Module, plan: BackbonePlan) -> Recomputation:
    if not plan.can_checkpoint:
        raise ModelError(
            f"enhancer.grad_checkpointing: timm {timm.__version__} has none for {plan.name}; set false, and "
            "where memory is short lower training.batch_size or raise training.accumulation"
        )
    return Recomputation(backbone)


def _what_it_is(backbone: nn.Module) -> str:
    kind = type(backbone).__name__
    return f"{kind} whose blocks or embedding differ" if kind == "VisionTransformer" else kind
