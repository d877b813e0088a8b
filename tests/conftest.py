"""Fixtures of every service test: a database at the present schema, and the API around it."""

import logging
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from service.db.upgrade import upgrade
from tests.fakes.world import World, open_world
from workers.logs import OUR_LOGGERS


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """A test that raises them, as workers do, shall not make those after it talk."""
    loggers = [logging.getLogger(name) for name in ("", *OUR_LOGGERS)]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy: migrating takes longer than most tests."""
    path = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    upgrade(f"sqlite+aiosqlite:///{path}")
    return path


@pytest.fixture
def database_url(migrated_sqlite: Path, tmp_path: Path) -> str:
    """An empty database of this test's own; integration tests put PostgreSQL in its place."""
    path = tmp_path / "cim.db"
    shutil.copy(migrated_sqlite, path)
    return f"sqlite+aiosqlite:///{path}"


@pytest.fixture
async def world(database_url: str, tmp_path: Path) -> AsyncIterator[World]:
    """The API on that database, with a folder as object store and a clock that is set by hand."""
    async with open_world(database_url, tmp_path) as opened:
        yield opened
