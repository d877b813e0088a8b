"""Whether requests can be served."""

from typing import Literal

from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.base import Stored
from service.db.upgrade import newest_revision, present_revision
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
    present, newest = await present_revision(session), newest_revision()
    if present != newest:
        raise NotReadyError(
            f"the database is at revision {present}, this version needs {newest}; "
            "run `python -m service migrate`"
        )
    return Readiness(revision=newest)
