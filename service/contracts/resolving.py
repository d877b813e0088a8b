"""Fills every default that depends on other keys, once, when a job is submitted."""

from dataclasses import replace
from typing import Any

from cim_core.config import Duration, GeneratorConfig, ModelConfig, ObjectiveConfig, TrainingConfig
from cim_core.limits import LEAST_EPOCHS
from service.contracts.enhancers import EnhancerFacts, facts_of, generator_width
from service.contracts.specs import EvaluateSpec, PretrainSpec, TokenizerSpec

_SHARED_BLOCKS = 2
_WIDTH_OF_A_HEAD = 64
_WEIGHTS = {"respix": 10.0, "revdet": 1.0}
_WARMUP_PARTS = 30  # 10 of 300 epochs
_SAMPLE_PARTS = 10


def resolve(spec: TokenizerSpec | PretrainSpec | EvaluateSpec) -> dict[str, Any]:
    """The spec as a document in which no default is open; resolving that again changes nothing.

    The spec must have passed `parsing.parse`. Keys that stand for "not wanted" are left out, and so
    is `training.precision` where it is open: only the worker knows its device.
    """
    if isinstance(spec, PretrainSpec):
        spec = spec.model_copy(update={"model": _model(spec.model)})
    if not isinstance(spec, EvaluateSpec):
        spec = spec.model_copy(update={"training": _training(spec.training)})
    return spec.model_dump(mode="json", exclude_none=True)


def _model(model: ModelConfig) -> ModelConfig:
    model = model.resolved
    if model.generator is None or model.objective is None:
        return model  # a peer of CIM has neither
    facts = facts_of(model.enhancer)
    assert facts is not None, "parse refuses unknown enhancers"
    shared = model.enhancer.shared_blocks
    if shared is None:
        shared = _shared_blocks(model.generator, facts)
    weight = model.objective.weight
    return replace(
        model,
        enhancer=replace(model.enhancer, shared_blocks=shared),
        generator=_generator(model.generator, facts, shares=shared > 0),
        objective=_objective(model.objective) if weight is None else model.objective,
    )


def _shared_blocks(generator: GeneratorConfig, facts: EnhancerFacts) -> int:
    """Two for a plain ViT, fewer where one of the two has fewer; none where they cannot fit."""
    if generator.positions == "relative":
        return 0  # the enhancer's blocks know no relative bias
    ours = ((generator.width, facts.width), (generator.heads, facts.heads))
    if not facts.can_share or any(mine not in (None, theirs) for mine, theirs in ours):
        return 0
    return min(_SHARED_BLOCKS, generator.depth, facts.depth or _SHARED_BLOCKS)


def _generator(generator: GeneratorConfig, facts: EnhancerFacts, *, shares: bool) -> GeneratorConfig:
    width = generator_width(generator, facts)
    heads = generator.heads
    if heads is None:
        heads = facts.heads if shares and facts.heads else _heads(width)
    return replace(generator, width=width, heads=heads)


def _heads(width: int) -> int:
    """A head for each 64 of the width; the next lower number that divides it."""
    most = max(1, width // _WIDTH_OF_A_HEAD)
    return next(heads for heads in range(most, 0, -1) if width % heads == 0)


def _objective(objective: ObjectiveConfig) -> ObjectiveConfig:
    return replace(objective, weight=_WEIGHTS[objective.name])


def _training(training: TrainingConfig) -> TrainingConfig:
    return replace(
        training,
        warmup=training.warmup or _part(training.length, _WARMUP_PARTS),
        checkpoint_every=training.checkpoint_every or Duration(epochs=1),
        sample_every=training.sample_every or _part(training.length, _SAMPLE_PARTS),
    )


def _part(length: Duration, parts: int) -> Duration:
    """One of `parts` parts of the training, in the unit in which its length is given."""
    if length.epochs is not None:
        return Duration(epochs=max(LEAST_EPOCHS, length.epochs / parts))
    if length.steps is not None:
        return Duration(steps=max(1, round(length.steps / parts)))
    assert length.images is not None
    return Duration(images=max(1, round(length.images / parts)))
