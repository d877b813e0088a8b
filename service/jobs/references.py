"""Which job is meant: in an address of the API, and in `job:` references between specs."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.jobs import FINAL, JobState
from service.contracts.parsing import AnySpec, place
from service.contracts.problems import FieldProblem
from service.contracts.specs import EvaluateSpec, PretrainSpec
from service.db import queries
from service.db.failures import is_outage
from service.db.tables import JobRow
from service.domain.names import JOB_ID_LENGTH
from service.errors import AmbiguousError, DamagedJobError, NotFoundError

_SCHEME = "job:"
_HEX = re.compile(r"[0-9a-f]+")
_MOST_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Wish:
    """A key of a spec that may name a job, and the kind that this job must have."""

    path: str
    value: str
    kind: str


@dataclass(frozen=True, kw_only=True)
class Links:
    """The jobs that the specs of one request name."""

    targets: list[dict[str, str]] = field(default_factory=list)  # for each spec: path -> job id
    problems: list[FieldProblem] = field(default_factory=list)


async def find(session: AsyncSession, ref: str) -> JobRow:
    """The job of that id, name (the latest one), or unique prefix of an id.

    Raises:
        NotFoundError, AmbiguousError: no job fits, or several do.
        DamagedJobError: its row cannot be read.
    """
    job_id = await find_id(session, ref)
    try:
        row = await queries.job(session, job_id)
    except Exception as error:
        if is_outage(error):
            raise
        told = f"the stored record of job {job_id} is damaged: {type(error).__name__}: {error}"
        raise DamagedJobError(
            f"{told}; `cim show` tells what can be read of it, `cim cancel` ends it"
        ) from error
    assert row is not None, "jobs are never deleted"
    return row


async def find_or_id(session: AsyncSession, ref: str) -> JobRow | str:
    """The job, or its id alone where its row cannot be read."""
    try:
        return await find(session, ref)
    except DamagedJobError:
        return await find_id(session, ref)


async def find_id(session: AsyncSession, ref: str) -> str:
    """The id of the job that `find` means; nothing else of it is read. Raises as `find` does."""
    is_hex = _HEX.fullmatch(ref) is not None
    if is_hex and len(ref) == JOB_ID_LENGTH and await queries.exists(session, ref):
        return ref
    if (job_id := await queries.latest_named(session, ref)) is not None:
        return job_id
    fits = await queries.jobs_starting_with(session, ref, limit=_MOST_SHOWN) if is_hex else []
    if not fits:
        raise NotFoundError(f"no job has the id or name {ref!r}, and no id begins with it")
    if len(fits) > 1:
        shown = ", ".join(f"{job_id} ({name})" for job_id, name in fits)
        raise AmbiguousError(f"{ref!r} is the beginning of several ids: {shown}; give more of it")
    return fits[0][0]


def wish_of(spec: AnySpec) -> Wish | None:
    """Where this spec may name a job."""
    if isinstance(spec, PretrainSpec) and spec.model.tokenizer is not None:
        return Wish(path="model.tokenizer.source", value=spec.model.tokenizer.source, kind="tokenizer")
    if isinstance(spec, EvaluateSpec):
        return Wish(path="encoder", value=spec.encoder, kind="pretrain")
    return None


async def link(session: AsyncSession, specs: Sequence[AnySpec], ids: Sequence[str]) -> Links:
    """Find the job behind each reference: among the specs themselves (`ids` are theirs) first."""
    links = Links()
    for number, spec in enumerate(specs):
        wish = wish_of(spec)
        targets: dict[str, str] = {}
        if wish is not None and wish.value.startswith(_SCHEME):
            ref = wish.value.removeprefix(_SCHEME)
            beside = {other.name: n for n, other in enumerate(specs) if n != number}
            if ref in beside:
                job_id, fault = ids[beside[ref]], _kind_fault(wish, specs[beside[ref]].kind, ref)
            else:
                job_id, fault = await _stored(session, wish, ref)
            if fault:
                path = place(number, len(specs)) + wish.path
                links.problems.append(FieldProblem(path=path, message=fault, value=wish.value))
            targets[wish.path] = job_id
        links.targets.append(targets)
    return links


def duplicates(specs: Sequence[AnySpec]) -> list[FieldProblem]:
    """Names that two specs of one request share: a reference to them would mean either."""
    first: dict[str, int] = {}
    problems = []
    for number, spec in enumerate(specs):
        if first.setdefault(spec.name, number) != number:
            told = f"must differ within one request, got {spec.name!r} as in document {first[spec.name]}"
            problems.append(FieldProblem(path=f"[{number}].name", message=told, value=spec.name))
    return problems


def replaced(document: Mapping[str, object], targets: Mapping[str, str]) -> dict[str, object]:
    """The resolved document with `job:ID` in the place of `job:NAME`."""
    copy = dict(document)
    for path, job_id in targets.items():
        key, _, rest = path.partition(".")
        inner = copy[key]
        if rest:
            assert isinstance(inner, dict)
            copy[key] = replaced(inner, {rest: job_id})
        else:
            copy[key] = f"{_SCHEME}{job_id}"
    return copy


async def _stored(session: AsyncSession, wish: Wish, ref: str) -> tuple[str, str]:
    """The id of a job that is there already, and what speaks against it."""
    if not ref:
        return "", f"must name a job, as in {_SCHEME}my-{wish.kind}, got {wish.value!r}"
    try:
        row = await find(session, ref)
    except (NotFoundError, AmbiguousError, DamagedJobError) as error:
        return "", f"{error}; `cim ls --kind {wish.kind}` shows what there is"
    fault = _kind_fault(wish, row.kind, ref)
    if not fault and row.state in FINAL and row.state is not JobState.SUCCEEDED:
        why = f" ({row.reason})" if row.reason else ""
        fault = f"job {row.id} ({row.name}) has {row.state}{why}; submit it again and name the new one"
        fault = fault.replace("has cancelled", "was cancelled")
    return row.id, fault


def _kind_fault(wish: Wish, kind: str, ref: str) -> str:
    if kind == wish.kind:
        return ""
    return f"must name a job of kind {wish.kind}, but {ref!r} is of kind {kind}"
