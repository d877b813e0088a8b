"""What PostgreSQL says of statements that fail, and whose fault it is."""

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import SQLAlchemyError

from service.db.engine import Sessions, create_engine, create_sessions
from service.db.failures import DatabaseFailure, is_outage, kind_of
from service.db.upgrade import upgrade

CONNECTION, CONTENTION = DatabaseFailure.CONNECTION, DatabaseFailure.CONTENTION
DATA, PROGRAMMING = DatabaseFailure.DATA, DatabaseFailure.PROGRAMMING


@pytest.fixture
async def sessions(postgres_url: str) -> AsyncIterator[Sessions]:
    await asyncio.to_thread(upgrade, postgres_url)
    engine = create_engine(postgres_url)
    yield create_sessions(engine)
    await engine.dispose()


async def failure(sessions: Sessions, *statements: str, **values: Any) -> Exception:
    """What the last of these statements raises."""
    try:
        async with sessions.begin() as session:
            for statement in statements:
                (await session.execute(text(statement), values)).close()
    except Exception as error:
        return error
    raise AssertionError("nothing failed")


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("SELECT CAST('{\"a\": Infinity}' AS jsonb)", DATA),
        ("SELECT CAST('\"\\u0000\"' AS jsonb)", DATA),
        ("SELECT CAST('abc' AS integer)", DATA),
        ("SELECT 2147483647 + 1", DATA),
        ("SELECT 1 / 0", DATA),
        ("INSERT INTO events (job_id, at, actor, message) VALUES ('none', now(), '', '')", DATA),
        ("SELECT nothing FROM jobs", PROGRAMMING),
        ("SELECT 1 FROM nothing", PROGRAMMING),
        ("SELEC 1", PROGRAMMING),
    ],
)
async def test_statement__at_fault_is_no_outage(
    sessions: Sessions, statement: str, kind: DatabaseFailure
) -> None:
    error = await failure(sessions, statement)
    assert (kind_of(error), is_outage(error)) == (kind, False)


async def test_value__that_the_driver_itself_refuses(sessions: Sessions) -> None:
    assert kind_of(await failure(sessions, "SELECT :value", value="a\x00b")) is DATA
    assert not is_outage(await failure(sessions, "SELECT :value", value="\ud800"))


async def test_moment__that_python_has_no_word_for(sessions: Sessions) -> None:
    async with sessions.begin() as session:
        found = await session.execute(text("SELECT CAST('2026-01-01' AS timestamptz)"))
        assert isinstance(found.scalar_one(), datetime)
    with pytest.raises(SQLAlchemyError) as unread:
        async with sessions.begin() as session:
            await session.scalar(text("SELECT CAST('infinity' AS timestamptz)"))
    assert kind_of(unread.value) is DATA


async def test_server__that_ends_the_session(sessions: Sessions) -> None:
    error = await failure(sessions, "SELECT pg_terminate_backend(pg_backend_pid())")
    assert (kind_of(error), is_outage(error)) == (CONNECTION, True)


async def test_server__that_has_no_connection_left_or_is_not_there(
    sessions: Sessions, postgres_url: str
) -> None:
    url = make_url(postgres_url)
    role = f"role_of_{url.database}"
    async with sessions.begin() as session:  # no limit binds the superuser
        await session.execute(text(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 0"))
    nowhere = make_url("postgresql+psycopg://nobody@127.0.0.1:1/none")
    for other in (url.set(username=role, password=None), nowhere):
        engine = create_engine(other.render_as_string(hide_password=False))
        assert kind_of(await failure(create_sessions(engine), "SELECT 1")) is CONNECTION
        await engine.dispose()


async def test_lock__that_is_not_to_be_had(sessions: Sessions, postgres_url: str) -> None:
    address = postgres_url.replace("+psycopg", "", 1)
    with psycopg.connect(address) as other:
        other.execute("LOCK TABLE jobs")
        for limit in ("lock_timeout", "statement_timeout"):
            error = await failure(sessions, f"SET LOCAL {limit} = '50ms'", "SELECT 1 FROM jobs")
            assert (kind_of(error), is_outage(error)) == (CONTENTION, True)


async def test_deadlock__is_contention(sessions: Sessions) -> None:
    async with sessions.begin() as session:
        await session.execute(text("CREATE TABLE pair AS SELECT generate_series(1, 2) AS n"))
    ready = asyncio.Barrier(2)

    async def take(first: int, second: int) -> None:
        async with sessions.begin() as session:
            await session.execute(text(f"UPDATE pair SET n = n WHERE n = {first}"))
            await ready.wait()
            await session.execute(text(f"UPDATE pair SET n = n WHERE n = {second}"))

    ends = await asyncio.gather(take(1, 2), take(2, 1), return_exceptions=True)
    (error,) = [end for end in ends if end is not None]
    assert kind_of(error) is CONTENTION
