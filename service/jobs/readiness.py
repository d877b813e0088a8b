"""Whether requests can be served, and whether the dispatchers do their part."""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.base import Stored
from service.db import leases
from service.db.upgrade import SchemaError, check_schema
from service.errors import ServiceError

STANDS_STILL_AFTER_S = 30.0  # a pass takes a second; two minutes where Ray hangs


class NotReadyError(ServiceError):
    """The database is not at the schema that this version needs, or nothing is dispatched."""

    code, status, title = "not_ready", 503, "Not ready"


@dataclass(frozen=True, kw_only=True)
class Standstill:
    """Nothing is dispatched, for anybody."""

    seconds: float | None  # since the last pass came to its end; None before the first
    reason: str

    def __str__(self) -> str:
        since = "not begun" if self.seconds is None else f"stood still for {self.seconds:.0f} s"
        return f"dispatching has {since}: {self.reason}"


class LeaseView(Stored):
    """A task of the dispatchers, and the one that does it."""

    name: str
    owner: str  # host:process id:random part, as in its log
    token: int  # how many have had the lease so far
    expires_at: datetime  # by the database's clock, unless it is renewed
    passed_at: datetime | None = None  # by the same clock: when a pass last came to its end
    doing: str = ""  # what the pass since then does, or why the last one failed


class Readiness(Stored):
    """The service can do its work."""

    status: Literal["ready"] = "ready"
    revision: str  # of the database's schema
    notice: str | None = None  # why nothing is dispatched, where that is so
    leases: list[LeaseView]  # empty where no dispatcher is alive


async def readiness(session: AsyncSession, *, dispatches: bool) -> Readiness:
    """The database's revision, and how the dispatchers do.

    Args:
        session: In a transaction.
        dispatches: This process is a dispatcher too, so that it is not ready while nothing is dispatched.
            An api alone is: users must be able to see why their jobs wait, and to cancel them.

    Raises:
        NotReadyError: the schema is another one, or see `dispatches`.
    """
    try:
        revision = await check_schema(session)
    except SchemaError as error:
        raise NotReadyError(str(error)) from error
    standing = await standstill(session)
    if standing is not None and dispatches:
        raise NotReadyError(str(standing))
    held = [LeaseView.model_validate(row, from_attributes=True) for row in await leases.held(session)]
    return Readiness(revision=revision, notice=str(standing) if standing else None, leases=held)


async def standstill(session: AsyncSession) -> Standstill | None:
    """Whether no pass over the jobs has come to its end for `STANDS_STILL_AFTER_S`, and why."""
    found = await leases.look(session, leases.RECONCILE)
    if found is None:
        return Standstill(seconds=None, reason="no dispatcher has run on this database yet")
    lease, now = found
    seconds = (now - (lease.passed_at or lease.expires_at)).total_seconds()
    if seconds < STANDS_STILL_AFTER_S:
        return None
    if lease.expires_at <= now:
        return Standstill(seconds=seconds, reason="no dispatcher is running")
    return Standstill(seconds=seconds, reason=lease.doing or "its passes do not come to an end")


async def notice(session: AsyncSession) -> str | None:
    """What to tell whoever looks at jobs that wait; None where dispatching goes on."""
    standing = await standstill(session)
    return None if standing is None else str(standing)
