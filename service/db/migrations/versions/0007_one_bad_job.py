"""How the dispatchers' passes go; and rows that SQLite cannot query, because a number in them is none."""

import json
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

DOCUMENTS = ("labels", "spec", "resolved", "inputs_wait", "progress", "latest", "result")
FINAL = ("succeeded", "failed", "cancelled")
MOST_SHOWN = 3
REASON = (
    "its stored record could not be queried, which kept all jobs waiting ({place}); such values are refused "
    "now: submit it again with finite numbers"
)


def upgrade() -> None:
    op.add_column("leases", sa.Column("passed_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("leases", sa.Column("doing", sa.Text(), nullable=False, server_default=""))
    if op.get_bind().dialect.name == "sqlite":  # PostgreSQL has never let one in
        _end_unreadable_jobs(op.get_bind())


def _end_unreadable_jobs(connection: sa.Connection) -> None:
    sound = " AND ".join(f"({name} IS NULL OR json_valid({name}))" for name in DOCUMENTS)
    query = f"SELECT id, state, {', '.join(DOCUMENTS)} FROM jobs WHERE NOT ({sound})"  # noqa: S608
    for row in connection.execute(sa.text(query)).mappings().all():
        documents = {name: row[name] for name in DOCUMENTS if row[name] is not None}
        places = [f"{name}.{place}" for name, text in documents.items() for place in _places(text)]
        repaired = {name: _repaired(text, name) for name, text in documents.items()}
        assignments = ", ".join(f"{name} = :{name}" for name in repaired)
        connection.execute(
            sa.text(f"UPDATE jobs SET {assignments} WHERE id = :id"),  # noqa: S608
            {**repaired, "id": row["id"]},
        )
        if row["state"] not in FINAL:
            place = ", ".join(sorted(places)[:MOST_SHOWN]) or "it is no JSON"
            _end(connection, row["id"], row["state"], REASON.format(place=place))


def _end(connection: sa.Connection, job_id: str, state: str, reason: str) -> None:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
    told = {"id": job_id, "state": state, "reason": reason, "now": now}
    connection.execute(
        sa.text(
            "UPDATE jobs SET state = 'failed', failure_kind = 'user', reason = :reason, finished_at = :now, "
            "updated_at = :now, version = version + 1 WHERE id = :id"
        ),
        told,
    )
    connection.execute(
        sa.text(
            "INSERT INTO events (job_id, at, src, dst, actor, message) "
            "VALUES (:id, :now, :state, 'failed', 'dispatcher', :reason)"
        ),
        told,
    )


def _places(text: str) -> list[str]:
    """Dotted paths of the numbers that are none."""
    found: list[str] = []
    todo: list[tuple[str, Any]] = [("", _loaded(text))]
    while todo:
        path, value = todo.pop()
        if isinstance(value, dict):
            todo += [(f"{path}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list):
            todo += [(f"{path}[{number}]", inner) for number, inner in enumerate(value)]
        elif isinstance(value, _NoNumber):
            found.append(f"{path.removeprefix('.')}: {value}")
    return found


class _NoNumber(str):
    """Infinity, -Infinity or NaN, as text from now on."""

    __slots__ = ()


def _loaded(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_NoNumber)
    except (ValueError, RecursionError):
        return None


def _repaired(text: str, name: str) -> str:
    loaded = _loaded(text)
    if loaded is None:
        loaded = [] if name == "inputs_wait" else {}
    return json.dumps(loaded)
