"""What the jobs of a request will take."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from cim_core.config import DALL_E, TokenizerConfig, TrainingConfig
from cim_core.data.sources import Candidate, walk
from cim_core.durations import steps_of
from cim_core.errors import DataError
from service.contracts.estimates import Cost, Estimate, Question
from service.contracts.parsing import AnySpec
from service.contracts.specs import EvaluateSpec, PretrainSpec, Resources
from service.jobs.costs import Costs, NoCostError
from service.jobs.looks import Looks, LookTimeoutError

REQUEST_LIMIT_S = 60.0  # for the costs of all specs of a request
_COUNT_LIMIT_S = 3.0  # for the files of one spec
_KNOWN_TOKENIZERS = (DALL_E, "fake")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One spec, and what is known of the tokenizer that it names."""

    spec: AnySpec
    tokenizer: TokenizerConfig | None


async def estimate(
    asked: Sequence[Asked], *, costs: Costs, looks: Looks | None
) -> tuple[list[Estimate], list[str]]:
    """An estimate for each spec, and warnings. `looks` is None where the workers see other folders."""
    deadline = time.monotonic() + REQUEST_LIMIT_S
    estimates: list[Estimate] = []
    warnings: list[str] = []
    for one in asked:
        spec = one.spec
        if isinstance(spec, EvaluateSpec):
            estimates.append(_resources(spec))
            continue
        files = await _counted(spec.data.uri, looks) if looks is not None else None
        question = _question(one)
        cost, fault = await _cost(costs, question, limit_s=deadline - time.monotonic())
        told = {
            **_length(spec.training, files),
            "files": files,
            "precision": question.training.precision,
            "images_per_pass": spec.training.batch_size
            // (spec.resources.workers * spec.training.accumulation),
            "cost": cost,
        }
        estimates.append(_resources(spec).model_copy(update=told))
        warnings += [f"{spec.name}: {warning}" for warning in (fault, *_doubts(one, files)) if warning]
    return estimates, warnings


def _resources(spec: AnySpec) -> Estimate:
    resources = spec.resources
    return Estimate(
        name=spec.name,
        workers=resources.workers,
        cpus=resources.workers * resources.cpus_per_worker,
        gpus=resources.workers * resources.gpus_per_worker,
    )


async def _counted(uri: str, looks: Looks) -> int | None:
    try:
        return await looks.look(partial(_num_files, uri), limit_s=_COUNT_LIMIT_S)
    except LookTimeoutError:
        return None


def _num_files(uri: str) -> int | None:
    """Files at a local address, by the rules of the workers' own search; None where that takes too long."""
    if not uri.startswith("/") or "**" in uri:
        return None
    deadline = time.monotonic() + _COUNT_LIMIT_S
    count = 0
    try:
        for found in walk(uri)[1]:
            count += isinstance(found, Candidate)
            if time.monotonic() > deadline:
                return None
    except (DataError, OSError):
        return None
    return count


def _length(training: TrainingConfig, files: int | None) -> dict[str, object]:
    """Steps, images and epochs, and what they still depend on."""
    batch = training.batch_size
    if training.epochs is None:
        steps = steps_of(training.length, batch_size=batch, num_images=batch)
        epochs = round(steps * batch / files, 2) if files else None
        return {"steps": steps, "images": steps * batch, "epochs": epochs}
    if not files:
        why = "steps and images: the number of images at data.uri is known when a worker has looked"
        return {"epochs": training.epochs, "depends_on": why}
    steps = steps_of(training.length, batch_size=batch, num_images=files)
    why = "steps and images: fewer if some of the files are no pictures, or are held out"
    return {"epochs": training.epochs, "steps": steps, "images": steps * batch, "depends_on": why}


def _question(asked: Asked) -> Question:
    """Only what the cost depends on, so that equal questions are equal."""
    spec = asked.spec
    assert not isinstance(spec, EvaluateSpec), "an evaluation trains nothing"
    training = TrainingConfig(
        steps=1,
        batch_size=spec.training.batch_size,
        accumulation=spec.training.accumulation,
        clip_norm=spec.training.clip_norm,
        async_checkpoints=spec.training.async_checkpoints,
        precision=spec.training.precision or _precision(spec.resources),
    )
    return Question(
        pretrain=spec.model if isinstance(spec, PretrainSpec) else None,
        tokenizer=asked.tokenizer if isinstance(spec, PretrainSpec) else spec.model,
        training=training,
        workers=spec.resources.workers,
        on_gpu=spec.resources.gpus_per_worker > 0,
    )


def _precision(resources: Resources) -> Literal["bf16", "fp32"]:
    """What a device most probably decides for."""
    return "bf16" if resources.gpus_per_worker else "fp32"


async def _cost(costs: Costs, question: Question, *, limit_s: float) -> tuple[Cost | None, str]:
    """The cost, or why there is none."""
    try:
        return await costs.cost(question, limit_s=max(limit_s, 0.0)), ""
    except NoCostError as error:
        return None, f"no parameters, MACs and memory: {error}"


def _doubts(asked: Asked, files: int | None) -> list[str]:
    """What is allowed, and makes the estimate or the job worth a second look."""
    spec, doubts = asked.spec, []
    assert not isinstance(spec, EvaluateSpec), "an evaluation trains nothing"
    if files is not None and files < spec.training.batch_size:
        doubts.append(
            f"training.batch_size is {spec.training.batch_size}, but data.uri holds only {files} files; "
            "the job will fail unless one of the two changes"
        )
    if isinstance(spec, PretrainSpec) and spec.model.tokenizer is not None and asked.tokenizer is None:
        source = spec.model.tokenizer.source
        if source not in _KNOWN_TOKENIZERS:
            doubts.append(
                f"the sizes of the tokenizer {source} are not known here: its part of the estimate is left "
                "out, and its vocabulary taken to be that of DALL-E's"
            )
    return doubts
