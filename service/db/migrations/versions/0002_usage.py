"""What a user's retry forgives, and when a training last showed a sign of life."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "jobs", sa.Column("forgiven_attempts", sa.Integer(), nullable=False, server_default=sa.text("0"))
    )
    op.add_column("attempts", sa.Column("advanced_at", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    op.drop_column("attempts", "advanced_at")
    op.drop_column("jobs", "forgiven_attempts")
