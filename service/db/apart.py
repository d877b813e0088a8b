"""Reads many rows at once, and tells apart those that cannot be read."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from service.db.engine import Sessions, only_reads
from service.db.failures import is_outage

_AT_ONCE = 1000  # a statement cannot name any number of them

Key = TypeVar("Key")
Found = TypeVar("Found")
Read = Callable[[AsyncSession, Sequence[Key]], Awaitable[Sequence[Found]]]


async def read_apart(
    sessions: Sessions, keys: Sequence[Key], read: Read[Key, Found]
) -> tuple[list[Found], dict[Key, Exception]]:
    """What `read` finds for all keys, in their order, and why it finds nothing for some.

    Where a portion fails it is halved, so one row that cannot be read costs a few statements and hides
    none of the others. Raises what `service.db.failures.is_outage` takes for one.
    """
    found: list[Found] = []
    faults: dict[Key, Exception] = {}
    todo = [keys[first : first + _AT_ONCE] for first in range(0, len(keys), _AT_ONCE)][::-1]
    while todo:
        some = todo.pop()
        try:
            async with sessions.begin() as session:
                await only_reads(session)
                found += await read(session, some)
        except Exception as error:
            if is_outage(error):
                raise
            if len(some) == 1:
                faults[some[0]] = error
            else:
                middle = len(some) // 2
                todo += [some[middle:], some[:middle]]
    return found, faults
