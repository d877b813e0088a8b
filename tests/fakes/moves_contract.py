"""What the only writer of `jobs.state` must do on every database."""

import asyncio

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from service.contracts.jobs import JobState as S
from service.db import moves, queries
from service.db.moves import Seen
from service.db.tables import EventRow
from service.errors import IllegalMoveError
from tests.fakes.world import World


async def moved(world: World, seen: Seen, dst: S) -> bool:
    """One move in a transaction of its own."""
    async with world.sessions.begin() as session:
        return await moves.move(
            session, seen, dst, actor="dispatcher", message=f"to {dst}", now=world.clock()
        )


class MovesContract:
    async def test_move__writes_state_reason_version_and_event_together(self, world: World) -> None:
        job = (await world.submit(world.tokenizer()))[0]
        assert await moved(world, Seen(job["id"], S.QUEUED, version=0), S.LAUNCHING)
        assert await moved(world, Seen(job["id"], S.LAUNCHING, version=1), S.RUNNING)
        row = await world.row(job["id"])
        assert (row.state, row.reason, row.version) == (S.RUNNING, "to running", 2)
        assert row.started_at is not None
        async with world.sessions.begin() as session:
            query = select(EventRow.src, EventRow.dst).where(EventRow.job_id == job["id"])
            told = [tuple(row) for row in await session.execute(query.order_by(EventRow.id))]
        assert told == [(None, S.QUEUED), (S.QUEUED, S.LAUNCHING), (S.LAUNCHING, S.RUNNING)]

    async def test_move__what_was_computed_from_a_stale_row_is_dropped(self, world: World) -> None:
        job = (await world.submit(world.tokenizer()))[0]
        assert await moved(world, Seen(job["id"], S.QUEUED, version=0), S.LAUNCHING)
        assert await moved(world, Seen(job["id"], S.LAUNCHING, version=1), S.RETRYING)
        assert await moved(world, Seen(job["id"], S.RETRYING, version=2), S.LAUNCHING)
        # The same state as then, but another attempt.
        assert not await moved(world, Seen(job["id"], S.LAUNCHING, version=1), S.RUNNING)
        assert (await world.row(job["id"])).state is S.LAUNCHING
        async with world.sessions.begin() as session:
            assert len(await queries.events(session, job["id"], after=0, limit=100)) == 4

    async def test_reasons__of_jobs_that_have_moved_are_dropped(self, world: World) -> None:
        ids = [job["id"] for job in await world.submit(*(world.tokenizer(f"t{n}") for n in range(4)))]
        told = [(Seen(job_id, S.QUEUED, version=0), f"waits {n % 2}") for n, job_id in enumerate(ids[:3])]
        told.append((Seen(ids[3], S.LAUNCHING, version=1), "waits 1"))
        assert await moved(world, told[1][0], S.LAUNCHING)
        assert await moved(world, Seen(ids[3], S.QUEUED, version=0), S.LAUNCHING)
        async with world.sessions.begin() as session:
            await moves.write_reasons(session, told, now=world.clock.now)
        assert [(await world.row(i)).reason for i in ids] == [
            "waits 0",
            "to launching",
            "waits 0",
            "waits 1",
        ]
        assert [(await world.row(i)).version for i in ids] == [0, 1, 0, 1]

    async def test_move__an_illegal_one_is_refused_before_the_database(self, world: World) -> None:
        with pytest.raises(IllegalMoveError, match="it can become: cancelled, failed, launching"):
            await moved(world, Seen("0" * 16, S.RETRYING, version=0), S.RUNNING)

    async def test_move__a_rollback_takes_the_event_with_it(self, world: World) -> None:
        job = (await world.submit(world.tokenizer()))[0]
        with pytest.raises(RuntimeError, match="on purpose"):
            await _move_and_fail(world, job["id"])
        assert (await world.row(job["id"])).state is S.QUEUED
        async with world.sessions.begin() as session:
            assert len(await queries.events(session, job["id"], after=0, limit=100)) == 1

    async def test_state__no_other_word_is_stored(self, world: World) -> None:
        job = (await world.submit(world.tokenizer()))[0]
        async with world.sessions() as session:
            statement = text("UPDATE jobs SET state = 'done' WHERE id = :id")
            with pytest.raises(IntegrityError):
                await session.execute(statement, {"id": job["id"]})

    async def test_race__of_two_movers_one_wins_each_time(self, world: World) -> None:
        jobs = await world.submit(*(world.tokenizer(f"t{n}") for n in range(50)))
        for job in jobs:
            seen = Seen(job["id"], S.QUEUED, version=0)
            won = await asyncio.gather(moved(world, seen, S.LAUNCHING), moved(world, seen, S.CANCELLED))
            assert sorted(won) == [False, True]
            async with world.sessions.begin() as session:
                events = await queries.events(session, job["id"], after=0, limit=10)
            assert len(events) == 2
            assert events[-1].dst is (S.LAUNCHING if won[0] else S.CANCELLED)


async def _move_and_fail(world: World, job_id: str) -> None:
    async with world.sessions.begin() as session:
        seen = Seen(job_id, S.QUEUED, version=0)
        assert await moves.move(session, seen, S.LAUNCHING, actor="dispatcher", message="", now=world.clock())
        raise RuntimeError("on purpose")
