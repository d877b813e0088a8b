"""The engine and the sessions of one process."""

from typing import Any

from sqlalchemy import Connection, event, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

Sessions = async_sessionmaker[AsyncSession]

BUSY_TIMEOUT_MS = 30_000
_READS = "cim_only_reads"


def create_engine(database_url: str) -> AsyncEngine:
    """An engine for `sqlite+aiosqlite:///PATH` or `postgresql+psycopg://...`.

    SQLite is put into WAL mode, waits for other writers, and enforces foreign keys.
    """
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite":
        engine = create_async_engine(url)
        event.listen(engine.sync_engine, "connect", _prepare_sqlite)
        event.listen(engine.sync_engine, "begin", _begin_sqlite)
        return engine
    return create_async_engine(url, pool_pre_ping=True, pool_size=10, max_overflow=20)


def create_sessions(engine: AsyncEngine) -> Sessions:
    """Sessions whose rows stay readable after the commit."""
    return async_sessionmaker(engine, expire_on_commit=False)


async def only_reads(session: AsyncSession) -> None:
    """Say, before the first statement, that the transaction writes nothing: it waits for no writer."""
    await session.connection(execution_options={_READS: True})


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
