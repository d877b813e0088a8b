"""Two dispatchers in one process, on one real database."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from sqlalchemy import update
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from service.db import leases
from service.db.engine import Sessions
from service.db.leases import GuardedSessions, Lease, LeaseLostError
from service.db.tables import LeaseRow
from service.dispatch.leadership import Leadership, Pulse, replica_name
from service.dispatch.loop import failure_text, repeat
from tests.fakes.world import World

NAME = "reconcile"
PATIENCE_S = 60
LEASE_S = 2.0


@dataclass
class Replica:
    """One candidate; its work is to write under the lease, and to note when it could."""

    sessions: Sessions
    owner: str
    lease_s: float = LEASE_S
    terms: list[int] = field(default_factory=list)  # the token of each
    working: bool = False
    dropped: asyncio.Event = field(default_factory=asyncio.Event)  # its first term is over
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    async def work(self, lease: Lease, _pulse: Pulse, over: asyncio.Event) -> None:
        self.terms.append(lease.token)
        self.working = True
        try:
            while not over.is_set():
                async with GuardedSessions(sessions=self.sessions, lease=lease).begin():
                    pass
                await asyncio.sleep(0.02)
        finally:
            self.working = False
            self.dropped.set()

    def start(self) -> None:
        leadership = Leadership(self.sessions, owner=self.owner, lease_s=self.lease_s, stop=self.stop)
        self.task = asyncio.create_task(leadership.lead(NAME, self.work))

    async def until(self, num_terms: int) -> None:
        """Wait until it works for that many times."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.terms) < num_terms or not self.working:
                assert self.task is not None
                assert not self.task.done(), self.task
                await asyncio.sleep(0.02)

    async def end(self) -> None:
        self.stop.set()
        assert self.task is not None
        await self.task


@asynccontextmanager
async def started(*replicas: Replica) -> AsyncIterator[None]:
    for replica in replicas:
        replica.start()
    try:
        yield
    finally:
        for replica in replicas:
            assert replica.task is not None
            replica.task.cancel()
            with suppress(asyncio.CancelledError):
                await replica.task


async def row_of(world: World) -> LeaseRow:
    async with world.sessions.begin() as session:
        return await session.get_one(LeaseRow, NAME)


async def steal(world: World, *, lasts_s: float = 3600) -> Lease:
    """Take the lease over, as if its time had run out."""
    async with world.sessions.begin() as session:
        await session.execute(update(LeaseRow).values(expires_at=datetime(2000, 1, 1, tzinfo=UTC)))
        lease = await leases.take(session, NAME, owner="thief", lasts_s=lasts_s)
    assert lease is not None
    return lease


def test_replica_name__is_another_one_each_time_and_fits() -> None:
    names = {replica_name() for _ in range(100)}
    column = cast("Any", LeaseRow.__table__.c.owner.type)
    assert len(names) == 100
    assert max(len(name) for name in names) <= column.length


async def test_two__one_works_and_the_other_starts_when_it_stops(world: World) -> None:
    first = Replica(world.sessions, "first", lease_s=3600)
    second = Replica(world.sessions, "second", lease_s=3600)
    async with started(first):
        await first.until(1)
        async with started(second):
            await asyncio.sleep(1)
            assert second.terms == []
            await first.end()
            await second.until(1)  # long before the hour is over
    assert (first.terms, second.terms) == ([1], [2])


async def test_renewal__moves_the_end_under_the_same_token(world: World) -> None:
    replica = Replica(world.sessions, "one", lease_s=4)
    async with started(replica):
        await replica.until(1)
        ends = {(await row_of(world)).expires_at}
        async with asyncio.timeout(PATIENCE_S):
            while len(ends) < 3:
                await asyncio.sleep(0.1)
                ends.add((await row_of(world)).expires_at)
        assert replica.terms == [1]


async def test_taken_over__its_work_is_dropped_and_it_stands_by(world: World) -> None:
    replica = Replica(world.sessions, "one")
    async with started(replica):
        await replica.until(1)
        thief = await steal(world)
        async with asyncio.timeout(PATIENCE_S):
            await replica.dropped.wait()
        assert (await row_of(world)).owner == "thief"
        async with world.sessions.begin() as session:
            await leases.release(session, thief)
        await replica.until(2)
    assert replica.terms[0] < thief.token < replica.terms[-1]


async def test_taken_over__work_that_writes_nothing_is_told_too(world: World) -> None:
    replica = Replica(world.sessions, "one")

    async def idle(lease: Lease, _pulse: Pulse, over: asyncio.Event) -> None:
        replica.terms.append(lease.token)
        replica.working = True
        await over.wait()
        replica.dropped.set()

    replica.work = idle  # type: ignore[method-assign]
    async with started(replica):
        await replica.until(1)
        await steal(world)
        async with asyncio.timeout(PATIENCE_S):
            await replica.dropped.wait()


async def test_cut_off__the_lease_is_free_at_once(world: World) -> None:
    replica = Replica(world.sessions, "one", lease_s=3600)
    async with started(replica):
        await replica.until(1)
    async with world.sessions.begin() as session:
        assert await leases.holder(session, NAME) is None


async def test_failure__goes_to_the_caller_and_frees_the_lease(world: World) -> None:
    async def fail(lease: Lease, pulse: Pulse, over: asyncio.Event) -> None:
        raise RuntimeError("a bug")

    leadership = Leadership(world.sessions, owner="one", lease_s=3600, stop=asyncio.Event())
    with pytest.raises(RuntimeError, match="a bug"):
        await leadership.lead(NAME, fail)
    async with world.sessions.begin() as session:
        assert await leases.holder(session, NAME) is None


class AwaySessions:
    """A database that refuses its first transactions."""

    def __init__(self, sessions: Sessions, *, num_refused: int) -> None:
        self._sessions, self.left = sessions, num_refused

    def begin(self) -> Any:
        if self.left:
            self.left -= 1
            raise OperationalError("SELECT 1", {}, ConnectionError("refused"))
        return self._sessions.begin()


async def test_repeat__goes_on_after_a_failure_and_ends_with_the_lease() -> None:
    errors = [RuntimeError("a bug"), LeaseLostError("lost")]

    async def work() -> None:
        raise errors.pop(0)

    with pytest.raises(LeaseLostError):
        await repeat(work, every_s=0.01, pulse=Pulse(), stop=asyncio.Event())
    assert errors == []


async def test_repeat__tells_an_outage_of_the_database_once_and_a_bug_in_full(
    caplog: pytest.LogCaptureFixture,
) -> None:
    away = OperationalError("SELECT 1", {}, ConnectionError("refused"))
    passes = [away, InterfaceError("", {}, OSError("closed")), PoolTimeoutError("none is free")]
    results = [*passes, RuntimeError("a bug"), away, None, away, LeaseLostError("lost")]

    async def work() -> None:
        if (error := results.pop(0)) is not None:
            raise error

    caplog.set_level(logging.INFO, logger="service.dispatch.loop")
    with pytest.raises(LeaseLostError):
        await repeat(work, every_s=0.001, pulse=Pulse(), stop=asyncio.Event())
    told = [(record.getMessage(), record.exc_info is not None) for record in caplog.records]
    outage = ("the database does not answer: (builtins.ConnectionError) refused", False)
    bug, end = ("a pass failed, 4 in a row", True), ("the database answers again", False)
    assert told == [outage, bug, end, outage]


async def test_database_away__is_waited_for_and_told_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    away = AwaySessions(world.sessions, num_refused=4)
    replica = Replica(cast("Sessions", away), "one", lease_s=0.8)
    async with started(replica):
        await replica.until(1)
    assert away.left == 0
    told = [record.getMessage() for record in caplog.records]
    assert sum("cannot be asked" in text for text in told) == 1


async def lease_of(world: World) -> LeaseRow:
    async with world.sessions.begin() as session:
        found = await leases.look(session, NAME)
    assert found is not None
    return found[0]


async def test_pulse__is_written_into_the_lease_at_once_when_it_changes(world: World) -> None:
    results: list[Exception | None] = [None, RuntimeError("a bug"), None]
    seen: list[str] = []
    stop = asyncio.Event()

    async def work(_lease: Lease, pulse: Pulse, over: asyncio.Event) -> None:
        async def one_pass() -> None:
            if not results:
                stop.set()
                return
            if (error := results.pop(0)) is not None:
                raise error

        await repeat(one_pass, every_s=0.2, pulse=pulse, stop=over)

    # A renewal is due after a quarter of the lease: what is seen before was written for its own sake.
    leadership = Leadership(world.sessions, owner="one", lease_s=3600, stop=stop)
    leading = asyncio.create_task(leadership.lead(NAME, work))
    async with asyncio.timeout(PATIENCE_S):
        while not leading.done():
            with suppress(AssertionError):
                seen.append((await lease_of(world)).doing)
            await asyncio.sleep(0.01)
    await leading
    assert [text for text, _ in itertools.groupby(seen)] == ["", "a pass failed: RuntimeError: a bug", ""]


def test_pulse__says_what_failed_before_what_is_done() -> None:
    times = iter([10.0, 17.0])
    pulse = Pulse(monotonic=lambda: next(times))
    assert (pulse.passed_s_ago, pulse.text) == (None, "")
    pulse.tell("reading the jobs")
    assert pulse.text == "reading the jobs"
    pulse.failed("a pass failed: ValueError: no")
    pulse.tell("reading the jobs")
    assert pulse.text == "a pass failed: ValueError: no"
    pulse.ended()
    assert (pulse.passed_s_ago, pulse.text) == (7.0, "")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PoolTimeoutError("none is free"), "the database is too busy: none is free"),
        (
            OperationalError("", {}, OSError("refused")),
            "the database does not answer: (builtins.OSError) refused",
        ),
        (ValueError("s3://AKIAIOSFODNN7EXAMPLE:a@b/c"), "a pass failed: ValueError: s3://***@b/c"),
    ],
)
def test_failure_text__says_whose_fault_it_is(error: Exception, text: str) -> None:
    assert failure_text(error) == text
