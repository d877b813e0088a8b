"""What routes are given: the transaction, the clock, the store, the proof of an attempt."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.allowed import Allowed, allowed_by, prefixes_in
from service.contracts.tokens import code_fits
from service.contracts.work import StoreAddress
from service.db.engine import Sessions, only_reads
from service.errors import UnauthorisedError
from service.jobs import artifacts, claim, references
from service.jobs.costs import Costs
from service.jobs.looks import Looks
from service.settings import Settings
from service.store.base import ObjectStore

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """This moment."""
    return datetime.now(UTC)


@dataclass(frozen=True, kw_only=True)
class Services:
    """Everything that outlives a request; kept in `app.state.services`."""

    settings: Settings
    sessions: Sessions
    store: ObjectStore
    costs: Costs
    looks: Looks
    clock: Clock = utc_now
    poll_s: float = 0.5  # between two looks of a stream that follows
    dispatches: bool = False  # this process is a dispatcher too

    @property
    def store_address(self) -> StoreAddress:
        """The object store as workers find it."""
        settings = self.settings
        return StoreAddress(
            url=settings.store_url, endpoint_url=settings.s3_endpoint_url, region=settings.s3_region
        )

    @property
    def allowed(self) -> Allowed:
        """Where the addresses of a spec may lead."""
        settings = self.settings
        return allowed_by(prefixes_in(settings.allowed_storage), store_url=settings.store_url)


def services_of(request: Request) -> Services:
    """The services that the app was composed of."""
    services: Services = request.app.state.services
    return services


App = Annotated[Services, Depends(services_of)]


async def open_session(app: App) -> AsyncIterator[AsyncSession]:
    """One transaction a request: committed if the route returns, rolled back if it raises."""
    async with app.sessions.begin() as session:
        yield session


async def open_reading_session(app: App) -> AsyncIterator[AsyncSession]:
    """A transaction for a route that writes nothing."""
    async with app.sessions.begin() as session:
        await only_reads(session)
        yield session


# The scope makes the commit happen before the answer is sent: a 201 is never taken back.
Session = Annotated[AsyncSession, Depends(open_session, scope="function")]
ReadSession = Annotated[AsyncSession, Depends(open_reading_session, scope="function")]

Ref = Annotated[str, Path(description="A job's id, a unique beginning of it, or a name (the latest job).")]
Follow = Annotated[
    bool, Query(description="Stream server-sent events; the last one is named `end` once the job is final.")
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="The same key with the same specs returns the first jobs with 200.",
    ),
]
LastEventId = Annotated[str | None, Header(description="Go on after this event of a broken stream.")]

_token = HTTPBearer(
    auto_error=False,
    scheme_name="AttemptToken",
    description="The token that the attempt's worker made, and claimed the attempt with.",
)
_code = HTTPBearer(
    auto_error=False,
    scheme_name="ClaimCode",
    description="The code that the dispatcher starts the attempt's worker with; good for the claim alone.",
)


@dataclass(frozen=True, kw_only=True)
class AttemptRef:
    """An attempt whose token, or code, was shown."""

    job_id: str
    number: int


WholeId = Annotated[str, Path(description="The job's full id.")]
Number = Annotated[int, Path(ge=1, le=1_000_000)]
Shown = HTTPAuthorizationCredentials | None


def startable(
    app: App, job_id: WholeId, attempt: Number, shown: Annotated[Shown, Depends(_code)]
) -> AttemptRef:
    """The attempt in the address, if the request carries the code that its worker was started with."""
    secret = app.settings.secret.get_secret_value()
    code = shown.credentials if shown is not None else ""
    if not code_fits(code, secret=secret, job_id=job_id, attempt=attempt):
        raise UnauthorisedError("send `Authorization: Bearer CODE` with the code of this attempt")
    return AttemptRef(job_id=job_id, number=attempt)


async def claimed(
    app: App, job_id: WholeId, attempt: Number, shown: Annotated[Shown, Depends(_token)]
) -> AttemptRef:
    """The attempt in the address, if the request carries the token that it was claimed with."""
    token = shown.credentials if shown is not None else ""
    if not await claim.speaks_for(app.sessions, job_id, attempt, token):
        raise UnauthorisedError("send `Authorization: Bearer TOKEN` with the token that claimed this attempt")
    return AttemptRef(job_id=job_id, number=attempt)


StartableAttempt = Annotated[AttemptRef, Depends(startable)]
Attempt = Annotated[AttemptRef, Depends(claimed)]


async def find_job_id(app: App, ref: Ref) -> str:
    """The full id, in a transaction of its own: what follows may take long, and must hold none."""
    async with app.sessions.begin() as session:
        await only_reads(session)
        return await references.find_id(session, ref)


async def find_artifact(app: App, ref: Ref, path: str) -> artifacts.Artifact:
    """A file of a job, in a transaction of its own."""
    async with app.sessions.begin() as session:
        await only_reads(session)
        return await artifacts.artifact(session, ref, path)


JobId = Annotated[str, Depends(find_job_id)]
Artifact = Annotated[artifacts.Artifact, Depends(find_artifact)]
