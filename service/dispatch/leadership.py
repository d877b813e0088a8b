"""One dispatcher at a time does a task: the one that holds the lease of its name. The others stand by."""

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable

from sqlalchemy.exc import SQLAlchemyError

from service.db import leases
from service.db.engine import Sessions, only_reads
from service.db.leases import Lease, LeaseLostError

logger = logging.getLogger(__name__)


class Pulse:
    """How the passes of a task go; written into its lease, for whoever asks why nothing goes on."""

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.doing = ""  # by the pass under way
        self.news = asyncio.Event()  # to be written down at once
        self._monotonic = monotonic
        self._failure = ""
        self._passed_at: float | None = None

    @property
    def passed_s_ago(self) -> float | None:
        """Seconds since a pass came to its end; None before the first."""
        return None if self._passed_at is None else self._monotonic() - self._passed_at

    @property
    def text(self) -> str:
        """Why the last pass failed, or what the one under way does."""
        return self._failure or self.doing

    def tell(self, doing: str) -> None:
        """Say what the pass under way does."""
        self.doing = doing

    def ended(self) -> None:
        """A pass came to its end."""
        if self._failure or self._passed_at is None:
            self.news.set()
        self._passed_at, self._failure, self.doing = self._monotonic(), "", ""

    def failed(self, why: str) -> None:
        """A pass did not."""
        if why != self._failure:
            self.news.set()
        self._failure = why


# Given a lease, the pulse to keep, and an event that says when to end: when told to stop, or when the
# lease is lost.
Work = Callable[[Lease, Pulse, asyncio.Event], Awaitable[None]]

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
        over, pulse = asyncio.Event(), Pulse()
        helpers = [
            asyncio.create_task(self._renew(lease, pulse, over)),
            asyncio.create_task(_pass_on(self._stop, over)),
        ]
        try:
            await work(lease, pulse, over)
        except LeaseLostError as error:
            logger.warning("%s; what was under way is dropped", error)
        finally:
            over.set()
            await _end(helpers)
            await self._release(lease)

    async def _renew(self, lease: Lease, pulse: Pulse, over: asyncio.Event) -> None:
        """Renew the lease until `over` is set, or set it because the lease is lost."""
        away = False
        while True:
            await _first_of(over, pulse.news, timeout_s=lease.lasts_s / _RENEWALS)
            if over.is_set():
                return
            pulse.news.clear()
            try:
                async with self._sessions.begin() as session:
                    await leases.renew(session, lease, passed_s_ago=pulse.passed_s_ago, doing=pulse.text)
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


async def _first_of(one: asyncio.Event, other: asyncio.Event, *, timeout_s: float) -> None:
    waiting = [asyncio.create_task(event.wait()) for event in (one, other)]
    try:
        await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()


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
