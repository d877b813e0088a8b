"""The engine and the sessions of one process."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import URL, Connection, event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from service.contracts import storable
from service.db import line

Sessions = async_sessionmaker[AsyncSession]

BUSY_TIMEOUT_MS = 30_000
IDLE_LIMIT_S = 30.0
_READS = "cim_only_reads"


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long PostgreSQL is waited for, in seconds.

    A request that meets a silent server waits for a connection of the pool, for the ping that finds
    it dead and for a new one: at most the sum of pool, answer and connect, which is 35 s.
    """

    pool_s: float = 10.0
    connect_s: float = 10.0  # for each address of the server; libpq counts in whole seconds, at least 2
    # A statement of ours takes milliseconds; what waits for a lock of a frozen process may take this long.
    statement_s: float = 10.0
    # Longer than that, so that a slow statement costs itself and not the connection.
    answer_s: float = 15.0


def create_engine(
    database_url: str, *, idle_limit_s: float = IDLE_LIMIT_S, patience: Patience | None = None
) -> AsyncEngine:
    """An engine for `sqlite+aiosqlite:///PATH` or `postgresql+psycopg://...`.

    SQLite is put into WAL mode, waits for other writers, and enforces foreign keys. PostgreSQL ends
    a transaction in which nothing happens for `idle_limit_s`: a process that was frozen in the middle
    of one, or whose host is gone, would hold its locks for ever. Nothing waits for PostgreSQL for
    longer than `patience` says; what did raises an outage (`service.db.failures`).
    """
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite":
        engine = create_async_engine(url, json_serializer=storable.dumps)
        event.listen(engine.sync_engine, "connect", _prepare_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
        event.listen(engine.sync_engine, "invalidate", _roll_back_sqlite)
        return engine
    return _create_postgres(url, idle_limit_s=idle_limit_s, patience=patience or Patience())


def create_sessions(engine: AsyncEngine) -> Sessions:
    """Sessions whose rows stay readable after the commit."""
    return async_sessionmaker(engine, expire_on_commit=False)


async def only_reads(session: AsyncSession) -> None:
    """Say, before the first statement, that the transaction writes nothing: it waits for no writer."""
    await session.connection(execution_options={_READS: True})


def _create_postgres(url: URL, *, idle_limit_s: float, patience: Patience) -> AsyncEngine:
    engine = create_async_engine(
        url,
        json_serializer=storable.dumps,
        pool_pre_ping=True,
        pool_size=10,
        max_overflow=20,
        pool_timeout=patience.pool_s,
        connect_args={
            **line.parameters(url, connect_s=patience.connect_s),
            "async_creator_fn": partial(line.connect, answer_limit_s=patience.answer_s),
        },
    )
    settings = {
        "idle_in_transaction_session_timeout": _ms(idle_limit_s),
        "statement_timeout": _ms(patience.statement_s),
        **line.SERVER_SETTINGS,
    }
    event.listen(engine.sync_engine, "connect", partial(_prepare_postgres, settings=settings))
    return engine


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))  # 0 would mean no limit


def _prepare_postgres(connection: Any, _record: object, *, settings: Mapping[str, int]) -> None:
    # Not as libpq's `options`: a connection pooler in between may refuse those.
    calls = ", ".join("set_config(%s, %s, false)" for _ in settings)
    cursor = connection.cursor()
    cursor.execute(f"SELECT {calls}", [str(told) for setting in settings.items() for told in setting])
    cursor.close()
    connection.commit()


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # The driver must not open transactions by itself: `_begin_sqlite` does.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _roll_back_sqlite(connection: Any, _record: object, _error: object) -> None:
    # Closing alone does not end the transaction of a connection that was cut off in the middle of a read:
    # it would lock every writer out until the garbage collector finds the cursor.
    connection.rollback()


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later would fail at once when another one wrote
    # in between, whatever the busy timeout; one that is a writer from the start waits its turn.
    reads = connection.get_execution_options().get(_READS, False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
