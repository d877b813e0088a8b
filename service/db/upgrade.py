"""Brings a database to the present schema. Run by a one-shot process, never by the API."""

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, make_url
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.pool import NullPool

_HERE = Path(__file__).parent


def alembic_config() -> Config:
    """Alembic's settings, with the folder of the migrations filled in."""
    config = Config(_HERE / "alembic.ini")
    config.set_main_option("script_location", str(_HERE / "migrations").replace("%", "%%"))
    return config


def upgrade(database_url: str, *, revision: str = "head") -> None:
    """Migrate the database at `database_url`, creating the SQLite file where there is none.

    Blocks; call it through `asyncio.to_thread` from a running loop. Doing it twice is harmless.
    """
    url = make_url(database_url)
    if url.get_backend_name() == "sqlite":
        url = url.set(drivername="sqlite")
    engine = create_engine(url, poolclass=NullPool)
    try:
        with engine.begin() as connection:
            config = alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, revision)
    finally:
        engine.dispose()


@cache
def newest_revision() -> str:
    """The revision that this code was written for."""
    head = ScriptDirectory.from_config(alembic_config()).get_current_head()
    assert head is not None
    return head


async def present_revision(session: AsyncSession) -> str | None:
    """The revision of the database; None where it was never migrated."""
    connection = await session.connection()
    return await connection.run_sync(_revision_of)


def _revision_of(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()
