"""The methods that are compared, and what each of them trains."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import nn

from cim_core.config import (
    DecoderConfig,
    EnhancerConfig,
    GeneratorConfig,
    Method,
    ModelConfig,
    ObjectiveConfig,
    TokenizerSource,
)
from cim_core.data.dataset import Views
from cim_core.engine.step import Task, TaskOutput
from cim_core.task import cim_task

VIT = EnhancerConfig(
    name="vit_tiny_patch16_224", options={"depth": 6, "embed_dim": 192, "num_heads": 3}, shared_blocks=2
)
RESNET = EnhancerConfig(name="resnet18", shared_blocks=0)
RESNET_GENERATOR = GeneratorConfig(width=192, heads=3)  # as wide as the ViT's: it costs the same beside both
GENERATOR = GeneratorConfig()
RESPIX = ObjectiveConfig(name="respix")
REVDET = ObjectiveConfig(name="revdet")
# With a window of 8 pixels, a token of 64, a CNN stayed at random weights (docs/lab-log.md, 2026-11-28).
RESPIX_WIDE = ObjectiveConfig(name="respix", window=32)
TOKENIZER = TokenizerSource(source="benchmark")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    method: Method
    enhancer: EnhancerConfig = VIT
    objective: ObjectiveConfig = RESPIX  # of cim
    generator: GeneratorConfig = GENERATOR  # of cim
    trains: bool = True
    generator_alone: bool = False  # the enhancer's loss is left out; shared layers still learn
    needs_tokenizer: bool = True
    adds_tokenizer_seconds: bool = False  # equal wall-clock with the tokenizer's training counted in
    learning_rate: float = 1e-3  # the best peak of those tried with batches of 16 (docs/lab-log.md)


# Two thirds of the width and of the depth of the encoder, as in the paper. Its own decoder, 512 wide, would
# be 97 % of the arithmetic beside an encoder of 192, and leave MAE few steps.
MAE_DECODER = DecoderConfig(depth=4, width=128, heads=4)
CNN = Case(method="cim", enhancer=RESNET, generator=RESNET_GENERATOR)
SIMMIM = Case(method="simmim", needs_tokenizer=False, learning_rate=3e-4)
MAE = Case(method="mae", needs_tokenizer=False)
CASES: Mapping[str, Case] = MappingProxyType(
    {
        "random": Case(method="cim", trains=False),
        "cim-respix": Case(method="cim"),
        "cim-revdet": Case(method="cim", objective=REVDET, learning_rate=3e-4),
        "generator-only": Case(method="cim", generator_alone=True),
        "beit": Case(method="beit"),
        "simmim": SIMMIM,
        "mae": MAE,
        "simmim-long": replace(SIMMIM, adds_tokenizer_seconds=True),
        "mae-long": replace(MAE, adds_tokenizer_seconds=True),
        "resnet18-random": replace(CNN, trains=False),
        "resnet18-cim-respix": replace(CNN, objective=RESPIX_WIDE),
        "resnet18-cim-revdet": replace(CNN, objective=REVDET),
    }
)


def model_config(case: Case, *, image_size: int, patch_size: int) -> ModelConfig:
    """What `case` trains, before changes that the command line asks for."""
    given: dict[str, Any] = {"method": case.method, "image_size": image_size, "patch_size": patch_size}
    if case.method == "cim":
        enhancer = case.enhancer if case.enhancer is VIT else with_map_of(case.enhancer, patch_size)
        given |= {"enhancer": enhancer, "generator": case.generator, "objective": case.objective}
    else:
        if case.method == "mae":
            given["decoder"] = MAE_DECODER
        given["enhancer"] = replace(case.enhancer, shared_blocks=None)  # there is no generator to share with
    return ModelConfig(**given, tokenizer=TOKENIZER if case.needs_tokenizer else None)


def with_map_of(cnn: EnhancerConfig, patch_size: int) -> EnhancerConfig:
    """With a last map as fine as the tokens, as far as timm can: a stride of 8, 16 or 32 pixels.

    At stride 32 a picture of 64 pixels ends as 2 x 2 positions, and REVDET stays at chance.
    """
    stride = max(size for size in (8, 16, 32) if size <= max(patch_size, 8))
    return replace(cnn, options={**cnn.options, "output_stride": stride})


def task_of(case: Case, model: nn.Module, *, seed: int) -> Task[Views]:
    """How one batch becomes a loss."""
    task = cim_task(model, seed=seed)
    return GeneratorAlone(task) if case.generator_alone else task


class GeneratorAlone:
    """CIM without the enhancer's loss.

    Its pass is still made, its own blocks have no backward pass: more steps fit into a second.
    """

    def __init__(self, task: Task[Views]) -> None:
        self._task = task

    def losses(self, batch: Views, *, step: int, micro: int, rank: int, progress: float) -> TaskOutput:
        """The output of the whole, with the generator's loss in place of the sum."""
        output: Any = self._task.losses(batch, step=step, micro=micro, rank=rank, progress=progress)
        return replace(output, loss=output.losses["mim"])  # type: ignore[no-any-return]
