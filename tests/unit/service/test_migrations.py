"""The migrations lead to exactly the tables of the code."""

import re
from pathlib import Path
from typing import get_args

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, String, create_engine, inspect, text

from service.contracts.jobs import Desired, FailureKind, JobState
from service.db.moves import Actor
from service.db.tables import Base, EventRow
from service.db.upgrade import alembic_config, newest_revision, upgrade
from tests.fakes.world import World


def test_upgrade__from_empty_gives_the_tables_of_the_code(migrated_sqlite: Path) -> None:
    with create_engine(f"sqlite:///{migrated_sqlite}").connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        migrated = checks(connection)
    with create_engine("sqlite://").connect() as connection:
        Base.metadata.create_all(connection)
        # Alembic does not compare check constraints.
        assert migrated == checks(connection)
        assert "ck_events_dst" in migrated


def checks(connection: Connection) -> dict[str, str]:
    """The condition of each check constraint."""
    inspector = inspect(connection)
    tables = inspector.get_table_names()
    return {str(c["name"]): c["sqltext"] for table in tables for c in inspector.get_check_constraints(table)}


@pytest.mark.parametrize(
    ("column", "kind"), [("state", JobState), ("desired", Desired), ("failure_kind", FailureKind)]
)
def test_check_constraint__equals_the_enum(
    migrated_sqlite: Path, column: str, kind: type[JobState] | type[Desired] | type[FailureKind]
) -> None:
    with create_engine(f"sqlite:///{migrated_sqlite}").connect() as connection:
        condition = checks(connection)[f"ck_jobs_{column}"]
    assert set(re.findall(r"'(\w+)'", condition)) == {str(member) for member in kind}


def test_constraints__all_have_names() -> None:
    for table in Base.metadata.sorted_tables:
        assert all(constraint.name for constraint in table.constraints), table.name
        assert all(index.name for index in table.indexes), table.name


def test_revisions__are_one_line() -> None:
    scripts = ScriptDirectory.from_config(alembic_config())
    assert len(scripts.get_heads()) == 1
    assert len(scripts.get_bases()) == 1


def test_upgrade__twice_is_harmless(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'new.db'}"
    upgrade(url)
    upgrade(url)
    with create_engine(f"sqlite:///{tmp_path / 'new.db'}").connect() as connection:
        assert MigrationContext.configure(connection).get_current_revision() == newest_revision()


def test_actors__fit_their_column() -> None:
    column = EventRow.__table__.c.actor.type
    assert isinstance(column, String)
    assert column.length is not None
    assert max(len(actor) for actor in get_args(Actor)) <= column.length


async def test_readyz__says_what_to_do_about_another_schema(world: World) -> None:
    ready = {"status": "ready", "revision": newest_revision(), "leases": []}
    assert (await world.client.get("/readyz")).json() == ready
    async with world.sessions.begin() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = '0000'"))
    answer = await world.client.get("/readyz")
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
    assert "python -m service migrate" in answer.json()["detail"]
    assert (await world.client.get("/healthz")).status_code == 200
