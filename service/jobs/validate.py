"""Judge specs without storing anything."""

import asyncio
from collections.abc import Sequence
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.jobs import Validation
from service.contracts.parsing import AnySpec
from service.contracts.resolving import resolve
from service.contracts.specs import EvaluateSpec, PretrainSpec
from service.domain.names import new_job_id
from service.errors import InvalidSpecError
from service.jobs import references
from service.jobs.submit import parsed, uri_faults


async def validate(session: AsyncSession, documents: Sequence[Any], *, shared_filesystem: bool) -> Validation:
    """The resolved specs, what they will take, and what is allowed but probably not meant.

    References to jobs are checked as at submit; those to names of the same request stay names.
    Raises InvalidSpecError as `submit` does.
    """
    specs = parsed(documents)
    faults = await asyncio.to_thread(uri_faults, specs, shared_filesystem=shared_filesystem)
    links = await references.link(session, specs, [new_job_id() for _ in specs])
    if faults or links.problems:
        raise InvalidSpecError([*faults, *links.problems])
    return Validation(
        resolved=[resolve(spec) for spec in specs],
        estimate=[_estimate(spec) for spec in specs],
        warnings=[warning for spec in specs for warning in _warnings(spec)],
    )


def _estimate(spec: AnySpec) -> dict[str, Any]:
    """Workers, CPUs and GPUs; steps and images as far as they do not depend on the data."""
    resources = spec.resources
    estimate: dict[str, Any] = {
        "name": spec.name,
        "workers": resources.workers,
        "cpus": resources.workers * resources.cpus_per_worker,
        "gpus": resources.workers * resources.gpus_per_worker,
    }
    if isinstance(spec, EvaluateSpec):
        return estimate
    training = spec.training
    if training.steps is not None:
        estimate |= {"steps": training.steps, "images": training.steps * training.batch_size}
    if training.images is not None:
        steps = -(-training.images // training.batch_size)
        estimate |= {"steps": steps, "images": training.images}
    if training.epochs is not None:
        estimate |= {"epochs": training.epochs}
    return estimate


def _warnings(spec: AnySpec) -> list[str]:
    found = []
    if isinstance(spec, PretrainSpec) and spec.model.tokenizer.source == "fake":
        found.append(f"{spec.name}: the fake tokenizer knows nothing of images; it is for tests")
    return found
