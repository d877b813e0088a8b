"""Every setting of the service, read from the environment (`CIM_...`) by the entry point alone.

Embedded mode (`cim up`) fills the addresses in by itself; the other entry points need them given.
`.env.example` lists the same names with their meanings; a test compares the two.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.contracts.allowed import prefixes_in
from service.domain import loopback
from service.domain.retry import Backoff

Seconds = Annotated[float, Field(gt=0)]
Kind = TypeVar("Kind", bound="Storage")
Port = Annotated[int, Field(ge=0, le=65535)]  # 0: any free one


class Storage(BaseSettings):
    """Where rows and objects lie, and how long what nothing names is left alone."""

    model_config = SettingsConfigDict(env_prefix="CIM_", frozen=True, extra="ignore")

    database_url: str = Field(repr=False)  # sqlite+aiosqlite:///PATH or postgresql+psycopg://...
    store_url: str  # /absolute/folder or s3://bucket/prefix; credentials come from AWS_... variables
    s3_endpoint_url: str | None = None
    s3_region: str | None = None
    garbage_after_s: Seconds = 3600.0  # from the end of an attempt until its leftovers may go


class Settings(Storage):
    """One frozen object, built in `service.__main__` and passed down."""

    data_dir: Path = Path(".cim")
    allowed_storage: str = ""  # prefixes of addresses in specs, comma-separated, besides the own store
    shared_filesystem: bool = False  # workers see this machine's folders, so paths are checked at submit

    ray_url: str  # address of Ray's dashboard, e.g. http://127.0.0.1:8265
    ray_token: SecretStr | None = None  # None: the cluster runs with RAY_AUTH_MODE=disabled
    mlflow_url: str | None = None  # None: nothing is recorded in MLflow
    mlflow_public_url: str | None = None  # as a browser reaches it; None: the same as mlflow_url
    mlflow_experiment: str = "cim"

    host: str = "127.0.0.1"  # loopback alone, see service.domain.loopback
    port: Port = 8000
    public_url: str  # of the api, as the workers reach it
    secret: SecretStr = Field(min_length=32)  # claim codes are derived from it; no default

    worker_python: str = "python"  # interpreter of the workers, inside the cluster
    max_active_jobs: int = Field(default=16, ge=1)  # a Ray job costs the head 75 to 140 MB
    reconcile_every_s: Seconds = 0.8  # a place that becomes free is given away within a second
    forward_every_s: Seconds = 1.0  # metrics and pictures to MLflow
    garbage_every_s: Seconds = 60.0  # checkpoints beyond the retention take room until the next pass
    lease_s: Seconds = 8.0  # from the death of a dispatcher until another one takes its tasks over
    start_deadline_s: Seconds = 600.0  # from launch to the worker's first report
    stall_after_s: Seconds = 600.0  # without a report; and of a stop while Ray does not answer
    stop_grace_s: Seconds = 20.0  # from the beginning of a stop until Ray is asked to end the job
    lost_grace_s: Seconds = 5.0  # from Ray's word that a job ended until we call its attempt failed
    retry_first_s: Seconds = 5.0
    retry_longest_s: Seconds = 300.0

    @field_validator("host")
    @classmethod
    def _loopback(cls, value: str) -> str:
        if told := loopback.fault(value):
            raise ValueError(told)
        return value

    @field_validator("allowed_storage")
    @classmethod
    def _prefixes(cls, value: str) -> str:
        prefixes_in(value)
        return value

    @property
    def backoff(self) -> Backoff:
        """How long failed attempts wait for the next one."""
        return Backoff(first_s=self.retry_first_s, longest_s=self.retry_longest_s)

    @property
    def mlflow_browser_url(self) -> str | None:
        """MLflow as a browser reaches it."""
        return self.mlflow_public_url or self.mlflow_url


class SettingsError(Exception):
    """Settings are missing or malformed; the message has a line for each and repeats no secret."""


def from_environment() -> Settings:
    """The settings of this process. Raises SettingsError."""
    return _read(Settings)


def storage_from_environment() -> Storage:
    """The part of the settings that says where rows and objects lie. Raises SettingsError."""
    return _read(Storage)


def check_environment() -> None:
    """Judge what embedded mode leaves to the environment, before it starts anything. Raises SettingsError."""
    filled_in = {"database_url": "", "store_url": "/", "ray_url": "", "public_url": "", "secret": "-" * 32}
    _read(Settings, **filled_in)


def _read(kind: Callable[..., Kind], **filled_in: str) -> Kind:
    try:
        return kind(**filled_in)  # each other argument is read from the environment
    except ValidationError as error:
        raise SettingsError("\n".join(_lines(error))) from None


def _lines(error: ValidationError) -> Iterator[str]:
    # Pydantic's own text repeats what was given, which may be a password in an address.
    for detail in error.errors(include_url=False, include_input=False):
        name = f"CIM_{'_'.join(str(part) for part in detail['loc']).upper()}"
        told = detail["msg"].removeprefix("Value error, ")
        yield f"{name}: {'is required' if detail['type'] == 'missing' else told}"
