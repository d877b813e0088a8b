"""Change a job's name, priority or labels; the spec stays what was submitted."""

from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncSession

from service.contracts.addresses import redacted, secrets_in, without_secrets
from service.contracts.changes import JobChange
from service.db import moves
from service.db.tables import JobRow
from service.errors import InvalidSpecError
from service.jobs.references import find


async def change(session: AsyncSession, ref: str, wanted: JobChange, *, now: datetime) -> JobRow:
    """Write what differs, with an event that says what it was before.

    Raises:
        InvalidSpecError: a secret stands in the name or in a label.
    """
    new = wanted.model_dump(exclude_none=True)
    if problems := [without_secrets(problem) for problem in secrets_in(new)]:
        raise InvalidSpecError(problems)
    row = await find(session, ref)
    told = [
        f"{key}: {getattr(row, key)} -> {value}" for key, value in new.items() if getattr(row, key) != value
    ]
    if told:
        for key, value in new.items():
            setattr(row, key, value)
        row.updated_at = now
        # An earlier release may have taken what this one would refuse.
        moves.note(session, row.id, actor="user", message=redacted("; ".join(told)), now=now)
        await session.flush()
    return row
