import errno
import pickle
from collections.abc import Callable

import pytest
import ray.exceptions
import torch
from ray.train import ControllerError, WorkerGroupError
from torch._utils import ExceptionWrapper

from cim_core.errors import ConfigError, DataError, NonFiniteError
from service.client.errors import ApiError, StaleAttempt, api_error
from service.contracts.jobs import FailureKind
from service.contracts.problems import Problem
from service.store.base import CorruptObjectError, StoreError, StoreFullError
from tests.fakes.work_client import STALE
from workers.failures import (
    EXIT_CODES,
    AttemptFailedError,
    AttemptStaleError,
    classify,
    is_stale,
    last_step,
    portable,
)

URL = "/store"


class HealthCheckFailedError(Exception):
    """Carries its cause as Ray Train's private wrapper does."""

    def __init__(self, failure: Exception) -> None:
        super().__init__("a health check failed")
        self.health_check_failure = failure


def refused(code: str, detail: str) -> ApiError:
    return api_error(Problem(title="", status=409, code=code, detail=detail))


def group(*errors: Exception) -> WorkerGroupError:
    return WorkerGroupError("ranks failed", dict(enumerate(errors)))


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (DataError("data.uri: nothing there"), FailureKind.USER, "data.uri: nothing there"),
        (ConfigError([("depth", "must be 1")]), FailureKind.USER, "depth: must be 1"),
        (NonFiniteError("step 3: the loss is not finite"), FailureKind.USER, "step 3"),
        (torch.OutOfMemoryError("CUDA out of memory"), FailureKind.USER, "training.batch_size"),
        (MemoryError(), FailureKind.USER, "resources.workers"),
        (StoreFullError("no room"), FailureKind.USER, "no space is left for the artifacts in /store"),
        (OSError(errno.ENOSPC, "No space left"), FailureKind.USER, "no space is left"),
        (StoreError("refused"), FailureKind.STORAGE, "refused"),
        (CorruptObjectError("differs"), FailureKind.STORAGE, "differs"),
        (refused("broken_manifest", "encoder/x differs"), FailureKind.STORAGE, "encoder/x differs"),
        (refused("attempt_claimed", "another one has it"), FailureKind.INFRASTRUCTURE, "another one"),
        (OSError(errno.EIO, "broken disk"), FailureKind.INFRASTRUCTURE, "OSError"),
        (RuntimeError("what is this"), FailureKind.INFRASTRUCTURE, "RuntimeError: what is this"),
    ],
)
def test_classify__kind_and_sentence(error: Exception, kind: FailureKind, words: str) -> None:
    failure = classify(error, store_url=URL)
    assert failure.kind is kind
    assert words in failure.message


def raised_by(action: Callable[[], object]) -> Exception:
    with pytest.raises((ValueError, RuntimeError)) as caught:
        action()
    return caught.value


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: torch.nn.BatchNorm2d(4)(torch.zeros(1, 4, 1, 1)), "Raise training.batch_size"),
        (lambda: torch.empty(2**60), "lower training.batch_size, model.image_size"),
    ],
    ids=["batch norm of one value", "more memory than there is"],
)
def test_classify__what_torch_says_of_a_users_numbers(action: Callable[[], object], words: str) -> None:
    failure = classify(group(raised_by(action)), store_url=URL)
    assert failure.kind is FailureKind.USER
    assert words in failure.message


def test_classify__a_loaders_process_says_one_sentence_and_no_traceback() -> None:
    def fail() -> None:
        try:
            raise DataError("a.png cannot be read: Error: gone; put it back")
        except DataError:
            carried = ExceptionWrapper(where="in a process")  # type: ignore[no-untyped-call]
        carried.reraise()  # type: ignore[no-untyped-call]

    failure = classify(raised_by(fail), store_url=URL)
    assert failure.kind is FailureKind.USER
    assert failure.message == "a.png cannot be read: Error: gone; put it back"


def test_classify__a_killed_rank_is_infrastructure() -> None:
    died = ray.exceptions.ActorDiedError()
    failure = classify(group(HealthCheckFailedError(died)), store_url=URL)
    assert failure.kind is FailureKind.INFRASTRUCTURE
    assert "a worker process died" in failure.message


def test_classify__a_preempted_node_is_told_apart_from_a_dead_process() -> None:
    taken = ray.exceptions.RayActorError(preempted=True)
    failure = classify(group(RuntimeError("connection closed by peer"), taken), store_url=URL)
    assert failure.kind is FailureKind.PREEMPTED


def test_classify__the_rank_that_knows_why_speaks_for_those_that_do_not() -> None:
    told = AttemptFailedError("user", "data.uri: gone", 7)
    failure = classify(group(RuntimeError("connection closed by peer"), told), store_url=URL)
    assert (failure.kind, failure.message) == (FailureKind.USER, "data.uri: gone")


def test_classify__looks_inside_controller_errors() -> None:
    failure = classify(ControllerError(StoreError("refused")), store_url=URL)
    assert failure.kind is FailureKind.STORAGE


def test_classify__a_kill_for_memory_is_the_users_to_change() -> None:
    killed = ray.exceptions.RayActorError(
        error_msg="1 worker(s) were killed due to the node running low on memory."
    )
    assert classify(group(killed), store_url=URL).kind is FailureKind.USER


def test_portable__survives_pickling_which_the_original_does_not() -> None:
    original = ConfigError([("depth", "must be 1")])
    with pytest.raises(ValueError, match="unpack"):
        pickle.loads(pickle.dumps(original))
    travelled = pickle.loads(pickle.dumps(portable(original, store_url=URL, step=7)))
    assert isinstance(travelled, AttemptFailedError)
    assert (travelled.kind, travelled.message, travelled.step) == (FailureKind.USER, "depth: must be 1", 7)


def test_portable__a_stale_attempt_stays_stale_in_the_driver() -> None:
    travelled = pickle.loads(pickle.dumps(portable(StaleAttempt(STALE), store_url=URL, step=1)))
    assert isinstance(travelled, AttemptStaleError)
    assert is_stale(group(RuntimeError("connection closed"), travelled))
    assert not is_stale(group(RuntimeError("connection closed")))


def test_last_step__is_what_the_ranks_say() -> None:
    assert last_step(group(RuntimeError(), AttemptFailedError("user", "", 40)), default=20) == 40
    assert last_step(RuntimeError(), default=20) == 20


def test_exit_codes__every_kind_has_one_and_none_is_success() -> None:
    assert set(EXIT_CODES) == set(FailureKind)
    assert 0 not in EXIT_CODES.values()
