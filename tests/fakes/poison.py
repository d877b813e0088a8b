"""Values that make no sense, for every column of a job: whatever a bug, a person or a broken disk may leave.

SQLite keeps any value in any column; PostgreSQL keeps what fits the type, which leaves infinite moments,
documents of another shape and numbers at the end of their range.
"""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, Column, Connection, DateTime, Float, Integer, text
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import IntegrityError
from sqlalchemy.types import TypeDecorator

from service.db.engine import Sessions
from service.db.tables import Base
from service.domain.names import new_job_id

OF_A_JOB = ("jobs", "attempts", "events", "metrics", "files", "checkpoints")
COLUMNS = [f"{name}.{column.name}" for name in OF_A_JOB for column in Base.metadata.tables[name].columns]

_DEEP = "[" * 900 + "]" * 900
_DOCUMENTS = (
    "null",
    '"text"',
    '{"resources": {"workers": "many"}, "limits": [1], "checkpoints": 3, "plan": []}',
    '{"resources": {"workers": -1, "cpus_per_worker": 1e300, "gpus_per_worker": null}}',
    _DEEP,
)
_TEXTS = ("", "../x", "'\"%s{}\\", "\x01\x7f", "ü\U0001f600")
_ROW_NUMBER = "id"  # what SQLite counts by itself, it lets nobody else set


def values(name: str, dialect: str) -> list[Any]:
    """Poison for the column `TABLE.COLUMN`."""
    table, _, column = name.partition(".")
    of = Base.metadata.tables[table].columns[column]
    return list(_of_sqlite(of) if dialect == "sqlite" else _of_postgres(of))


def _of_sqlite(column: Column[Any]) -> Iterator[Any]:
    if column.primary_key and isinstance(column.type, BigInteger) and column.name == _ROW_NUMBER:
        yield from (-1, 2**62)
        return
    yield from ("poison", b"\x00\xff", 2**62, float("inf"))
    match _kind(column):
        case DateTime():
            yield from (
                "2026-13-45 99:99:99.000000",
                "9999-12-31 23:59:59.999999",
                "0001-01-01 00:00:00.000000",
            )
        case JSON():
            yield from ('{"resources": Infinity}', "[1, ", *_DOCUMENTS)
        case Integer() | BigInteger():
            yield -(2**62)
        case _:
            yield from ("", "../x")


def _of_postgres(column: Column[Any]) -> Iterator[Any]:
    match _kind(column):
        case DateTime():
            yield from (
                "infinity",
                "-infinity",
                "0044-03-15 00:00:00 BC",
                "200000-01-01",
                "9999-12-31 23:59:59",
            )
        case JSON():
            yield from _DOCUMENTS
        case Boolean():
            yield from (True, False)
        case BigInteger():
            yield from (2**63 - 1, -(2**63)) if column.name != _ROW_NUMBER else (-1, 2**62)
        case Integer():
            yield from (2**31 - 1, -(2**31))
        case Float():
            yield from ("NaN", "Infinity", "1e308")
        case _:
            yield from _TEXTS


def _kind(column: Column[Any]) -> object:
    return column.type.impl if isinstance(column.type, TypeDecorator) else column.type


async def open_the_gates(sessions: Sessions) -> None:
    """Let what no constraint would allow be planted, as a database of before the constraints holds it."""
    async with sessions() as session:
        connection = await session.connection()
        if connection.dialect.name == "postgresql":
            await connection.run_sync(_drop_constraints)
            await session.commit()


def _drop_constraints(connection: Connection) -> None:
    found = connection.execute(
        text("SELECT conrelid::regclass::text, conname FROM pg_constraint WHERE contype IN ('c', 'f')")
    )
    for table, name in found.all():
        if table in OF_A_JOB:
            connection.execute(text(f'ALTER TABLE {table} DROP CONSTRAINT "{name}"'))


async def clone(sessions: Sessions, job_id: str) -> str:
    """Another job with rows like these, which takes less time than to live through all that."""
    new_id = new_job_id()
    async with sessions.begin() as session:
        for name in OF_A_JOB:
            columns = {column.name: column.name for column in Base.metadata.tables[name].columns}
            columns |= {"id": ":new_id"} if name == "jobs" else {"job_id": ":new_id"}
            if name == "attempts":
                columns["submission_id"] = "'cim-' || :new_id || '-' || number"
            if name in ("events", "metrics", "files"):
                del columns["id"]
            whose = "id" if name == "jobs" else "job_id"
            statement = (
                f"INSERT INTO {name} ({', '.join(columns)}) SELECT {', '.join(columns.values())} "
                f"FROM {name} WHERE {whose} = :job_id"
            )
            await session.execute(
                text(statement.replace(":new_id", "CAST(:new_id AS VARCHAR)")),
                {"new_id": new_id, "job_id": job_id},
            )
    return new_id


async def plant(sessions: Sessions, name: str, job_id: str, value: Any) -> bool:
    """Put `value` into the column `TABLE.COLUMN` of every row of a job; False where a key is taken."""
    try:
        await _plant(sessions, name, job_id, value)
    except IntegrityError:
        return False
    return True


async def _plant(sessions: Sessions, name: str, job_id: str, value: Any) -> None:
    table, _, column = name.partition(".")
    whose = "id" if table == "jobs" else "job_id"
    async with sessions() as session:
        connection = await session.connection()
        sqlite = connection.dialect.name == "sqlite"
        if sqlite:
            await connection.exec_driver_sql("COMMIT")  # neither pragma does anything inside a transaction
            await connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
            await connection.exec_driver_sql("PRAGMA ignore_check_constraints = ON")
            await connection.exec_driver_sql("BEGIN IMMEDIATE")
        cast = _cast(connection.dialect, Base.metadata.tables[table].columns[column])
        statement = text(f"UPDATE {table} SET {column} = {cast} WHERE {whose} = :job_id")
        await session.execute(statement, {"value": value, "job_id": job_id})
        await session.commit()
        if sqlite:
            raw = await session.connection()
            await raw.exec_driver_sql("COMMIT")
            await raw.exec_driver_sql("PRAGMA foreign_keys = ON")
            await raw.exec_driver_sql("PRAGMA ignore_check_constraints = OFF")
            await raw.exec_driver_sql("BEGIN")


def _cast(dialect: Dialect, column: Column[Any]) -> str:
    if dialect.name == "sqlite":
        return ":value"
    return f"CAST(:value AS {column.type.compile(dialect)})"
