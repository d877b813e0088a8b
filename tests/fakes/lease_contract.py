"""What a lease must do on every database. Time is moved by writing `expires_at`, not by waiting."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text, update

from service.contracts.jobs import JobState as S
from service.db import leases, moves, queries
from service.db.leases import GuardedSessions, Lease, LeaseLostError
from service.db.tables import LeaseRow
from tests.fakes.world import World

NAME = "reconcile"
LONG_S = 3600.0
SHORT_S = 0.2


async def take(world: World, owner: str, *, name: str = NAME, lasts_s: float = LONG_S) -> Lease | None:
    async with world.sessions.begin() as session:
        return await leases.take(session, name, owner=owner, lasts_s=lasts_s)


async def taken(world: World, owner: str, *, name: str = NAME, lasts_s: float = LONG_S) -> Lease:
    lease = await take(world, owner, name=name, lasts_s=lasts_s)
    assert lease is not None, f"{owner} did not get {name}"
    return lease


async def renew(world: World, lease: Lease) -> None:
    async with world.sessions.begin() as session:
        await leases.renew(session, lease)


async def release(world: World, lease: Lease) -> None:
    async with world.sessions.begin() as session:
        await leases.release(session, lease)


async def expire(world: World) -> None:
    """Let the time of every lease be over."""
    async with world.sessions.begin() as session:
        await session.execute(update(LeaseRow).values(expires_at=datetime(2000, 1, 1, tzinfo=UTC)))


async def held(world: World) -> list[tuple[str, str, int]]:
    async with world.sessions.begin() as session:
        return [(row.name, row.owner, row.token) for row in await leases.held(session)]


async def holder(world: World) -> str | None:
    async with world.sessions.begin() as session:
        return await leases.holder(session, NAME)


async def launch(world: World, lease: Lease, job_id: str) -> bool:
    """A write as the dispatcher does it."""
    async with GuardedSessions(sessions=world.sessions, lease=lease).begin() as session:
        job = await queries.job(session, job_id)
        assert job is not None
        seen, now = moves.seen(job), world.clock()
        return await moves.move(session, seen, S.LAUNCHING, actor="dispatcher", message="", now=now)


class LeaseContract:
    async def test_take__the_first_one_has_it_and_the_others_wait(self, world: World) -> None:
        assert await holder(world) is None
        assert (await taken(world, "one")).token == 1
        assert await take(world, "two") is None
        assert await take(world, "one") is None  # one process, one holder
        assert await holder(world) == "one"
        assert (await taken(world, "two", name="forward")).token == 1
        assert await held(world) == [("forward", "two", 1), (NAME, "one", 1)]

    async def test_take__of_many_at_once_one_gets_it(self, world: World) -> None:
        for token in (1, 2, 3):
            got = await asyncio.gather(*(take(world, f"replica {n}") for n in range(12)))
            assert [lease.token for lease in got if lease is not None] == [token]
            await expire(world)

    async def test_expiry__the_next_one_takes_it_with_a_higher_token(self, world: World) -> None:
        old = await taken(world, "one")
        await expire(world)
        assert await held(world) == []
        new = await taken(world, "two")
        assert new.token == old.token + 1
        assert (await taken(world, "three", name="other")).token == 1  # each name counts by itself

    async def test_expiry__is_told_by_the_databases_clock(self, world: World) -> None:
        lease = await taken(world, "one", lasts_s=100)
        async with world.sessions.begin() as session:
            row = (await leases.held(session))[0]
            sqlite = session.get_bind().dialect.name == "sqlite"
            clock = "strftime('%Y-%m-%d %H:%M:%f', 'now')" if sqlite else "clock_timestamp()"
            shown = await session.scalar(text(f"SELECT {clock}"))
        now = datetime.fromisoformat(shown).replace(tzinfo=UTC) if sqlite else shown
        assert timedelta(seconds=40) < row.expires_at - now <= timedelta(seconds=lease.lasts_s)

    async def test_renew__moves_the_end(self, world: World) -> None:
        lease = await taken(world, "one", lasts_s=SHORT_S)
        await renew(world, Lease(name=NAME, owner="one", token=lease.token, lasts_s=LONG_S))
        await asyncio.sleep(2 * SHORT_S)
        assert await holder(world) == "one"

    async def test_renew__an_expired_or_taken_one_is_lost(self, world: World) -> None:
        lease = await taken(world, "one")
        await expire(world)
        with pytest.raises(LeaseLostError, match=r"reconcile \(token 1\) of one ran out or was taken over"):
            await renew(world, lease)
        await taken(world, "two")
        with pytest.raises(LeaseLostError):
            await renew(world, lease)
        assert await held(world) == [(NAME, "two", 2)]

    async def test_guard__lets_the_holder_write(self, world: World) -> None:
        job = (await world.submit(world.tokenizer()))[0]
        lease = await taken(world, "one")
        assert await launch(world, lease, job["id"])
        assert (await world.row(job["id"])).state is S.LAUNCHING

    async def test_guard__nothing_is_written_after_the_end_or_a_take_over(self, world: World) -> None:
        job = (await world.submit(world.tokenizer()))[0]
        old = await taken(world, "one")
        await expire(world)
        with pytest.raises(LeaseLostError):
            await launch(world, old, job["id"])
        new = await taken(world, "two")
        with pytest.raises(LeaseLostError):
            await launch(world, old, job["id"])
        async with world.sessions.begin() as session:
            assert len(await queries.events(session, job["id"], after=0, limit=10)) == 1
        assert await launch(world, new, job["id"])

    async def test_guard__the_same_owners_earlier_lease_is_lost_too(self, world: World) -> None:
        job = (await world.submit(world.tokenizer()))[0]
        old = await taken(world, "one")
        await expire(world)
        await taken(world, "one")
        with pytest.raises(LeaseLostError):
            await launch(world, old, job["id"])

    async def test_guard__a_take_over_waits_for_an_open_transaction(self, world: World) -> None:
        job = (await world.submit(world.tokenizer()))[0]
        old = await taken(world, "one", lasts_s=SHORT_S)
        async with GuardedSessions(sessions=world.sessions, lease=old).begin() as session:
            await asyncio.sleep(2 * SHORT_S)
            taking = asyncio.create_task(take(world, "two"))
            done, _ = await asyncio.wait({taking}, timeout=1.0)
            assert not done, "taken over in the middle of a guarded write"
            seen = moves.Seen(job["id"], S.QUEUED, version=0)
            now = world.clock()
            assert await moves.move(session, seen, S.LAUNCHING, actor="dispatcher", message="", now=now)
        lease = await taking
        assert lease is not None
        assert lease.token == old.token + 1
        assert (await world.row(job["id"])).state is S.LAUNCHING

    async def test_release__the_next_one_need_not_wait(self, world: World) -> None:
        await release(world, await taken(world, "one"))
        assert await holder(world) is None
        assert (await taken(world, "two")).token == 2

    async def test_release__by_a_former_holder_ends_nothing(self, world: World) -> None:
        old = await taken(world, "one")
        await expire(world)
        await taken(world, "two")
        await release(world, old)
        assert await holder(world) == "two"

    async def test_start_anew__ends_every_lease(self, world: World) -> None:
        await taken(world, "one")
        await taken(world, "two", name="forward")
        async with world.sessions.begin() as session:
            await leases.start_anew(session)
        assert await held(world) == []
        assert (await taken(world, "three")).token == 2
