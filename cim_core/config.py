"""Every setting of the core, as frozen dataclasses that check themselves. Standard library only.

The service uses these classes as fields of its wire models, so each field here is a key of the
spec. Where a default is `None` it is resolved once, before step one, and the comment says to
what. Sources of defaults: docs/method.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from types import MappingProxyType
from typing import Any, ClassVar, Literal, get_args

from cim_core.masking_config import MASKING, filled
from cim_core.masking_config import MaskingConfig as MaskingConfig  # a part of ModelConfig
from cim_core.rules import STRICT, Rules

Scalar = bool | int | float | str
Method = Literal["cim", "beit", "simmim", "mae"]  # of pre-training: CIM, or a peer to measure it by
Quantiser = Literal["vq", "relaxed"]
DALL_E = "dall-e"  # the official tokenizer, as a source
MOST_STEPS = 10**12  # of a training; at a thousand a second they take 30 years
# Of a training, free to differ between a run and its continuation: none of it moves a weight.
FREE_ON_RESUME = frozenset(
    {"log_every", "checkpoint_every", "sample_every", "loader_workers", "async_checkpoints"}
)


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


@dataclass(frozen=True, kw_only=True)
class Duration:
    """A length of training: exactly one of steps, epochs or images."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    steps: int | None = None
    epochs: float | None = None
    images: int | None = None

    def __post_init__(self) -> None:
        rules = Rules(self)
        rules.above(0, "steps", "epochs", "images")
        given = [n for n in ("steps", "epochs", "images") if getattr(self, n) is not None]
        names = " and ".join(given) or "none of them"
        rules.check("steps", f"give exactly one of steps, epochs, images; {names} given", ok=len(given) == 1)
        rules.done()


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """A discrete image tokenizer in the DALL-E layout, trained on the user's own images."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    image_size: int = 64  # training crop, pixels; a multiple of the stride
    stride: int = 8  # pixels a token; 2, 4, 8, 16: one group of blocks more than halvings
    width: int = 64  # DALL-E's n_hid (256 there): groups are 1, 2, 4, 8 times as wide
    blocks_per_group: int = 1  # 2 in DALL-E
    vocab_size: int = 512
    code_dim: int = 64  # width of a codebook entry (128 into DALL-E's decoder)
    quantiser: Quantiser = "vq"
    ema_decay: float = 0.99  # vq: decay of the codebook's moving averages
    commitment: float = 0.25  # vq: weight of the commitment loss
    restart_below: float = 0.1  # vq: a code used less than this share of an even use is re-seeded
    temperature_start: float = 1.0  # relaxed: Gumbel-softmax temperature, cosine to the end value
    temperature_end: float = 0.0625
    kl_weight: float = 6.6  # relaxed: final weight of the KL to the uniform prior
    kl_warmup: float = 0.3  # relaxed: share of the training over which the weight rises from 0

    def __post_init__(self) -> None:
        rules = Rules(self)
        rules.at_least(1, "width", "blocks_per_group", "code_dim")
        rules.at_least(2, "vocab_size")
        rules.check("stride", "must be 2, 4, 8 or 16", ok=self.stride in (2, 4, 8, 16))
        divides = self.stride > 0 and self.image_size > 0 and self.image_size % self.stride == 0
        rules.check("image_size", f"must be a positive multiple of the stride {self.stride}", ok=divides)
        rules.within(0.0, 1.0, "ema_decay", "kl_warmup")
        rules.at_least(0, "commitment", "restart_below", "kl_weight")
        rules.above(0, "temperature_start", "temperature_end")
        rules.done()

    @property
    def grid(self) -> int:
        """Tokens a side of the training crop."""
        return self.image_size // self.stride


@dataclass(frozen=True, kw_only=True)
class TokenizerSource:
    """Where a frozen tokenizer comes from: `dall-e`, `job:ID-or-name`, a URI of an artifact, or `fake`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    source: str  # no default: a missing tokenizer is an error; `fake` is for tests and says so
    encoder: str | None = None  # dall-e: path or address of encoder.pkl; None: OpenAI's address
    decoder: str | None = None  # dall-e: path or address of decoder.pkl; None: OpenAI's address
    encoder_sha256: str | None = None  # dall-e: a file with another checksum is refused
    decoder_sha256: str | None = None

    def __post_init__(self) -> None:
        rules = Rules(self)
        for name in ("encoder", "decoder", "encoder_sha256", "decoder_sha256"):
            ok = self.source == DALL_E or getattr(self, name) is None
            rules.check(name, f"belongs to source: {DALL_E} alone", ok=ok)
        for name in ("encoder_sha256", "decoder_sha256"):
            value = getattr(self, name)
            rule = "must be 64 lower-case hexadecimal digits"
            rules.check(name, rule, ok=value is None or _is_sha256(value))
        rules.done()


@dataclass(frozen=True, kw_only=True)
class GeneratorConfig:
    """The small trainable BEiT that proposes tokens for masked positions."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    depth: int = 4  # blocks, shared ones included
    width: int | None = None  # None: the enhancer's width where it is a ViT, else 384
    heads: int | None = None  # None: width / 64, at least 1; the enhancer's where blocks are shared
    temperature: float = 1.0  # of the softmax that tokens are sampled from
    positions: Literal["absolute", "relative"] = "absolute"  # relative: BEiT's blocks and shared bias table
    layer_scale: float = 0.0  # initial scale of the residual branches; 0: none (BEiT's base model: 0.1)

    def __post_init__(self) -> None:
        rules = Rules(self)
        rules.at_least(1, "depth", "width", "heads")
        rules.above(0, "temperature")
        rules.at_least(0, "layer_scale")
        if self.width and self.heads:
            rules.check("heads", f"must divide the width {self.width}", ok=self.width % self.heads == 0)
        rules.done()


@dataclass(frozen=True, kw_only=True)
class EnhancerConfig:
    """The network that is being pre-trained: any timm ViT or CNN, by its timm name."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    name: str
    shared_blocks: int | None = None  # with the generator; None: 2 for a plain ViT, 0 otherwise
    options: Mapping[str, Scalar] = field(default_factory=dict)  # further timm arguments, e.g. depth
    grad_checkpointing: bool = False  # recompute activations in the backward pass, where timm can
    ema_decay: float | None = None  # of a running average that is exported instead; None: no average

    def __post_init__(self) -> None:
        rules = Rules(self)
        rules.check("name", "must be a timm model name", ok=bool(self.name.strip()))
        rules.at_least(0, "shared_blocks")
        decay = self.ema_decay
        rules.check("ema_decay", "must lie between 0 and 1, ends excluded", ok=decay is None or 0 < decay < 1)
        ours = {"img_size", "patch_size", "num_classes", "pretrained", "in_chans"} & set(self.options)
        rules.check("options", f"may not set {', '.join(sorted(ours))}: the service does", ok=not ours)
        rules.done()


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the enhancer learns: clean pixels (respix) or which tokens were replaced (revdet)."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    name: Literal["respix", "revdet"]
    weight: float | None = None  # lambda before the enhancer's loss; None: respix 10, revdet 1
    normalise: Literal["window", "patch", "none"] = "window"  # respix: sliding window, MAE's patches, raw
    window: int = 8  # respix: side of the normalising window or patch, pixels
    l1: float = 1.0  # respix: weight of the absolute error
    l2: float = 1.0  # respix: weight of the squared error
    upsample: Literal["pixel_shuffle", "bilinear"] = "pixel_shuffle"  # revdet, where the map is too coarse

    def __post_init__(self) -> None:
        rules = Rules(self)
        rules.at_least(2, "window")
        rules.above(0, "weight")
        rules.at_least(0, "l1", "l2")
        rules.check("l1", "must be above 0 where l2 is 0", ok=self.l1 + self.l2 > 0)
        rules.done()


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """MAE's decoder, a plain ViT that is thrown away; defaults are the paper's."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    depth: int = 8
    width: int = 512
    heads: int = 16

    def __post_init__(self) -> None:
        rules = Rules(self)
        rules.at_least(1, "depth", "width", "heads")
        rules.check("width", "must be a multiple of 4, for its sin-cos positions", ok=self.width % 4 == 0)
        divides = self.heads > 0 and self.width % self.heads == 0
        rules.check("heads", f"must divide the width {self.width}", ok=divides)
        rules.done()


# What a method cannot do without, and the keys that say something to some methods only.
NEEDED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"cim": ("tokenizer", "objective"), "beit": ("tokenizer",), "simmim": (), "mae": ()}
)
_OWNERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "tokenizer": ("cim", "beit"),
        "objective": ("cim",),
        "generator": ("cim",),
        "interpolation": ("cim",),
        "decoder": ("mae",),
        "masking.unit": ("simmim",),
    }
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One model to pre-train. The grid of positions is image_size / patch_size on each side."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    method: Method = "cim"
    tokenizer: TokenizerSource | None = None  # cim, beit: must be given
    enhancer: EnhancerConfig  # the encoder, under its name in CIM
    objective: ObjectiveConfig | None = None  # cim: must be given
    image_size: int = 224
    patch_size: int = 16
    generator: GeneratorConfig | None = None  # cim; None: GeneratorConfig()
    decoder: DecoderConfig | None = None  # mae; None: DecoderConfig()
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    # cim: of the decoded picture to image_size; None: bicubic
    interpolation: Literal["bicubic", "bilinear"] | None = None

    def __post_init__(self) -> None:
        rules = Rules(self)
        rules.at_least(1, "image_size", "patch_size")
        fits = self.patch_size > 0 and self.image_size % self.patch_size == 0
        rules.check("image_size", f"must be a multiple of patch_size {self.patch_size}", ok=fits)
        if self.method not in get_args(Method):
            rules.check("method", f"must be one of {', '.join(get_args(Method))}", ok=False)
            rules.done()
        self._check_method(rules)
        self._check_masking(rules)
        if self.method == "cim":
            self._check_cim(rules)
        rules.done()

    def _check_method(self, rules: Rules) -> None:
        for name in NEEDED[self.method]:
            told = f"is required for method {self.method}"
            rules.check(name, told, ok=getattr(self, name) is not None)
        for name, methods in _OWNERS.items():
            value = reduce(getattr, name.split("."), self)
            told = f"belongs to method {' and '.join(methods)} alone, not to {self.method}: leave it out"
            rules.check(name, told, ok=value is None or self.method in methods)
        told = f"belongs to method cim alone, not to {self.method}: leave it out"
        shares = bool(self.enhancer.shared_blocks)
        rules.check("enhancer.shared_blocks", told, ok=self.method == "cim" or not shares)

    def _check_masking(self, rules: Rules) -> None:
        given, own = self.masking, MASKING[self.method]
        low = own.min_ratio if given.min_ratio is None else given.min_ratio
        high = own.max_ratio if given.max_ratio is None else given.max_ratio
        assert low is not None
        assert high is not None
        ordered = f"must not be below masking.min_ratio (for {self.method} they are {low} and {high})"
        rules.check("masking.max_ratio", ordered, ok=low <= high)
        if self.method == "mae":
            equal = "must equal masking.min_ratio, as mae encodes equally many patches of each image"
            rules.check("masking.max_ratio", f"{equal} (they are {low} and {high})", ok=low >= high)
            even = "must be random for mae: the number of masked positions varies with blocks"
            rules.check("masking.strategy", even, ok=given.strategy in (None, "random"))
        told = f"must be a multiple of patch_size {self.patch_size} and divide image_size {self.image_size}"
        rules.check("masking.unit", told, ok=given.unit is None or self._units_tile(given.unit))

    def _units_tile(self, unit: int) -> bool:
        return self.patch_size > 0 and unit % self.patch_size == 0 and self.image_size % unit == 0

    def _check_cim(self, rules: Rules) -> None:
        if not self._patches_tile():
            told = f"must divide image_size {self.image_size} where normalise is patch"
            rules.check("objective.window", told, ok=False)
        generator = self.generator or GeneratorConfig()
        shared = self.enhancer.shared_blocks or 0
        told = f"must not be fewer than the {shared} blocks shared with the enhancer"
        rules.check("generator.depth", told, ok=shared <= generator.depth)
        told = "must be absolute where blocks are shared: the enhancer's know no relative bias"
        rules.check("generator.positions", told, ok=not shared or generator.positions != "relative")

    def _patches_tile(self) -> bool:
        """Whether the patches that normalise a respix target, if any do, cover the image exactly."""
        objective = self.objective
        if objective is None or objective.name != "respix" or objective.normalise != "patch":
            return True
        return self.image_size % objective.window == 0

    @property
    def grid(self) -> int:
        """Positions a side."""
        return self.image_size // self.patch_size

    @property
    def resolved(self) -> "ModelConfig":
        """The same, with every default filled in that hangs on the method; again, it changes nothing."""
        sizes = {"image_size": self.image_size, "patch_size": self.patch_size}
        masking = filled(self.masking, method=self.method, **sizes)
        if self.method == "cim":
            generator, interpolation = self.generator or GeneratorConfig(), self.interpolation or "bicubic"
            return replace(self, masking=masking, generator=generator, interpolation=interpolation)
        if self.method == "mae":
            return replace(self, masking=masking, decoder=self.decoder or DecoderConfig())
        return replace(self, masking=masking)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long, how fast and in what portions; one of epochs, steps, images gives the length."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    epochs: float | None = None
    steps: int | None = None
    images: int | None = None
    batch_size: int = 256  # images a step over all workers
    accumulation: int = 1  # forward passes a step on each worker
    learning_rate: float = 1.5e-3  # peak, as given: never rescaled by the batch size
    min_learning_rate: float = 1e-5
    warmup: Duration | None = None  # None: a thirtieth of the training (10 of 300 epochs)
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.98
    clip_norm: float = 3.0  # 0 switches clipping off
    precision: Literal["fp32", "bf16"] | None = None  # None: bf16 where the device computes it, else fp32
    seed: int = 0
    crop_min: float = 0.08  # smallest area of a random crop, as a share of the picture
    checkpoint_every: Duration | None = None  # None: an epoch
    sample_every: Duration | None = None  # pictures; None: a tenth of the training
    log_every: int = 10  # steps between metric points
    loader_workers: int = 0  # processes that decode images, for each worker; 0: in the worker
    fused_optimizer: bool | None = None  # AdamW as one kernel; None: on a GPU
    channels_last: bool | None = None  # convolutions with channels innermost; None: on a GPU
    compile: bool = False  # torch.compile of the networks
    async_checkpoints: bool = True  # written while training goes on

    def __post_init__(self) -> None:
        rules = Rules(self)
        rules.above(0, "epochs", "steps", "images", "learning_rate")
        given = [n for n in ("epochs", "steps", "images") if getattr(self, n) is not None]
        names = " and ".join(given) or "none of them"
        rules.check("epochs", f"give exactly one of epochs, steps, images; {names} given", ok=len(given) == 1)
        rules.at_least(1, "batch_size", "accumulation", "log_every")
        rules.at_least(0, "min_learning_rate", "weight_decay", "clip_norm", "loader_workers", "seed")
        rules.within(0.0, 1.0, "beta1", "beta2", "crop_min")
        rules.above(0, "crop_min")
        high = self.min_learning_rate > self.learning_rate
        rules.check("min_learning_rate", f"must not exceed learning_rate {self.learning_rate}", ok=not high)
        divides = self.accumulation > 0 and self.batch_size % self.accumulation == 0
        rules.check("accumulation", f"must divide batch_size {self.batch_size}", ok=divides)
        rules.done()

    @property
    def length(self) -> Duration:
        """The whole training as one duration."""
        return Duration(steps=self.steps, epochs=self.epochs, images=self.images)


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainingConfig(TrainingConfig):
    """The same for a tokenizer, with a peak rate of its own, that suits a width of 64 and both quantisers."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    learning_rate: float = 2e-3
