"""Judge specs without storing anything."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import TypeAdapter, ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from cim_core.config import TokenizerConfig
from service.contracts.allowed import Allowed
from service.contracts.jobs import Validation
from service.contracts.parsing import AnySpec
from service.contracts.resolving import resolve
from service.contracts.specs import PretrainSpec, TokenizerSpec
from service.db import queries
from service.db.engine import Sessions, only_reads
from service.domain.names import new_job_id
from service.errors import InvalidSpecError
from service.jobs import references
from service.jobs.costs import Costs
from service.jobs.estimate import Asked, estimate
from service.jobs.looks import Looks
from service.jobs.submit import judged_uris, parsed

_TOKENIZER = TypeAdapter(TokenizerConfig)


async def validate(
    sessions: Sessions,
    documents: Sequence[Any],
    *,
    allowed: Allowed,
    shared_filesystem: bool,
    costs: Costs,
    looks: Looks,
) -> Validation:
    """The resolved specs, what they will take, and what is allowed but probably not meant.

    References to jobs are checked as at submit; those to names of the same request stay names. No
    transaction is open while files and networks are counted. Raises InvalidSpecError as `submit` does.
    """
    specs = await asyncio.to_thread(parsed, documents)
    found = await judged_uris(specs, allowed=allowed, shared_filesystem=shared_filesystem, looks=looks)
    ids = [new_job_id() for _ in specs]
    async with sessions.begin() as session:
        await only_reads(session)
        links = await references.link(session, specs, ids)
        if found.problems or links.problems:
            raise InvalidSpecError([*found.problems, *links.problems])
        tokenizers = await _tokenizers(session, dict(zip(ids, specs, strict=True)), links)
    asked = [Asked(spec=spec, tokenizer=sizes) for spec, sizes in zip(specs, tokenizers, strict=True)]
    counting = looks if shared_filesystem else None
    estimates, warnings = await estimate(asked, costs=costs, looks=counting)
    unseen = [f"{path} could not be looked at in time: the workers will have to" for path in found.unseen]
    return Validation(
        resolved=[resolve(spec) for spec in specs],
        estimate=estimates,
        warnings=[*(warning for spec in specs for warning in _warnings(spec)), *unseen, *warnings],
    )


async def _tokenizers(
    session: AsyncSession, specs: Mapping[str, AnySpec], links: references.Links
) -> list[TokenizerConfig | None]:
    """For each spec, the sizes of the tokenizer that it takes from another job."""
    wanted = [target for targets in links.targets for target in targets.values()]
    rows = await queries.jobs_by_id(session, wanted)
    found = []
    for targets in links.targets:
        target = next(iter(targets.values()), None)
        spec = specs.get(target or "")
        stored = rows[target].resolved.get("model") if target in rows else None
        found.append(spec.model if isinstance(spec, TokenizerSpec) else _sizes(stored))
    return found


def _sizes(stored: object) -> TokenizerConfig | None:
    """The model section of a stored tokenizer job; None for any other, or one of another release."""
    try:
        return _TOKENIZER.validate_python(stored)
    except ValidationError:
        return None


def _warnings(spec: AnySpec) -> list[str]:
    found = []
    tokenizer = spec.model.tokenizer if isinstance(spec, PretrainSpec) else None
    if tokenizer is not None and tokenizer.source == "fake":
        found.append(f"{spec.name}: the fake tokenizer knows nothing of images; it is for tests")
    return found
