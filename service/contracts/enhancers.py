"""What the service knows about timm's networks without loading torch.

`enhancers.json` is written by a script that builds each network once.
"""

import difflib
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Literal

from pydantic import Field

from cim_core.config import EnhancerConfig, GeneratorConfig
from service.contracts.base import Stored

OUTPUT_STRIDE = "output_stride"  # the option that makes a CNN's last map finer
_OWN_STRIDE = 32  # of those that have the option
_WIDTH_BESIDE_A_CNN = 384


class EnhancerFacts(Stored):
    """One timm network: what it is, and whether it can serve as an enhancer."""

    kind: Literal["vit", "map"]  # tokens of one width, or a feature map
    width: int
    heads: int | None = None
    depth: int | None = None
    patch: int | None = None  # its own patch size; ours takes its place
    can_share: bool = False  # its first blocks fit the generator
    can_checkpoint: bool = False  # timm has gradient checkpointing for it
    # Image side, pixels, from which a training pass may hold one image; None: batch norm always forbids it.
    one_image_from: int | None = 1
    one_image_from_by_stride: dict[str, int | None] = Field(default_factory=dict)  # by output_stride
    ok: bool = True
    why: str = ""  # it cannot serve


@cache
def known_enhancers() -> Mapping[str, EnhancerFacts]:
    """Every timm network by its name. A tag, as in `vit_small_patch16_224.dino`, means weights: not here."""
    text = files("service.contracts").joinpath("enhancers.json").read_text(encoding="utf-8")
    return {name: EnhancerFacts.model_validate(facts) for name, facts in json.loads(text).items()}


def facts_of(enhancer: EnhancerConfig) -> EnhancerFacts | None:
    """What is known of this enhancer, its options counted in; None for an unknown name."""
    facts = known_enhancers().get(enhancer.name)
    if facts is None:
        return None
    sizes = {"width": "embed_dim", "heads": "num_heads", "depth": "depth"}
    given = {ours: enhancer.options.get(theirs) for ours, theirs in sizes.items()}
    return facts.model_copy(update={name: size for name, size in given.items() if isinstance(size, int)})


def one_image_from(enhancer: EnhancerConfig, facts: EnhancerFacts) -> int | None:
    """The least image side, pixels, from which a training pass may hold one image; None where none is.

    1 as well where options may have changed norms or strides: only a worker can tell.
    """
    if any(key != OUTPUT_STRIDE and "drop" not in key for key in enhancer.options):
        return 1
    stride = enhancer.options.get(OUTPUT_STRIDE, _OWN_STRIDE)
    if stride == _OWN_STRIDE:
        return facts.one_image_from
    return facts.one_image_from_by_stride.get(str(stride), 1)


def generator_width(generator: GeneratorConfig, facts: EnhancerFacts) -> int:
    """The width that the generator has beside this enhancer."""
    if generator.width is not None:
        return generator.width
    return facts.width if facts.kind == "vit" else _WIDTH_BESIDE_A_CNN


def nearest_enhancers(name: str) -> list[str]:
    """At most three usable names that look like `name`."""
    usable = [known for known, facts in known_enhancers().items() if facts.ok]
    if (untagged := name.partition(".")[0]) in usable:
        return [untagged]
    return difflib.get_close_matches(name, usable, n=3, cutoff=0.6)
