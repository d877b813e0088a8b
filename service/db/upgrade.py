"""Brings a database to the present schema, and says what is wrong with one of another.

Only a one-shot process upgrades, and embedded mode at its start; a server that meets another schema stops.
"""

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.pool import NullPool

from service.contracts import storable
from service.db import line

_HERE = Path(__file__).parent
_CONNECT_S = 10.0
_LOCK = 0x43494D  # of PostgreSQL's advisory locks; any number that nobody else takes


class SchemaError(Exception):
    """The database is not at the schema that this version needs; the message says what to do."""


def alembic_config() -> Config:
    """Alembic's settings, with the folder of the migrations filled in."""
    config = Config(_HERE / "alembic.ini")
    config.set_main_option("script_location", str(_HERE / "migrations").replace("%", "%%"))
    return config


def upgrade(database_url: str, *, revision: str = "head") -> None:
    """Migrate the database at `database_url`, creating the SQLite file where there is none.

    Blocks; call it through `asyncio.to_thread` from a running loop. Doing it twice is harmless, also at once.

    Raises:
        SchemaError: a newer version of the service has upgraded it before.
    """
    url = make_url(database_url)
    engine = _engine(url)
    try:
        with engine.begin() as connection:
            if url.get_backend_name() == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            if newer := _newer_fault(_revision_of(connection)):
                raise SchemaError(newer)
            config = alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
    finally:
        engine.dispose()


def _engine(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        return create_engine(url.set(drivername="sqlite"), poolclass=NullPool, json_serializer=storable.dumps)
    # A server that has vanished is given up, but a statement may take its time: a migration rewrites tables.
    return create_engine(
        url,
        poolclass=NullPool,
        json_serializer=storable.dumps,
        connect_args=line.parameters(url, connect_s=_CONNECT_S),
    )


@cache
def newest_revision() -> str:
    """The revision that this code was written for."""
    head = ScriptDirectory.from_config(alembic_config()).get_current_head()
    assert head is not None
    return head


async def check_schema(session: AsyncSession) -> str:
    """The database's revision, which is ours.

    Raises:
        SchemaError: it is older or newer.
    """
    connection = await session.connection()
    present = await connection.run_sync(_revision_of)
    if newer := _newer_fault(present):
        raise SchemaError(newer)
    if present != newest_revision():
        found = "has no tables of ours" if present is None else f"is at revision {present}"
        raise SchemaError(
            f"the database {found}, this version needs revision {newest_revision()}: run `cim db upgrade` "
            "(or `python -m service migrate`), then start again"
        )
    return newest_revision()


def _newer_fault(present: str | None) -> str:
    """What is wrong with a revision that this version does not know."""
    if present is None or present in _known_revisions():
        return ""
    return (
        f"the database is at revision {present}, unknown to this version (up to {newest_revision()}): "
        "a newer version of the service has upgraded it. Run that version, or restore the backup made before"
    )


@cache
def _known_revisions() -> frozenset[str]:
    return frozenset(
        script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()
    )


def _revision_of(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()
