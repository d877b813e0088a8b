"""One dispatcher at a time does a task: the one that holds the lease of its name. The others stand by."""

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Awaitable, Callable

from sqlalchemy.exc import SQLAlchemyError

from service.db import leases
from service.db.engine import Sessions, only_reads
from service.db.leases import Lease, LeaseLostError

logger = logging.getLogger(__name__)

# Given a lease, and an event that says when to end: when told to stop, or when the lease is lost.
Work = Callable[[Lease, asyncio.Event], Awaitable[None]]

_RENEWALS = 4  # within the time of a lease, so that it outlives a slow answer or two
_LOOKS = 8
_LONGEST_LOOK_S = 1.0  # a lease may be released long before its end
_FAREWELL_S = 2.0


def replica_name() -> str:
    """A name for this process that no other one has: process ids repeat from one container to the next."""
    return f"{socket.gethostname()[:200]}:{os.getpid()}:{secrets.token_hex(4)}"


class Leadership:
    """Runs the tasks of this process while it holds their leases."""

    def __init__(self, sessions: Sessions, *, owner: str, lease_s: float, stop: asyncio.Event) -> None:
        self._sessions, self._owner, self._lease_s, self._stop = sessions, owner, lease_s, stop

    async def lead(self, name: str, work: Work) -> None:
        """Do `work` each time that this process gets the lease `name`, until `stop` is set.

        Work that meets `LeaseLostError` is over; the wait for the lease begins again. Its other
        errors go to the caller. However it ends, the next holder need not wait for the lease's end.
        """
        seen: str | None = None
        away = False
        while not self._stop.is_set():
            try:
                lease, other = await self._try(name)
                away = False
            except (SQLAlchemyError, OSError) as error:
                if not away:  # once an outage
                    logger.warning("lease %s: the database cannot be asked: %s", name, first_line(error))
                lease, other, away = None, None, True
            if lease is not None:
                await self._serve(lease, work)
            elif other not in (None, seen):
                logger.info("lease %s is held by %s; standing by", name, other)
            seen = other
            if lease is None:
                await pause(self._stop, timeout_s=min(self._lease_s / _LOOKS, _LONGEST_LOOK_S))

    async def _try(self, name: str) -> tuple[Lease | None, str | None]:
        """The lease, or who holds it."""
        async with self._sessions.begin() as session:
            await only_reads(session)
            other = await leases.holder(session, name)
        if other is not None:
            return None, other
        async with self._sessions.begin() as session:
            return await leases.take(session, name, owner=self._owner, lasts_s=self._lease_s), None

    async def _serve(self, lease: Lease, work: Work) -> None:
        logger.info("lease %s is ours (%s, token %d)", lease.name, lease.owner, lease.token)
        over = asyncio.Event()
        helpers = [
            asyncio.create_task(self._renew(lease, over)),
            asyncio.create_task(_pass_on(self._stop, over)),
        ]
        try:
            await work(lease, over)
        except LeaseLostError as error:
            logger.warning("%s; what was under way is dropped", error)
        finally:
            over.set()
            await _end(helpers)
            await self._release(lease)

    async def _renew(self, lease: Lease, over: asyncio.Event) -> None:
        """Renew the lease until `over` is set, or set it because the lease is lost."""
        away = False
        while True:
            await pause(over, timeout_s=lease.lasts_s / _RENEWALS)
            if over.is_set():
                return
            try:
                async with self._sessions.begin() as session:
                    await leases.renew(session, lease)
                away = False
            except LeaseLostError as error:
                logger.warning("%s", error)
                over.set()
            except (SQLAlchemyError, OSError) as error:
                if not away:  # once an outage
                    logger.warning("lease %s could not be renewed: %s", lease.name, first_line(error))
                away = True

    async def _release(self, lease: Lease) -> None:
        """Leave without delay; where the database cannot be told, the lease ends by itself."""
        try:
            async with asyncio.timeout(_FAREWELL_S), self._sessions.begin() as session:
                await leases.release(session, lease)
        except (SQLAlchemyError, OSError) as error:  # a TimeoutError is an OSError
            logger.warning("lease %s could not be released: %s", lease.name, first_line(error))


async def pause(until: asyncio.Event, *, timeout_s: float) -> None:
    """Wait, but no longer than until the event is set."""
    try:
        async with asyncio.timeout(timeout_s):
            await until.wait()
    except TimeoutError:
        return


def first_line(error: Exception) -> str:
    """What an error says, without the statement and the links that follow."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


async def _pass_on(first: asyncio.Event, then: asyncio.Event) -> None:
    await first.wait()
    then.set()


async def _end(helpers: list[asyncio.Task[None]]) -> None:
    """End them; a renewal under way may come to its end, because a connection cut off in it is lost."""
    await asyncio.wait(helpers[:1], timeout=_FAREWELL_S)
    for helper in helpers:
        helper.cancel()
    await asyncio.gather(*helpers, return_exceptions=True)
