"""Which attempts of a job are clean, so that a finished job is not looked through for ever."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

UNCLEAN = sa.text("attempt > clean_attempt")


def upgrade() -> None:
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("clean_attempt", sa.Integer(), server_default="0", nullable=False))
    op.create_index("ix_jobs_id", "jobs", ["id"], sqlite_where=UNCLEAN, postgresql_where=UNCLEAN)
