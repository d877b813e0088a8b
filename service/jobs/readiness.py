"""Whether requests can be served."""

from typing import Literal

from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.base import Stored
from service.db.upgrade import SchemaError, check_schema
from service.errors import ServiceError


class NotReadyError(ServiceError):
    """The database is not at the schema that this version needs."""

    code, status, title = "not_ready", 503, "Not ready"


class Readiness(Stored):
    """The service can do its work."""

    status: Literal["ready"] = "ready"
    revision: str  # of the database's schema


async def readiness(session: AsyncSession) -> Readiness:
    """The database's revision; NotReadyError where it is another one than ours."""
    try:
        return Readiness(revision=await check_schema(session))
    except SchemaError as error:
        raise NotReadyError(str(error)) from error
