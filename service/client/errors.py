"""What can go wrong between a client and the service."""

from service.contracts.problems import Problem

STALE = "stale_attempt"
BROKEN_MANIFEST = "broken_manifest"
BAD_ANSWER = "bad_answer"
UNREACHABLE = "unreachable"


class ApiError(Exception):
    """A call failed: the service answered with an error, or did not answer at all.

    Attributes:
        problem: The RFC 9457 body; `problem.errors` names each wrong key of a spec.
        code: Stable name of the error, e.g. `invalid_spec`.
        status: HTTP status; 0 when there was no answer.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(_text(problem))
        self.problem = problem
        self.code = problem.code
        self.status = problem.status


class UnreachableError(ApiError):
    """Nothing answers at the service's address, or the connection broke (code `unreachable`)."""

    def __init__(self, message: str) -> None:
        super().__init__(Problem(title="No answer", status=0, code=UNREACHABLE, detail=message))


class RefusedError(UnreachableError):
    """No program listens at the service's address."""


class CorruptDownloadError(Exception):
    """A downloaded file is not what the service's manifest says; it was deleted again."""


class StaleAttempt(ApiError):  # noqa: N818  it tells a worker to stop and is no fault
    """A newer attempt owns the job, or the job is final: write nothing more and end."""


class BrokenManifestError(ApiError):
    """The service did not find in the object store what a manifest says, or a success is not complete."""


_CLASSES: dict[str, type[ApiError]] = {STALE: StaleAttempt, BROKEN_MANIFEST: BrokenManifestError}


def api_error(problem: Problem) -> ApiError:
    """The exception for an error answer."""
    return _CLASSES.get(problem.code, ApiError)(problem)


def _text(problem: Problem) -> str:
    lines = [f"{error.path}: {error.message}" for error in problem.errors]
    return "\n".join(lines) or problem.detail or problem.title
