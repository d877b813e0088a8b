"""Writes the migration from the last revision to the tables as they are now.

Usage: python -m scripts.new_migration "what it does"
"""

import sys
import tempfile
from pathlib import Path

from alembic import command
from sqlalchemy import create_engine

from service.db.upgrade import alembic_config, upgrade


def main() -> None:
    """Compare the tables with a fresh database at the last revision and write the difference."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fresh.db"
        upgrade(f"sqlite+aiosqlite:///{path}")
        with create_engine(f"sqlite:///{path}").connect() as connection:
            config = alembic_config()
            config.attributes["connection"] = connection
            command.revision(config, message=sys.argv[1], autogenerate=True)


if __name__ == "__main__":
    main()
