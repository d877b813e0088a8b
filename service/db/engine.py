"""The engine and the sessions of one process."""

from functools import partial
from typing import Any

from sqlalchemy import Connection, event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

Sessions = async_sessionmaker[AsyncSession]

BUSY_TIMEOUT_MS = 30_000
IDLE_LIMIT_S = 30.0
_READS = "cim_only_reads"


def create_engine(database_url: str, *, idle_limit_s: float = IDLE_LIMIT_S) -> AsyncEngine:
    """An engine for `sqlite+aiosqlite:///PATH` or `postgresql+psycopg://...`.

    SQLite is put into WAL mode, waits for other writers, and enforces foreign keys. PostgreSQL ends
    a transaction in which nothing happens for `idle_limit_s`: a process that was frozen in the middle
    of one, or whose host is gone, would hold its locks for ever.
    """
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite":
        engine = create_async_engine(url)
        event.listen(engine.sync_engine, "connect", _prepare_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
        return engine
    engine = create_async_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=20)
    limit_ms = max(1, round(idle_limit_s * 1000))  # 0 would mean none
    event.listen(engine.sync_engine, "connect", partial(_prepare_postgres, limit_ms=limit_ms))
    return engine


def create_sessions(engine: AsyncEngine) -> Sessions:
    """Sessions whose rows stay readable after the commit."""
    return async_sessionmaker(engine, expire_on_commit=False)


async def only_reads(session: AsyncSession) -> None:
    """Say, before the first statement, that the transaction writes nothing: it waits for no writer."""
    await session.connection(execution_options={_READS: True})


def _prepare_postgres(connection: Any, _record: object, *, limit_ms: int) -> None:
    cursor = connection.cursor()
    cursor.execute(f"SET idle_in_transaction_session_timeout = {limit_ms}")
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


def _begin_sqlite(connection: Connection) -> None:
    # A transaction that reads first and writes later would fail at once when another one wrote
    # in between, whatever the busy timeout; one that is a writer from the start waits its turn.
    reads = connection.get_execution_options().get(_READS, False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")
