"""The same contracts on a real PostgreSQL server, where transactions really run side by side."""

import asyncio
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Select, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError

from benchmarks.load.database import fill
from service.contracts.jobs import JobState as S
from service.db import engine as db_engine
from service.db import moves, queries
from service.db.leases import GuardedSessions
from service.db.moves import Seen
from service.db.queries import JobFilter
from service.db.tables import Base
from service.db.upgrade import alembic_config, upgrade
from service.dispatch import forwarder, observe
from tests.fakes import lease_contract
from tests.fakes.claim_contract import ClaimContract
from tests.fakes.finish_contract import FinishContract
from tests.fakes.job_machine import run_machine
from tests.fakes.json_contract import JsonContract
from tests.fakes.lease_contract import LeaseContract
from tests.fakes.moves_contract import MovesContract, moved
from tests.fakes.number_contract import NumberContract
from tests.fakes.poison_contract import PoisonContract
from tests.fakes.readiness_contract import ReadinessContract
from tests.fakes.submit_contract import ListContract, SubmitContract
from tests.fakes.wish_contract import WishContract
from tests.fakes.work_contract import DetailContract, WorkContract
from tests.fakes.world import World
from tests.integration import servers

Explain = Callable[[Select[*tuple[Any, ...]]], str]
_numbers = count()
KNOWN = [script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()]


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of this module's own, with a migrated database called `migrated`."""
    # Unix socket addresses have room for about a hundred characters.
    with servers.postgres_server(tmp_path_factory.mktemp("pg")) as uri:
        url = make_url(uri).set(drivername="postgresql+psycopg")
        _execute(url.render_as_string(hide_password=False), "CREATE DATABASE migrated")
        upgrade(url.set(database="migrated").render_as_string(hide_password=False))
        yield url.render_as_string(hide_password=False)


@pytest.fixture
def database_url(server_url: str) -> str:
    name = f"test_{next(_numbers)}"
    _execute(server_url, f"CREATE DATABASE {name} TEMPLATE migrated")
    return make_url(server_url).set(database=name).render_as_string(hide_password=False)


def _execute(url: str, statement: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


class TestSubmit(SubmitContract): ...


class TestList(ListContract): ...


class TestNumbers(NumberContract): ...


class TestReadiness(ReadinessContract): ...


class TestJson(JsonContract): ...


class TestWishes(WishContract): ...


class TestMoves(MovesContract): ...


class TestLeases(LeaseContract): ...


class TestClaim(ClaimContract): ...


class TestWork(WorkContract): ...


class TestFinish(FinishContract): ...


class TestDetails(DetailContract): ...


class TestPoison(PoisonContract): ...


async def test_race__a_hundred_jobs_and_two_connections(world: World) -> None:
    jobs = await world.submit(*(world.tokenizer(f"t{n}") for n in range(100)))
    seen = [Seen(job["id"], S.QUEUED, version=0) for job in jobs]

    async def rush(dst: S) -> list[bool]:
        return [await moved(world, one, dst) for one in seen]

    launched, cancelled = await asyncio.gather(rush(S.LAUNCHING), rush(S.CANCELLED))
    assert all(one != other for one, other in zip(launched, cancelled, strict=True))
    for one, won in zip(seen, launched, strict=True):
        assert (await world.row(one.id)).state is (S.LAUNCHING if won else S.CANCELLED)


async def test_frozen_writer__holds_up_a_take_over_no_longer_than_its_idle_limit(
    world: World, database_url: str
) -> None:
    job = (await world.submit(world.tokenizer()))[0]
    engine = db_engine.create_engine(database_url, idle_limit_s=1)
    guarded = GuardedSessions(
        sessions=db_engine.create_sessions(engine),
        lease=await lease_contract.taken(world, "one", lasts_s=0.2),
    )
    seen, now = Seen(job["id"], S.QUEUED, version=0), world.clock()
    with pytest.raises(DBAPIError):
        await _write_and_freeze(guarded, seen, world)
    assert (await world.row(job["id"])).state is S.QUEUED
    async with guarded.sessions.begin() as session:
        assert await moves.move(session, seen, S.LAUNCHING, actor="dispatcher", message="", now=now)
    await engine.dispose()


async def _write_and_freeze(guarded: GuardedSessions, seen: Seen, world: World) -> None:
    """Write, then say nothing until another one has the lease, then try to commit."""
    async with guarded.begin() as session:
        await moves.move(session, seen, S.LAUNCHING, actor="dispatcher", message="", now=world.clock())
        await asyncio.sleep(0.3)
        await lease_contract.taken(world, "two")


async def test_upgrade__doing_it_again_is_harmless(world: World, database_url: str) -> None:
    await asyncio.to_thread(upgrade, database_url)
    assert (await world.client.get("/readyz")).status_code == 200


def test_jobs__agree_with_the_model_whatever_happens(database_url: str, tmp_path: Path) -> None:
    run_machine(database_url, tmp_path, max_examples=15)


@pytest.mark.parametrize("revision", KNOWN)
def test_upgrade__from_every_earlier_revision(server_url: str, revision: str) -> None:
    name = f"test_{next(_numbers)}"
    _execute(server_url, f"CREATE DATABASE {name}")
    url = make_url(server_url).set(database=name).render_as_string(hide_password=False)
    upgrade(url, revision=revision)
    upgrade(url)
    engine = create_engine(url)
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    engine.dispose()
    # The two that PostgreSQL has besides.
    assert {(what, index.name) for what, index in differences} == {
        ("remove_index", "ix_jobs_labels"),
        ("remove_index", "ix_jobs_words"),
    }


def _explained(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
    return f"EXPLAIN {statement}", parameters


@pytest.fixture(scope="module")
def explain(server_url: str) -> Iterator[Explain]:
    """How PostgreSQL would answer a query over twenty thousand jobs."""
    _execute(server_url, "CREATE DATABASE many TEMPLATE migrated")
    url = make_url(server_url).set(database="many").render_as_string(hide_password=False)
    fill(url.replace("+psycopg", "", 1), S.SUCCEEDED, 20_000)
    engine = create_engine(url)
    event.listen(engine, "before_cursor_execute", _explained, retval=True)

    def plan(query: Select[*tuple[Any, ...]]) -> str:
        with engine.connect() as connection:
            cursor = connection.execute(query).cursor
            assert cursor is not None
            return "\n".join(line for (line,) in cursor.fetchall())

    yield plan
    engine.dispose()


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        (JobFilter(), "ix_jobs_created_at_id"),
        (JobFilter(labels={"sweep": "s50"}), "ix_jobs_labels"),
        (JobFilter(text="t-4242"), "ix_jobs_words"),
        (JobFilter(name="vit-42"), "ix_jobs_name_created_at"),
        (JobFilter(states=[S.PAUSED]), "ix_jobs_state_created_at"),
        (JobFilter(kinds=["none"]), "ix_jobs_kind_created_at"),
    ],
)
def test_lists__are_served_by_an_index(explain: Explain, wanted: JobFilter, index: str) -> None:
    plan = explain(queries.newest(wanted, dialect="postgresql").limit(50))
    assert index in plan
    assert "Seq Scan" not in plan


def test_beginning_of_an_id__is_found_by_the_primary_key(explain: Explain) -> None:
    assert "pk_jobs" in explain(queries.starting_with("3fa2"))


def test_dispatcher__asks_what_indexes_can_answer(explain: Explain) -> None:
    assert "ix_attempts_started_at" in explain(observe.LEFTOVERS)
    assert "ix_jobs_updated_at" in explain(forwarder.UNFINISHED)
