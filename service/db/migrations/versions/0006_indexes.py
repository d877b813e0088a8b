"""Indexes for a million jobs: what a dispatcher asks every second, and what people look for in lists."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

NOT_GONE = sa.text("ray_ended_at IS NULL")
# As each database spells `mlflow_closed.is_(False)`: a partial index serves only that condition.
UNRECORDED = sa.text("attempt > 0 AND mlflow_closed IS false")
UNRECORDED_SQLITE = sa.text("attempt > 0 AND mlflow_closed IS 0")

# PostgreSQL alone, not in `service.db.tables`. The extension pg_trgm does the same, but is not everywhere.
TRIGRAMS = """
CREATE FUNCTION cim_trigrams(words text) RETURNS text[] LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS $$
SELECT coalesce(array_agg(DISTINCT substr(lower(words), n, 3)), '{}')
FROM generate_series(1, length(words) - 2) n
$$
"""


def upgrade() -> None:
    op.create_index(
        "ix_attempts_started_at", "attempts", ["started_at"], sqlite_where=NOT_GONE, postgresql_where=NOT_GONE
    )
    op.create_index(
        "ix_jobs_updated_at",
        "jobs",
        ["updated_at"],
        postgresql_where=UNRECORDED,
        sqlite_where=UNRECORDED_SQLITE,
    )
    op.create_index("ix_jobs_kind_created_at", "jobs", ["kind", "created_at"])
    if op.get_bind().dialect.name == "postgresql":
        op.execute("CREATE INDEX ix_jobs_labels ON jobs USING gin (labels jsonb_path_ops)")
        op.execute(TRIGRAMS)
        op.execute("CREATE INDEX ix_jobs_words ON jobs USING gin (cim_trigrams(name || ' ' || id))")
