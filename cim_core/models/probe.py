"""How a timm model has to be built so that it can be pre-trained: found by trying, without weights.

Models are built on torch's meta device, where shapes and gradients exist but no memory and no
arithmetic; a plan for the largest ViT takes seconds.

Shape letters in this file:
    B  images      D  feature channels      L  tokens, prefix tokens included
    h  feature positions a side             S  image side, pixels
"""

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from cim_core.errors import ONE_VALUE, ModelError
from cim_core.models.checkpointing import can_checkpoint

Layout = Literal["tokens", "channels_first", "channels_last"]
Args = Mapping[str, Any]

# Ways to leave out what sits behind the features and would never be trained (a norm after the pooling,
# an attention pool, a 1x1 convolution between pooling and classifier), the least invasive first. The
# second entry says whether the features are taken behind the classifier's own layers.
_RECIPES: tuple[tuple[Args, bool], ...] = (
    ({}, False),
    ({"fc_norm": False}, False),
    ({"global_pool": "avg", "fc_norm": False}, False),
    ({"global_pool": "token"}, False),
    ({"global_pool": ""}, True),
    ({"global_pool": "avg"}, False),
    ({"global_pool": ""}, False),
)

# Layers through which patch tokens pass without effect (CaiT, XCiT, VOLO). They would get gradients
# that are zero, which cannot be told from others without weights.
_CLASS_TOKEN_ONLY = ("blocks_token_only", "cls_attn_blocks", "post_network")


@dataclass(frozen=True, kw_only=True)
class BackbonePlan:
    """What to give timm, and what then comes out."""

    name: str
    train_args: Args  # for the network that is trained
    export_args: Args  # for a network with the same tensors and timm's own pooling
    through_head: bool  # features are taken behind `forward_head(..., pre_logits=True)`
    layout: Layout
    num_prefix: int  # class, register and distillation tokens in front
    width: int
    side: int  # feature positions a side
    is_vit: bool  # one token a patch from the first to the last layer
    can_share: bool  # a plain timm VisionTransformer
    can_checkpoint: bool  # timm has gradient checkpointing for it
    patch: int | None  # pixels; None where the model has no patches of its own
    heads: int | None
    depth: int | None


def plan_backbone(
    name: str, *, image_size: int, patch_size: int | None = None, options: Args | None = None
) -> BackbonePlan:
    """Find how to build `name` for square images of `image_size` pixels a side.

    `patch_size` reaches timm only where the model is a stack of layers over one patch grid; None
    keeps the model's own. Raises ModelError with the reason where the model cannot serve.
    """
    name = known_name(name)
    base = {"num_classes": 0, **(options or {})}
    for sizes in _size_candidates(name, base, image_size=image_size, patch_size=patch_size):
        try:
            plan = _first_that_works(name, {**base, **sizes}, image_size=image_size)
        except _UnknownArgumentError as error:
            refused = str(error)
        # What timm's 1,300 builders raise for sizes that do not fit is not of one type.
        except Exception as error:
            why = _first_line(str(error) or type(error).__name__)
            raise ModelError(f"enhancer.name: {name} cannot serve at {image_size} pixels: {why}") from error
        else:
            return _with_pooling(plan, options or {})
    given = f" with enhancer.options {dict(options)}" if options else ""
    raise ModelError(f"enhancer.name: timm cannot build {name}{given}: {_first_line(refused)}")


def known_name(name: str) -> str:
    """The timm architecture `name`, without a tag: tags name weights, and none are used here.

    Raises ModelError, naming the nearest names, where timm has no such architecture.
    """
    known = timm.list_models()
    architecture = name.partition(".")[0]
    if architecture in known:
        return architecture
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"the nearest: {', '.join(near)}" if near else "timm.list_models() lists them"
    raise ModelError(f"enhancer.name: timm {timm.__version__} has no model {name!r}; {hint}")


def to_map(features: Tensor, *, layout: Layout, num_prefix: int, side: int) -> Tensor:
    """Features as timm gives them, as a map [B, D, h, h]; prefix tokens are dropped."""
    if layout == "channels_first":
        return features
    if layout == "channels_last":
        return features.permute(0, 3, 1, 2)
    tokens_BND = features[:, num_prefix:]
    return tokens_BND.transpose(1, 2).reshape(len(features), -1, side, side)


def raw_features(model: nn.Module, images_B3SS: Tensor, *, through_head: bool) -> Tensor:
    """Features in timm's own layout."""
    features: Tensor = model.forward_features(images_B3SS)  # type: ignore[operator]
    if through_head:
        features = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
    return features


def trains_on_one_image(plan: BackbonePlan, *, image_size: int) -> bool:
    """Whether a training pass may hold a single image, as torch decides it.

    A batch norm has no deviation where it sees one value a channel: one image, and a map of one position.
    """
    model = build_on_meta(plan.name, plan.train_args).train()
    image_13SS = torch.empty(1, 3, image_size, image_size, device="meta")
    try:
        raw_features(model, image_13SS, through_head=plan.through_head)
    except ValueError as error:
        if ONE_VALUE in str(error):
            return False
        raise
    return True


def build_on_meta(name: str, args: Args) -> nn.Module:
    """The timm model without memory for its weights."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, **args)
    return model


class _UnknownArgumentError(Exception):
    """Timm's builder has no such parameter."""


class _IdleLayersError(Exception):
    """Some layers of the network would never be trained."""


def _size_candidates(
    name: str, base: Args, *, image_size: int, patch_size: int | None
) -> Iterator[dict[str, int]]:
    """Size arguments to try, the most telling first: most networks take neither."""
    if patch_size is not None and _takes_patch(name, base):
        yield {"img_size": image_size, "patch_size": patch_size}
    yield {"img_size": image_size}
    yield {}


def _takes_patch(name: str, base: Args) -> bool:
    try:
        return _patch_of(build_on_meta(name, base)) is not None
    except Exception:  # the reason is found again, and told, where sizes are tried
        return False


def _first_that_works(name: str, args: Args, *, image_size: int) -> BackbonePlan:
    """The plan of the first recipe that leaves no layer idle; the first recipe's reason where none does."""
    reasons: list[_IdleLayersError] = []
    for recipe, through_head in _RECIPES:
        try:
            return _try(name, {**args, **recipe}, image_size=image_size, through_head=through_head)
        except _IdleLayersError as error:
            reasons.append(error)
        except Exception:
            # A model that lacks a recipe's parameter is no news; one that cannot be run at all is.
            if not recipe:
                raise
    raise reasons[0]


def _patch_of(model: nn.Module) -> int | None:
    """Pixels of a patch where all layers work on one patch grid, None otherwise."""
    embed = getattr(model, "patch_embed", None)
    patch = _square(getattr(embed, "patch_size", None))
    side = _square(getattr(embed, "grid_size", None))
    image = _square(getattr(embed, "img_size", None))
    if patch is None or side is None or image is None or image // patch != side:
        return None
    reductions = {info.get("reduction") for info in getattr(model, "feature_info", [])}
    # Hybrids cut patches out of a CNN's map, hierarchical models merge patches on their way.
    return patch if reductions <= {patch} and not hasattr(embed, "backbone") else None


def _square(value: Any) -> int | None:
    if isinstance(value, tuple | list):
        value = value[0] if len(set(value)) == 1 else None
    return value if isinstance(value, int) else None


def _try(name: str, args: Args, *, image_size: int, through_head: bool) -> BackbonePlan:
    """Build and run once; raise unless every parameter gets a gradient."""
    try:
        model = build_on_meta(name, args).train()
    except TypeError as error:
        raise _UnknownArgumentError(str(error)) from error
    for part in _CLASS_TOKEN_ONLY:
        if hasattr(model, part):
            raise _IdleLayersError(
                f"its layers {part} serve the class token alone: they would never be trained"
            )
    images_B3SS = torch.empty(2, 3, image_size, image_size, device="meta")
    features = raw_features(model, images_B3SS, through_head=False)
    before = _describe(model, features)
    if through_head:
        features = raw_features(model, images_B3SS, through_head=True)
    layout, width, side, num_prefix = _describe(model, features)
    if side != before[2]:
        raise ModelError(f"its head shrinks the {before[2]} x {before[2]} feature map")
    reached = _parameters_behind(to_map(features, layout=layout, num_prefix=num_prefix, side=side))
    idle = [key for key, p in model.named_parameters() if p.requires_grad and p not in reached]
    if idle:
        shown = ", ".join(idle[:3]) + (f" and {len(idle) - 3} more" if len(idle) > 3 else "")
        raise _IdleLayersError(f"its layers behind the features ({shown}) would never be trained")
    patch = _patch_of(model)
    blocks = getattr(model, "blocks", ())
    is_vit = layout == "tokens" and patch is not None and side * patch == image_size
    return BackbonePlan(
        name=name,
        train_args=args,
        export_args=_export_args(name, model, args),
        through_head=through_head,
        layout=layout,
        num_prefix=num_prefix,
        width=width,
        side=side,
        is_vit=is_vit,
        can_share=is_vit and _is_plain(model),
        can_checkpoint=can_checkpoint(model),
        patch=patch if is_vit else None,
        heads=_num_heads(blocks) if is_vit else None,
        depth=len(blocks) if is_vit and hasattr(model, "blocks") else None,
    )


def _parameters_behind(features: Tensor) -> set[nn.Parameter]:
    """Those that a backward pass from `features` would reach; read off the graph, which is much cheaper."""
    reached: set[nn.Parameter] = set()
    seen: set[Any] = set()
    todo: list[Any] = [features.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(node.variable)
        todo += [parent for parent, _ in node.next_functions]
    return reached


def _describe(model: nn.Module, features: Tensor) -> tuple[Layout, int, int, int]:
    """Layout, channels, positions a side and prefix tokens of timm's features."""
    if not isinstance(features, Tensor):
        raise ModelError(f"its features are a {type(features).__name__}, not one map")
    shape = tuple(features.shape)
    if features.dim() == 3:
        num_prefix = getattr(model, "num_prefix_tokens", 0)
        if shape[1] == 1:
            raise ModelError("its features are one vector for the whole image, not a map")
        side = math.isqrt(shape[1] - num_prefix)
        if side * side != shape[1] - num_prefix:
            raise ModelError(f"its {shape[1]} tokens, {num_prefix} of them prefix tokens, form no square map")
        return "tokens", shape[2], side, num_prefix
    if features.dim() != 4:
        raise ModelError(f"its features have the shape {list(shape[1:])}, which is no map")
    last = (
        getattr(model, "output_fmt", None) == "NHWC"
        if shape[1] == shape[2] == shape[3]
        else shape[1] == shape[2]
    )
    if last and shape[1] == shape[2]:
        return "channels_last", shape[3], shape[1], 0
    if shape[2] == shape[3]:
        return "channels_first", shape[1], shape[2], 0
    raise ModelError(f"its features have the shape {list(shape[1:])}, which is no square map")


def _is_plain(model: nn.Module) -> bool:
    """Whether first layers can be used outside of the model: nothing may happen between them."""
    if type(model) is not VisionTransformer:
        return False
    vit: Any = model
    return (
        type(vit.patch_embed) is PatchEmbed
        and bool(vit.patch_embed.flatten)
        and isinstance(vit.patch_embed.norm, nn.Identity)
        and isinstance(vit.norm_pre, nn.Identity)
        and all(type(block) is Block and type(block.attn) is Attention for block in vit.blocks)
    )


def _num_heads(blocks: Any) -> int | None:
    for block in blocks:
        attention = getattr(block, "attn", None)
        return getattr(attention, "num_heads", None)
    return None


def _export_args(name: str, model: nn.Module, args: Args) -> Args:
    """Without the pooling recipe where the tensors stay the same, so that timm's own pooling is kept."""
    pooled = {key: value for key, value in args.items() if key != "global_pool"}
    if pooled == dict(args):
        return args
    try:
        plain = build_on_meta(name, pooled)
    except Exception:
        return args
    return pooled if _sizes(plain) == _sizes(model) else args


def _with_pooling(plan: BackbonePlan, options: Args) -> BackbonePlan:
    """The plan, exported with the pooling that was asked for; ModelError where that has layers of its own."""
    if options.get("global_pool") in (None, plan.export_args.get("global_pool")):
        return plan
    export_args = {**plan.export_args, "global_pool": options["global_pool"]}
    sizes = _sizes(build_on_meta(plan.name, plan.export_args))
    if _sizes(build_on_meta(plan.name, export_args)) != sizes:
        raise ModelError(
            f"enhancer.options.global_pool: {options['global_pool']!r} has layers behind the features, which "
            "pre-training would leave untrained; leave it out, and give it to timm when you load the encoder"
        )
    return replace(plan, export_args=export_args)


def _sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes without trailing ones: without pooling, timm's linear layers become 1x1 convolutions."""
    return {key: _trim(tuple(tensor.shape)) for key, tensor in model.state_dict().items()}


def _trim(shape: tuple[int, ...]) -> tuple[int, ...]:
    return _trim(shape[:-1]) if shape and shape[-1] == 1 else shape


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0] if message.strip() else "no reason given"
