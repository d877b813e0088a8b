"""From any exception to the reason that the service stores, and to the exit code of the process.

Only text crosses from a rank to the driver: many exceptions, ours among them, do not survive
pickling, and a user needs one sentence, not a traceback. The traceback goes to the log.
"""

import errno
from collections.abc import Iterable, Iterator, Mapping
from enum import IntEnum

import ray.exceptions
import torch
from ray.train import ControllerError, PreemptionError, WorkerGroupError

from cim_core.errors import (
    ONE_VALUE,
    CheckpointMismatchError,
    ConfigError,
    DataError,
    ModelError,
    NonFiniteError,
)
from service.client.errors import BrokenManifestError, StaleAttempt
from service.contracts.jobs import FailureKind
from service.contracts.printable import printable
from service.contracts.work import Failure
from service.store.base import CorruptObjectError, MissingObjectError, StoreError, StoreFullError
from workers.downloads import SourceAwayError
from workers.logs import blotted

MAX_MESSAGE = 4_000
_STORE_ERRORS = (StoreError, MissingObjectError, CorruptObjectError, BrokenManifestError)
_NO_MEMORY = "can't allocate memory"  # how torch's allocator for CPUs says so, in a RuntimeError
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})


class ExitCode(IntEnum):
    """How the process ends; Ray shows it as the driver's exit code."""

    DONE = 0  # succeeded, or stopped as asked
    USAGE = 2
    USER = 10
    INFRASTRUCTURE = 11
    STORAGE = 12
    PREEMPTED = 13
    STALE = 14
    TERMINATED = 143


EXIT_CODES: Mapping[FailureKind, ExitCode] = {
    FailureKind.USER: ExitCode.USER,
    FailureKind.INFRASTRUCTURE: ExitCode.INFRASTRUCTURE,
    FailureKind.STORAGE: ExitCode.STORAGE,
    FailureKind.PREEMPTED: ExitCode.PREEMPTED,
    FailureKind.STALLED: ExitCode.INFRASTRUCTURE,
}


class SpecError(ValueError):
    """The stored spec breaks a rule of this release, which another release may not have had."""


USER_ERRORS = (ConfigError, DataError, ModelError, NonFiniteError, CheckpointMismatchError, SpecError)

# One rank's death makes the others fail too, with errors that say nothing: the first kind wins.
_TELLING = (FailureKind.USER, FailureKind.STORAGE, FailureKind.PREEMPTED, FailureKind.INFRASTRUCTURE)


class AttemptStaleError(Exception):
    """A newer attempt owns the job, or the job is final: write nothing more, finish nothing."""


class ServiceAwayError(Exception):
    """The service has not answered for so long that this attempt cannot count on being wanted."""


class AttemptFailedError(Exception):
    """A rank failed and has said why; carries plain values alone, so that it survives pickling."""

    def __init__(self, kind: str, message: str, step: int) -> None:
        super().__init__(kind, message, step)
        self.kind, self.message, self.step = FailureKind(kind), message, step

    def __str__(self) -> str:
        return self.message


def portable(error: BaseException, *, store_url: str, step: int, secrets: Iterable[str] = ()) -> Exception:
    """`error`, which happened after `step` steps, as an exception that can travel to the driver."""
    if is_stale(error):
        return AttemptStaleError(str(error))
    failure = classify(error, store_url=store_url, secrets=secrets)
    return AttemptFailedError(failure.kind.value, failure.message, step)


def last_step(error: BaseException, *, default: int) -> int:
    """How far the ranks say they came; `default` when none could say."""
    return max([default, *(cause.step for cause in causes(error) if isinstance(cause, AttemptFailedError))])


def is_stale(error: BaseException) -> bool:
    """Whether the attempt was told that it may no longer write."""
    return any(isinstance(cause, AttemptStaleError | StaleAttempt) for cause in causes(error))


def classify(error: BaseException, *, store_url: str, secrets: Iterable[str] = ()) -> Failure:
    """Why the attempt failed, in one sentence that says what to change where the user can.

    Errors of libraries repeat what they were given, so `secrets` are blotted out.
    """
    found = [_classify_one(cause, store_url=store_url) for cause in causes(error)]
    first = min(found, key=lambda item: _TELLING.index(item[0]))
    return Failure(kind=first[0], message=printable(blotted(first[1], secrets))[:MAX_MESSAGE])


def causes(error: BaseException) -> Iterator[BaseException]:
    """The errors inside Ray's wrappers, at least one."""
    inner: list[BaseException] = []
    match error:
        case WorkerGroupError():
            inner = [error.worker_failures[rank] for rank in sorted(error.worker_failures)]
        case ControllerError():
            inner = [error.controller_failure]
        case ray.exceptions.RayTaskError():
            inner = [error.cause]
    # These two wrappers are private to Ray, so they are known by what they carry.
    for name in ("_base_exc", "health_check_failure"):
        carried = getattr(error, name, None)
        if isinstance(carried, BaseException):
            inner = [carried]
    if not inner:
        yield error
    for cause in inner:
        yield from causes(cause)


def _classify_one(error: BaseException, *, store_url: str) -> tuple[FailureKind, str]:
    if isinstance(error, AttemptFailedError):
        return error.kind, error.message
    if isinstance(error, USER_ERRORS):
        return FailureKind.USER, _sentence(error)
    if lesson := _lesson_of(error):
        return FailureKind.USER, lesson
    return _classify_outside(error, store_url=store_url)


def _sentence(error: BaseException) -> str:
    """What an error of ours says; before that of a loader's process, torch puts its traceback."""
    name = f"{type(error).__module__}.{type(error).__qualname__}: "
    return str(error).partition(f"\n{name}")[2].strip() or str(error)


def _lesson_of(error: BaseException) -> str:
    """What a user can change about an error that is none of ours; empty where that is not known."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU ran out of memory: lower training.batch_size (batch_size of an evaluation), raise "
            "training.accumulation, or lower model.image_size"
        )
    if isinstance(error, MemoryError | ray.exceptions.OutOfMemoryError) or _killed_for_memory(error):
        return (
            "a worker's node ran out of memory: lower training.loader_workers, training.batch_size or "
            "resources.workers"
        )
    if isinstance(error, RuntimeError) and _NO_MEMORY in str(error):
        return (
            "a worker's node does not have the memory that was asked for: lower training.batch_size, "
            f"model.image_size or the sizes of the networks ({_first_line(error)})"
        )
    if isinstance(error, ValueError) and ONE_VALUE in str(error):
        return (
            "a batch norm of the encoder sees one value a channel: a forward pass holds one image, whose map "
            "has one position there. Raise training.batch_size or model.image_size, lower resources.workers "
            f"or training.accumulation, or give a CNN output_stride in model.enhancer.options ({error})"
        )
    return ""


def _classify_outside(error: BaseException, *, store_url: str) -> tuple[FailureKind, str]:
    full = isinstance(error, OSError) and error.errno in NO_SPACE
    if full or isinstance(error, StoreFullError):
        return FailureKind.USER, (
            f"no space is left for the artifacts in {store_url}: free some there (old jobs' checkpoints are "
            f"the largest files) or move the store, then submit again ({error})"
        )
    if isinstance(error, _STORE_ERRORS):
        return FailureKind.STORAGE, f"the object store {store_url} failed: {error}"
    if isinstance(error, SourceAwayError):
        return FailureKind.INFRASTRUCTURE, str(error)
    if isinstance(error, PreemptionError) or getattr(error, "preempted", False):
        return FailureKind.PREEMPTED, f"the cluster took a worker's node back: {error}"
    if isinstance(error, ray.exceptions.RayActorError):
        return FailureKind.INFRASTRUCTURE, f"a worker process died: {_first_line(error)}"
    return FailureKind.INFRASTRUCTURE, f"{type(error).__name__}: {error}"


def _killed_for_memory(error: BaseException) -> bool:
    # Ray reports an actor that its memory monitor killed by the text of the death cause alone.
    return isinstance(error, ray.exceptions.RayActorError) and "running low on memory" in str(error)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:1] + [line for line in lines[1:] if "exit" in line.lower()][:1])
