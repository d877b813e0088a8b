"""Whether requests can be served, and which dispatchers do their part."""

from datetime import datetime
from typing import Literal

from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.base import Stored
from service.db import leases
from service.db.upgrade import SchemaError, check_schema
from service.errors import ServiceError


class NotReadyError(ServiceError):
    """The database is not at the schema that this version needs."""

    code, status, title = "not_ready", 503, "Not ready"


class LeaseView(Stored):
    """A task of the dispatchers, and the one that does it."""

    name: str
    owner: str  # host:process id:random part, as in its log
    token: int  # how many have had the lease so far
    expires_at: datetime  # by the database's clock, unless it is renewed


class Readiness(Stored):
    """The service can do its work."""

    status: Literal["ready"] = "ready"
    revision: str  # of the database's schema
    leases: list[LeaseView]  # empty where no dispatcher is alive


async def readiness(session: AsyncSession) -> Readiness:
    """The database's revision and who holds its leases; NotReadyError where it is not at our revision."""
    try:
        revision = await check_schema(session)
    except SchemaError as error:
        raise NotReadyError(str(error)) from error
    held = [LeaseView.model_validate(row, from_attributes=True) for row in await leases.held(session)]
    return Readiness(revision=revision, leases=held)
