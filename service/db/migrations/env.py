"""Alembic's entry point. The caller hands the connection over (`service.db.upgrade`)."""

from alembic import context

from service.db.tables import Base

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("run migrations with `cim db upgrade` or service.db.upgrade.upgrade(DATABASE_URL)")

# SQLite cannot alter a column in place: Alembic copies the table instead.
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
