"""The migrations lead to exactly the tables of the code."""

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, String, create_engine, inspect, text

from service.contracts.jobs import Desired, FailureKind, JobState
from service.data_folder import DataFolder
from service.db.moves import Actor
from service.db.tables import Base, EventRow
from service.db.upgrade import SchemaError, alembic_config, newest_revision, upgrade
from tests.fakes import poison
from tests.fakes.control_plane import control_plane
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
    none = "dispatching has not begun: no dispatcher has run on this database yet"
    ready = {"status": "ready", "revision": newest_revision(), "notice": none, "leases": []}
    assert (await world.client.get("/readyz")).json() == ready
    async with world.sessions.begin() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    answer = await world.client.get("/readyz")
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
    assert "a newer version of the service has upgraded it" in answer.json()["detail"]
    assert (await world.client.get("/healthz")).status_code == 200


_THEN = "2026-11-01 00:00:00.000000"
OLD_JOB = {
    **dict.fromkeys(("desired_at", "created_at", "updated_at"), _THEN),
    **dict.fromkeys(("labels", "spec", "progress", "latest"), "{}"),
    **dict.fromkeys(("attempt", "mlflow_metric_mark", "mlflow_file_mark", "mlflow_closed"), 0),
    "name": "old",
    "kind": "tokenizer",
    "desired": "run",
    "reason": "as it was",
    "inputs_wait": "[]",
    "version": 3,
    "priority": 50,
    "max_attempts": 3,
}


def test_upgrade__ends_jobs_whose_numbers_are_none(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    url = at_revision(path, "0006")
    engine = create_engine(f"sqlite:///{path}")
    resolved = '{"training": {"weight_decay": Infinity, "betas": [NaN]}, "a": "Infinity"}'
    with engine.begin() as connection:
        for job_id, state, document in (
            ("a", "queued", resolved),
            ("b", "succeeded", resolved),
            ("c", "running", '{"training": {'),
            ("d", "queued", '{"training": {"weight_decay": 0.05}}'),
        ):
            values = {**OLD_JOB, "id": job_id, "state": state, "resolved": document}
            places = ", ".join(f":{name}" for name in values)
            connection.execute(text(f"INSERT INTO jobs ({', '.join(values)}) VALUES ({places})"), values)
    upgrade(url)
    with engine.begin() as connection:
        rows = {row.id: row for row in connection.execute(text("SELECT * FROM jobs"))}
        events = connection.execute(text("SELECT * FROM events ORDER BY job_id")).all()
        assert connection.scalar(text("SELECT count(*) FROM jobs WHERE NOT json_valid(resolved)")) == 0
    assert [rows[job_id].state for job_id in "abcd"] == ["failed", "succeeded", "failed", "queued"]
    assert json.loads(rows["a"].resolved) == {
        "training": {"weight_decay": "Infinity", "betas": ["NaN"]},
        "a": "Infinity",
    }
    places = "resolved.training.betas[0]: NaN, resolved.training.weight_decay: Infinity"
    assert f"could not be queried, which kept all jobs waiting ({places})" in rows["a"].reason
    assert "it is no JSON" in rows["c"].reason
    assert (rows["b"].reason, rows["d"].reason) == ("as it was", "as it was")
    assert (rows["a"].version, rows["a"].failure_kind, rows["a"].finished_at is None) == (4, "user", False)
    assert [(event.job_id, event.src, event.dst) for event in events] == [
        ("a", "queued", "failed"),
        ("c", "running", "failed"),
    ]


async def test_upgrade__what_it_has_ended_is_shown_and_holds_nobody_up(
    tmp_path: Path, database_url: str
) -> None:
    async with control_plane(tmp_path, database_url=database_url) as plane:
        poisoned, healthy = await plane.submit(), await plane.submit()
        await poison.plant(plane.sessions, "jobs.resolved", poisoned, '{"training": {"weight_decay": NaN}}')
        engine = create_engine(database_url.replace("+aiosqlite", "", 1))
        with engine.begin() as connection:
            connection.execute(text("ALTER TABLE leases DROP COLUMN passed_at"))
            connection.execute(text("ALTER TABLE leases DROP COLUMN doing"))
            connection.execute(text("UPDATE alembic_version SET version_num = '0006'"))
        await asyncio.to_thread(upgrade, database_url)
        await plane.reconciler().run_once()
        assert (await plane.job(poisoned)).state is JobState.FAILED
        assert (await plane.job(healthy)).state is JobState.LAUNCHING


def at_revision(path: Path, revision: str | None) -> str:
    """A database of that revision; its address."""
    url = f"sqlite+aiosqlite:///{path}"
    if revision in KNOWN:
        upgrade(url, revision=revision)
    elif revision is not None:
        upgrade(url)
        engine = create_engine(f"sqlite:///{path}")
        with engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = :v"), {"v": revision})
    return url


KNOWN = [script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()]


@pytest.mark.parametrize("revision", KNOWN)
def test_upgrade__from_every_earlier_revision_gives_the_tables_of_the_code(
    tmp_path: Path, revision: str
) -> None:
    url = at_revision(tmp_path / "old.db", revision)
    upgrade(url)
    with create_engine(f"sqlite:///{tmp_path / 'old.db'}").connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


@pytest.mark.parametrize(
    ("revision", "told"),
    [(None, "has no tables of ours"), ("0001", "is at revision 0001"), ("9999", "a newer version")],
)
@pytest.mark.parametrize("command", ["api", "dispatcher"])
def test_server__that_meets_another_schema_says_so_and_stops(
    tmp_path: Path, command: str, revision: str | None, told: str
) -> None:
    environ = {
        "PATH": os.environ["PATH"],
        "CIM_DATABASE_URL": at_revision(tmp_path / "cim.db", revision),
        "CIM_STORE_URL": str(tmp_path),
        "CIM_RAY_URL": "http://127.0.0.1:1",
        "CIM_PUBLIC_URL": "http://127.0.0.1:1",
        "CIM_PORT": "0",
        "CIM_SECRET": "s" * 32,
    }
    ended = subprocess.run(
        [sys.executable, "-m", "service", command], env=environ, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr


def test_upgrade__refuses_what_a_newer_version_has_made(tmp_path: Path) -> None:
    url = at_revision(tmp_path / "new.db", "9999")
    with pytest.raises(SchemaError, match="newer version of the service"):
        upgrade(url)


def test_cim_db_upgrade__of_a_data_directory(tmp_path: Path) -> None:
    at_revision(tmp_path / "cim.db", "0001")
    cim = "from service.cli.main import main; main()"
    command = [sys.executable, "-c", cim, "db", "upgrade", "--data-dir", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    with create_engine(f"sqlite:///{tmp_path / 'cim.db'}").connect() as connection:
        assert MigrationContext.configure(connection).get_current_revision() == newest_revision()


@pytest.mark.parametrize("data_dir", ["absent", "taken"])
def test_cim_db_upgrade__says_why_it_cannot(tmp_path: Path, data_dir: str) -> None:
    folder = DataFolder(path=tmp_path / "taken")
    folder.prepare()
    command = [sys.executable, "-m", "service", "migrate", "--data-dir", str(tmp_path / data_dir)]
    with folder.locked():
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert ("no data directory" if data_dir == "absent" else "already runs on") in ended.stderr
