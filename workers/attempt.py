"""What one attempt is: its settings and assignment, and the work that every rank receives."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from cim_core.durations import Every, Plan
from service.contracts.allowed import Allowed
from service.contracts.jobs import FileEntry
from service.contracts.lessons import problems_of, unknown_kind
from service.contracts.problems import FieldProblem
from service.contracts.spec_keys import MODELS
from service.contracts.specs import EvaluateSpec, PretrainSpec, TokenizerSpec
from service.contracts.work import Assignment
from workers.cache import Cache
from workers.failures import SpecError
from workers.settings import WorkerSettings
from workers.spool import LOGS

AnySpec = TokenizerSpec | PretrainSpec | EvaluateSpec
_MOST_PROBLEMS = 20


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a job, as its processes know it."""

    settings: WorkerSettings
    assignment: Assignment
    spec: AnySpec

    @classmethod
    def of(cls, settings: WorkerSettings, assignment: Assignment) -> "Attempt":
        """The attempt of an assignment, its resolved spec parsed.

        The service keeps more beside the spec, such as an earlier attempt's plan; that is left out.
        Raises `SpecError` where the spec breaks a rule.
        """
        known = {name for kind in get_args(AnySpec) for name in kind.model_fields}
        spec = {key: value for key, value in assignment.spec.items() if key in known}
        return cls(settings=settings, assignment=assignment, spec=_parsed(spec))

    @property
    def cache(self) -> Path:
        """Downloads of this job on this node."""
        return self.settings.cache_dir / self.assignment.job_id

    @property
    def spool(self) -> Path:
        """Log lines of this attempt on this node; its siblings are those of earlier attempts."""
        return self.cache / LOGS / f"attempt-{self.assignment.attempt}"

    @property
    def image_sets(self) -> dict[str, str]:
        """The address of every set of images that the job reads, by its role."""
        spec = self.spec
        if isinstance(spec, EvaluateSpec):
            return {"train": spec.data.train, "val": spec.data.val}
        sets = {"data": spec.data.uri}
        if isinstance(spec, PretrainSpec) and spec.probe is not None:
            sets |= {"probe_train": spec.probe.train, "probe_val": spec.probe.val}
        return sets

    @property
    def downloads(self) -> Cache:
        """What fetches the job's inputs to this node, from where they may come."""
        return Cache(folder=self.cache, address=self.assignment.store, allowed=self.allowed)

    @property
    def allowed(self) -> Allowed:
        """Where addresses of the spec may lead."""
        return Allowed(prefixes=tuple(self.assignment.allowed))

    @property
    def run_name(self) -> str:
        """Ray Train's identity of the run. The same name would silently continue an old run."""
        return f"cim-{self.assignment.job_id}-{self.assignment.attempt}"

    @property
    def resume_step(self) -> int:
        """Completed steps that this attempt starts from."""
        checkpoint = self.assignment.checkpoint
        return checkpoint.step if checkpoint else 0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the driver has found out and hands to every rank."""

    attempt: Attempt
    # Role of an image set (data, train, val, ...) to its index as JSON. Not in the repr: Ray Train keeps that
    # of whatever a rank is handed, and shows it.
    indices: dict[str, str] = field(repr=False)
    plan: Plan | None  # None: nothing is trained
    tokenizer: str | None = None  # of source dall-e: key prefix of its folder in the object store
    files: list[FileEntry] = field(default_factory=list)  # stored so far


def _parsed(spec: Mapping[str, Any]) -> AnySpec:
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in MODELS:
        raise _refused([unknown_kind(spec)])
    try:
        return MODELS[kind].model_validate(spec)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise _refused([p for detail in details for p in problems_of(detail, spec, kind=kind)]) from None


def _refused(problems: Sequence[FieldProblem]) -> SpecError:
    lines = [f"{problem.path or 'spec'}: {problem.message}" for problem in problems[:_MOST_PROBLEMS]]
    told = (
        "the workers do not take this spec. Correct it and submit the spec again; where nothing is wrong "
        "with it, service and workers are of different versions:"
    )
    return SpecError("\n".join([told, *lines]))


def plan_document(resolved: Plan) -> dict[str, Any]:
    """The plan as a handful of plain values; periods are exact, in steps, such as "1000/3".

    It goes into the job's row with a report, so its size must not depend on the length of the training.
    """
    return {
        "total_steps": resolved.total_steps,
        "warmup_steps": resolved.warmup_steps,
        "checkpoint_period": _period(resolved.checkpoint_steps),
        "sample_period": _period(resolved.sample_steps),
        "batch_size": resolved.batch_size,
        "num_images": resolved.num_images,
    }


def _period(steps: Container[int]) -> str | None:
    return str(steps.period) if isinstance(steps, Every) else None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the ranks ended; rank 0's goes to the driver."""

    stopped: bool
    step: int
    total_steps: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # of a result that is there, but may disappoint
    files: list[FileEntry] = field(default_factory=list)
