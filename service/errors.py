"""The service's errors. Each has a stable `code` and an HTTP status; one handler renders them."""

from service.contracts.problems import FieldProblem


class ServiceError(Exception):
    """Something the caller did, or must know, went wrong."""

    code = "internal"
    status = 500
    title = "Internal error"


class InvalidSpecError(ServiceError):
    """The spec breaks rules; every broken rule is in `errors`."""

    code, status, title = "invalid_spec", 422, "The spec is not valid"

    def __init__(self, errors: list[FieldProblem]) -> None:
        super().__init__("; ".join(f"{e.path}: {e.message}" for e in errors))
        self.errors = errors


class NotFoundError(ServiceError):
    """Nothing has that name or id."""

    code, status, title = "not_found", 404, "Not found"


class AmbiguousError(ServiceError):
    """A prefix fits several jobs."""

    code, status, title = "ambiguous", 409, "Several jobs fit"


class KeyReusedError(ServiceError):
    """An idempotency key came back with another spec."""

    code, status, title = "idempotency_key_reused", 409, "Idempotency key reused"


class IllegalMoveError(ServiceError):
    """A job cannot go from its state to the wanted one."""

    code, status, title = "illegal_move", 409, "Not possible in this state"


class StaleAttemptError(ServiceError):
    """A worker of an earlier attempt, or of a finished job, tried to write."""

    code, status, title = "stale_attempt", 409, "This attempt may no longer write"


class UnauthorisedError(ServiceError):
    """The attempt's token, or the code that claims it, is missing or wrong."""

    code, status, title = "unauthorised", 401, "Unauthorised"


class AttemptClaimedError(ServiceError):
    """A worker came with the code of an attempt that another one has claimed."""

    code, status, title = "attempt_claimed", 409, "Another worker has this attempt"


class BrokenManifestError(ServiceError):
    """A manifest names a file that the object store does not hold with that checksum, or lacks one."""

    code, status, title = "broken_manifest", 409, "A file of the manifest is missing or damaged"


class DamagedJobError(ServiceError):
    """The stored record of a job cannot be read, so nothing can be done with it but to end it."""

    code, status, title = "damaged_job", 409, "The stored record of the job is damaged"


class ConflictError(ServiceError):
    """The row moved while the request ran; repeating the request is safe."""

    code, status, title = "conflict", 409, "Changed meanwhile, try again"
