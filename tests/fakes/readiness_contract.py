"""Whoever asks is told when nothing is dispatched, and why."""

import pytest
from httpx import ASGITransport, AsyncClient, Response

from service.api.app import create_app
from service.contracts.jobs import JobState
from service.db import leases
from service.db.leases import RECONCILE, Lease
from tests.fakes.world import World

_NEVER = "dispatching has not begun: no dispatcher has run on this database yet"


async def taken(world: World, *, lasts_s: float = 3600) -> Lease:
    async with world.sessions.begin() as session:
        lease = await leases.take(session, RECONCILE, owner="one", lasts_s=lasts_s)
    assert lease is not None
    return lease


async def passed(world: World, lease: Lease, *, s_ago: float | None, doing: str = "") -> None:
    """Renew the lease as its holder does."""
    async with world.sessions.begin() as session:
        await leases.renew(session, lease, passed_s_ago=s_ago, doing=doing)


async def readyz(world: World, *, dispatches: bool) -> Response:
    app = create_app(world.app.state.services.settings, world.sessions, world.store, dispatches=dispatches)
    async with AsyncClient(transport=ASGITransport(app), base_url="http://api.test") as client:
        return await client.get("/readyz")


async def notices(world: World) -> set[str | None]:
    """What the list and an open job say, and an api without a dispatcher."""
    (job, *_) = (await world.client.get("/v1/jobs")).json()["jobs"]
    page = (await world.client.get("/v1/jobs")).json()
    ready = await readyz(world, dispatches=False)
    assert ready.status_code == 200  # users must be able to see and to cancel
    return {page["notice"], (await world.show(job["id"]))["notice"], ready.json()["notice"]}


class ReadinessContract:
    """On the database of the fixture `world`."""

    async def test_never__there_was_no_dispatcher(self, world: World) -> None:
        await world.submit(world.tokenizer())
        assert await notices(world) == {_NEVER}
        assert (await readyz(world, dispatches=True)).status_code == 503

    @pytest.mark.parametrize("s_ago", [None, 0.0, 20.0])
    async def test_passes__that_come_to_their_ends_are_no_news(
        self, world: World, s_ago: float | None
    ) -> None:
        await world.submit(world.tokenizer())
        await passed(world, await taken(world), s_ago=s_ago, doing="reading the jobs")
        assert await notices(world) == {None}
        assert (await readyz(world, dispatches=True)).status_code == 200

    async def test_standstill__is_told_with_its_reason(self, world: World) -> None:
        await world.submit(world.tokenizer())
        lease = await taken(world)
        await passed(world, lease, s_ago=43.0, doing="the database does not answer: malformed JSON")
        (told,) = await notices(world)
        assert told is not None
        assert told.startswith("dispatching has stood still for 4")
        assert told.endswith(" s: the database does not answer: malformed JSON")
        refused = await readyz(world, dispatches=True)
        assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")
        assert refused.json()["detail"].endswith("malformed JSON")
        await passed(world, lease, s_ago=0.0)
        assert await notices(world) == {None}

    async def test_start__after_a_night_off_counts_from_now(self, world: World) -> None:
        await world.submit(world.tokenizer())
        await passed(world, await taken(world), s_ago=36_000.0, doing="the last thing")
        assert await notices(world) != {None}
        async with world.sessions.begin() as session:
            await leases.start_anew(session)
        assert await notices(world) == {None}
        assert (await readyz(world, dispatches=True)).status_code == 200

    async def test_first_start__is_given_its_time(self, world: World) -> None:
        await world.submit(world.tokenizer())
        async with world.sessions.begin() as session:
            await leases.start_anew(session)
        assert await notices(world) == {None}
        assert (await readyz(world, dispatches=True)).status_code == 200
        lease = await taken(world)
        assert lease.token == 1
        await passed(world, lease, s_ago=31.0)
        assert await notices(world) != {None}

    async def test_dispatcher__that_is_gone_is_missed(self, world: World) -> None:
        await world.submit(world.tokenizer())
        lease = await taken(world)
        await passed(world, lease, s_ago=100.0)
        async with world.sessions.begin() as session:
            await leases.release(session, lease)
        (told,) = await notices(world)
        assert told is not None
        assert told.startswith("dispatching has stood still for 10")
        assert told.endswith("no dispatcher is running")

    async def test_next_dispatcher__does_not_hide_that_none_came_to_the_end_of_a_pass(
        self, world: World
    ) -> None:
        await world.submit(world.tokenizer())
        first = await taken(world)
        await passed(world, first, s_ago=100.0, doing="a pass failed")
        async with world.sessions.begin() as session:
            await leases.release(session, first)
        await taken(world)
        (told,) = await notices(world)
        assert told is not None
        assert told.endswith("its passes do not come to an end")

    async def test_final_job__waits_for_nothing(self, world: World) -> None:
        (job,) = await world.submit(world.tokenizer())
        await world.put(job["id"], JobState.CANCELLED)
        assert (await world.show(job["id"]))["notice"] is None

    async def test_reason__that_is_long_is_cut(self, world: World) -> None:
        lease = await taken(world)
        await passed(world, lease, s_ago=43.0, doing="x" * 10_000)
        assert len((await readyz(world, dispatches=False)).json()["notice"]) < 600
