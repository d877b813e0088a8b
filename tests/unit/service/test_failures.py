"""What SQLite's driver raises, and whose fault it is; for PostgreSQL's there is test_postgres_failures.py."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DataError, InterfaceError, NoResultFound, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from service.db.engine import create_engine
from service.db.failures import DatabaseFailure, is_outage, kind_of
from tests.fakes.world import World

CONNECTION, CONTENTION = DatabaseFailure.CONNECTION, DatabaseFailure.CONTENTION
DATA, PROGRAMMING = DatabaseFailure.DATA, DatabaseFailure.PROGRAMMING


async def failure(url: str, *statements: str, **values: Any) -> Exception:
    """What the last of these statements raises."""
    engine = create_engine(url)
    try:
        async with engine.begin() as connection:
            for statement in statements:
                await connection.execute(text(statement), values)
    except Exception as error:
        return error
    finally:
        await engine.dispose()
    raise AssertionError("nothing failed")


@pytest.mark.parametrize(
    ("statement", "kind"),
    [
        ("SELECT json_extract('{\"a\": Infinity}', '$.a')", DATA),
        ("INSERT INTO jobs (id) VALUES ('x')", DATA),
        ("SELECT zeroblob(3000000000)", DATA),
        ("SELECT nothing FROM jobs", PROGRAMMING),
        ("SELECT 1 FROM nothing", PROGRAMMING),
        ("SELEC 1", PROGRAMMING),
    ],
)
async def test_sqlite__a_statement_at_fault_is_no_outage(
    database_url: str, statement: str, kind: DatabaseFailure
) -> None:
    error = await failure(database_url, statement)
    assert (kind_of(error), is_outage(error)) == (kind, False)


async def test_sqlite__a_file_that_cannot_be_opened_or_is_none(tmp_path: Path) -> None:
    assert kind_of(await failure(f"sqlite+aiosqlite:///{tmp_path}/none/a.db", "SELECT 1")) is CONNECTION
    (tmp_path / "b.db").write_bytes(b"not a database at all" * 100)
    assert kind_of(await failure(f"sqlite+aiosqlite:///{tmp_path}/b.db", "SELECT 1 FROM x")) is CONNECTION


async def test_sqlite__a_writer_that_does_not_end(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.db.engine.BUSY_TIMEOUT_MS", 10)
    other = sqlite3.connect(database_url.removeprefix("sqlite+aiosqlite:///"))
    other.execute("BEGIN IMMEDIATE")
    error = await failure(database_url, "UPDATE jobs SET reason = ''")
    assert (kind_of(error), is_outage(error)) == (CONTENTION, True)
    other.close()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (PoolTimeoutError("none is free"), CONTENTION),
        (OperationalError("SELECT 1", {}, ConnectionError("refused")), CONNECTION),
        (InterfaceError("SELECT 1", {}, OSError("closed")), CONNECTION),
        (DataError("SELECT 1", {}, Exception("timestamp too large (after year 10K)")), DATA),
        (NoResultFound("none"), PROGRAMMING),
        (ValueError("not a database's"), None),
    ],
)
def test_kind__by_class_where_the_driver_says_no_more(error: Exception, kind: DatabaseFailure | None) -> None:
    assert kind_of(error) is kind


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (OperationalError("SELECT 1", {}, ConnectionError("refused")), 503, "database_unavailable"),
        (PoolTimeoutError("none is free"), 503, "database_busy"),
        (DataError("SELECT 1", {}, Exception("no such moment")), 500, "internal"),
        (NoResultFound("none"), 500, "internal"),
    ],
)
async def test_api__says_that_the_database_is_away_only_where_it_is(
    world: World, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, code: str
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("service.api.routes.jobs.references.find", fail)
    answer = await world.client.get("/v1/jobs/some")
    assert (answer.status_code, answer.json()["code"]) == (status, code)
