"""What one worker process is told: read once, in the entry point, and passed down."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from service.contracts.tokens import new_token

# Ray Train's defaults suit notebooks: a hanging worker is noticed after ten minutes, prints come
# twice, and workers change into the storage folder, which breaks relative paths.
TRAIN_ENVIRONMENT: Mapping[str, str] = {
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN")


class UsageError(ValueError):
    """The process was started without something it needs; the message names it."""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """Address, identity and secret of one attempt."""

    url: str  # the service, e.g. http://127.0.0.1:8000
    job_id: str
    attempt: int
    code: str = field(repr=False)  # claims the attempt, once
    token: str = field(default_factory=new_token, repr=False)  # speaks for the attempt once it has claimed it
    ray_address: str | None = None  # of the cluster that runs this job
    cache_dir: Path = field(default_factory=lambda: default_cache())

    @classmethod
    def read(cls, url: str, attempt: str, environ: Mapping[str, str]) -> Self:
        """Settings from the command line (`attempt` is JOB_ID/N) and the environment.

        Raises:
            UsageError: a part is missing or malformed.
        """
        job_id, _, number = attempt.partition("/")
        if not job_id or not number.isdecimal() or int(number) < 1:
            raise UsageError(f"--attempt must be JOB_ID/N with N from 1, got {attempt!r}")
        code = environ.get("CIM_CLAIM_CODE", "")
        if not code:
            raise UsageError("CIM_CLAIM_CODE is not set: the service sets it when it starts a worker")
        address = environ.get("RAY_ADDRESS") or None
        return cls(url=url, job_id=job_id, attempt=int(number), code=code, ray_address=address)


def secrets_of(settings: WorkerSettings) -> list[str]:
    """What this process knows and must not say: the attempt's secrets, and the credentials around it."""
    around = [os.environ.get(name, "") for name in CREDENTIALS]
    # Anything shorter is a word of a test server, and would be blotted out of every other sentence.
    return [settings.token, settings.code, *(value for value in around if len(value) >= 12)]


def apply_train_environment() -> None:
    """Set Ray Train's switches for this process and the workers it starts; a given value stays."""
    for name, value in TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def default_cache() -> Path:
    """A folder of this node and this user for downloads; it may vanish between attempts."""
    return Path(tempfile.gettempdir()) / f"cim-cache-{os.getuid()}"
