"""Rules between the parts of one spec that is sound in itself: what the core would refuse later."""

from collections.abc import Iterator
from typing import Any

from cim_core.config import EnhancerConfig, GeneratorConfig, ModelConfig, TrainingConfig
from service.contracts.addresses import AnySpec, secrets_in
from service.contracts.enhancers import (
    OUTPUT_STRIDE,
    EnhancerFacts,
    facts_of,
    generator_width,
    nearest_enhancers,
    one_image_from,
)
from service.contracts.problems import FieldProblem
from service.contracts.specs import EvaluateSpec, PretrainSpec, Resources


def check(spec: AnySpec) -> Iterator[FieldProblem]:
    """Every broken rule."""
    yield from secrets_in(spec.model_dump(mode="json"))
    if isinstance(spec, EvaluateSpec):
        yield from _encoder(spec.encoder)
        return
    yield from _training(spec.training, spec.resources)
    if isinstance(spec, PretrainSpec):
        yield from _model(spec.model)
        yield from _one_image(spec)


def _problem(path: str, message: str, value: Any) -> FieldProblem:
    return FieldProblem(path=path, message=message, value=value)


def _encoder(encoder: str) -> Iterator[FieldProblem]:
    if encoder == "random":
        told = "must name an encoder; compare_random: true already measures random weights beside it"
        yield _problem("encoder", f"{told}, got 'random'", encoder)


def _training(training: TrainingConfig, resources: Resources) -> Iterator[FieldProblem]:
    portions = resources.workers * training.accumulation
    if training.batch_size % portions:
        rule = f"must be a multiple of resources.workers x training.accumulation = {portions}"
        up = -(-training.batch_size // portions) * portions
        told = f"{rule}, got {training.batch_size}; for example {up}"
        yield _problem("training.batch_size", told, training.batch_size)
    for name in ("steps", "epochs", "images"):
        total = getattr(training, name)
        warmup = training.warmup and getattr(training.warmup, name)
        if total is not None and warmup is not None and warmup > total:
            told = f"must not be longer than the training of {total:g} {name}, got {warmup:g}"
            yield _problem(f"training.warmup.{name}", told, warmup)


def _one_image(spec: PretrainSpec) -> Iterator[FieldProblem]:
    """A batch norm that sees one value a channel, of which torch can make no deviation."""
    training, model = spec.training, spec.model
    facts = facts_of(model.enhancer)
    portions = spec.resources.workers * training.accumulation
    if facts is None or not facts.ok or training.batch_size != portions:
        return
    least = one_image_from(model.enhancer, facts)
    if least is not None and model.image_size >= least:
        return
    ways = ", ".join(_ways_out(model, facts, least, portions=portions))
    told = (
        f"must be more than resources.workers x training.accumulation = {portions}, got {portions}: else a "
        f"forward pass holds one image, of which a batch norm of {model.enhancer.name} sees one value a "
        f"channel at {model.image_size} pixels. {ways}"
    )
    yield _problem("training.batch_size", told, training.batch_size)


def _ways_out(model: ModelConfig, facts: EnhancerFacts, least: int | None, *, portions: int) -> Iterator[str]:
    yield f"Raise it, for example {2 * portions}"
    if portions > 1:
        yield "or lower resources.workers or training.accumulation"
    if least is not None:
        yield f"or set model.image_size: {-(-least // model.patch_size) * model.patch_size}"
    finer = facts.one_image_from_by_stride.items() if OUTPUT_STRIDE not in model.enhancer.options else ()
    enough = [int(stride) for stride, side in finer if side is not None and side <= model.image_size]
    if enough:
        yield f"or add {OUTPUT_STRIDE}: {max(enough)} to model.enhancer.options"


def _model(model: ModelConfig) -> Iterator[FieldProblem]:
    name = model.enhancer.name
    facts = facts_of(model.enhancer)
    if facts is None:
        near = nearest_enhancers(name)
        hint = f"the nearest: {', '.join(near)}" if near else "timm.list_models() lists them"
        told = f"must be the name of a timm model without a tag, got {name!r}; {hint}"
        yield _problem("model.enhancer.name", told, name)
    elif not facts.ok:
        yield _problem("model.enhancer.name", f"{name} cannot serve here: {facts.why}", name)
    elif facts.kind == "vit" and facts.heads and facts.width % facts.heads:
        told = f"must give a width (embed_dim) that num_heads divides, got {facts.width} and {facts.heads}"
        yield _problem("model.enhancer.options", told, dict(model.enhancer.options))
    else:
        yield from _sharing(model, facts) if model.method == "cim" else _peer(model, facts)
        yield from _checkpointing(model.enhancer, facts)


def _peer(model: ModelConfig, facts: EnhancerFacts) -> Iterator[FieldProblem]:
    if not facts.can_share:
        told = f"must be a plain ViT of timm for method {model.method}, as vit_small_patch16_224 is"
        yield _problem("model.enhancer.name", f"{told}, got {model.enhancer.name!r}", model.enhancer.name)


def _checkpointing(enhancer: EnhancerConfig, facts: EnhancerFacts) -> Iterator[FieldProblem]:
    if enhancer.grad_checkpointing and not facts.can_checkpoint:
        told = f"must be false for {enhancer.name}: timm has no gradient checkpointing for it"
        yield _problem("model.enhancer.grad_checkpointing", f"{told}, got True", True)  # noqa: FBT003


def _sharing(model: ModelConfig, facts: EnhancerFacts) -> Iterator[FieldProblem]:
    shared, generator = model.enhancer.shared_blocks, model.generator or GeneratorConfig()
    if not shared:
        # An open key becomes two shared blocks, but only where nothing else stands against it.
        yield from _heads(generator, facts)
        return
    where = "model.enhancer.shared_blocks"
    if not facts.can_share:
        told = f"must be 0 for {model.enhancer.name}: only the blocks of a plain ViT fit the generator"
        yield _problem(where, f"{told}, got {shared}", shared)
        return
    if facts.depth is not None and shared > facts.depth:
        yield _problem(where, f"must not exceed the enhancer's {facts.depth} blocks, got {shared}", shared)
    for key, theirs in (("width", facts.width), ("heads", facts.heads)):
        ours = getattr(generator, key)
        if ours is not None and theirs is not None and ours != theirs:
            rule = f"must be the enhancer's {theirs} where blocks are shared (or leave it out)"
            yield _problem(f"model.generator.{key}", f"{rule}, got {ours}", ours)


def _heads(generator: GeneratorConfig, facts: EnhancerFacts) -> Iterator[FieldProblem]:
    width = generator_width(generator, facts)
    if generator.heads is not None and width % generator.heads:
        told = f"must divide the generator's width {width}, got {generator.heads}"
        yield _problem("model.generator.heads", told, generator.heads)
